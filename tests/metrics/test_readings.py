"""Of every metric: groups of images, intervals, and which images and outputs a value is of."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import cnn, images
from scipy import stats
from test_every_metric import MAKE
from torchmetrics import MetricCollection

import lie_metric as lm

pytestmark = pytest.mark.filterwarnings("ignore:The output of:UserWarning")


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
class TestEvery:
    def test_groups_are_left_out_as_one(self, make):
        model, x, groups = cnn(), images(8), [5, 5, 0, 0, 0, 70, 9, 9]
        plain, by_group = make(), make()
        plain.update(model, x)
        by_group.update(model, x[:3], groups=torch.tensor(groups[:3]))
        by_group.update(model, x[3:], groups=np.array(groups[3:]))
        torch.testing.assert_close(by_group.compute(), plain.compute(), equal_nan=True)
        kept = by_group.replicates()
        assert kept.images.nonzero().flatten().tolist() == [0, 5, 6, 9]
        assert kept.images[[0, 5, 6, 9]].tolist() == [3, 2, 1, 2]
        assert kept.groups == 4
        # Without the group of two, the value is that of the others; their noise goes by their numbers.
        rest = make()
        rest.numbers = list(range(2, 8))
        rest.update(model, x[2:])
        wanted = torch.stack(list(rest.compute().values()))
        torch.testing.assert_close(kept.left_out[5], wanted, equal_nan=True)
        errors = torch.stack(list(by_group.standard_error().values()))
        torch.testing.assert_close(errors, kept.standard_error(), equal_nan=True)

    def test_groups_for_all_or_none(self, make):
        metric, model, x = make(), cnn(), images(4)
        metric.update(model, x)
        with pytest.raises(
            ValueError, match="`groups` must be given for all images or for none, got some after 4 images"
        ):
            metric.update(model, x, groups=[0, 0, 1, 1])
        metric.reset()
        metric.update(model, x, groups=[0, 0, 1, 1])
        with pytest.raises(ValueError, match="got none after 4 images with"):
            metric.update(model, x)

    @pytest.mark.parametrize(
        ("groups", "kind", "match"),
        [
            ([0, 1], ValueError, "one entry for each of the 3 images, got 2"),
            ([0, 1, -1], ValueError, "must not be negative, got -1"),
            ([0, 1, 0.5], TypeError, "must be integers, got 0.5"),
            ([0, 1, True], TypeError, "must be integers, got True"),
            (torch.tensor([0.0, 1.0, 2.0]), TypeError, "must be integers on one axis, got shape"),
            (torch.zeros(3, 1).long(), TypeError, "must be integers on one axis"),
            ("abc", TypeError, "must be a sequence of integers, got 'abc'"),
            (3, TypeError, "must be a sequence of integers, got 3"),
        ],
    )
    def test_bad_groups(self, make, groups, kind, match):
        metric = make()
        with pytest.raises(kind, match=match):
            metric.update(cnn(), images(3), groups=groups)
        assert not metric.sum_images.any()

    def test_fingerprints_tell_images_and_groups_apart(self, make):
        model, x = cnn(), images(6)

        def of(*batches, groups=None, numbers=None):
            metric, start = make(), 0
            for batch in batches:
                part = slice(start, start := start + len(batch))
                metric.numbers = None if numbers is None else numbers[part]
                metric.update(model, batch, groups=None if groups is None else groups[part])
            return metric.images_fingerprint()

        whole = of(x)
        assert len(whole) == 32
        assert of(x[:2], x[2:3], x[3:]) == whole
        assert of(x.flip(0), numbers=[5, 4, 3, 2, 1, 0]) == whole
        changed = x.clone()
        changed[3, 1, 2, 2] += 1e-12
        others = [
            of(changed),
            of(x.flip(0)),
            of(x[:5]),
            of(x, groups=[0] * 6),
            of(x.float().double()),
            of(x.roll(1, 1)),
        ]
        assert len({whole, *others}) == 7
        groups = [0, 0, 1, 1, 2, 2]
        order = [1, 0, 3, 2, 5, 4]
        assert of(x, groups=groups) == of(x[order], groups=groups)

    def test_readings_travel_with_the_metric(self, make):
        metric, model, x = make(), cnn(), images(6)
        assert metric.input_shape is None
        metric(model, x[:3], groups=[0, 1, 2])
        metric(model, x[3:], groups=[3, 4, 5])
        assert metric.input_shape == (3, 16, 16)
        with torch.no_grad():
            variance = model.eval()(x).var(0).mean()
        found = metric.output_variance()
        if isinstance(metric, lm.BandLimitedEquivariance):
            assert found.isnan()
        else:
            torch.testing.assert_close(found, variance)
        for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            assert other.images_fingerprint() == metric.images_fingerprint()
            assert other.input_shape == metric.input_shape
            torch.testing.assert_close(other.replicates().left_out, metric.replicates().left_out, equal_nan=True)
        metric.reset()
        assert metric.input_shape is None
        assert metric.output_variance().isnan()

    def test_intervals(self, make):
        metric = make()
        metric.update(cnn(), images(12))
        with_level = metric.interval(level=0.8)
        q = stats.t.ppf(0.9, 11)
        for name, value in metric.compute().items():
            low, high = with_level[name]
            error = metric.standard_error()[name] / value
            if value > 0:
                torch.testing.assert_close(low, value * (-q * error).exp())
                torch.testing.assert_close(
                    high, (value * (q * error).exp()).clamp(max=getattr(metric, "plot_upper_bound", None) or 9e99)
                )
        with pytest.raises(ValueError, match="`measure` must be one of"):
            metric.interval("nothing")
        with pytest.raises(ValueError, match="`level` must be between"):
            metric.interval(level=95)
        single = make()
        single.update(cnn(), images(1))
        with pytest.warns(UserWarning, match="`interval` is NaN for"):
            assert all(end.isnan() for ends in single.interval().values() for end in ends)

    def test_collections_take_groups(self, make):
        both = MetricCollection({"a": make(), "b": make(seed=1)})
        both.update(cnn(), images(4), groups=[0, 0, 1, 1])
        both.update(cnn(), images(4), groups=[2, 2, 3, 3])
        assert all(metric.replicates().groups == 4 for metric in both.values())

    def test_two_parts_merge(self, make):
        one, other, whole = make(), make(), make()
        x = images(6)
        for metric, part in ((one, slice(0, 4)), (other, slice(4, 6)), (whole, slice(0, 6))):
            metric.numbers = list(range(6))[part]
            metric.update(cnn(), x[part])
        one.merge_state(other)
        assert one.images_fingerprint() == whole.images_fingerprint()


def test_every_measure_of_the_local_error():
    metric = lm.LocalEquivarianceError(("rotation", "scale"), with_noise=True)
    metric.update(cnn(), images(6))
    everything = metric.measures()
    records = {record.measure: record for record in metric.records()}
    assert list(records) == ["relative", "lee", "rms", "sensitivity"]
    for measure, record in records.items():
        for k, name in enumerate(record.names):
            assert record.replicates.value[k] == everything[measure][name]
            torch.testing.assert_close(
                record.replicates.standard_error()[k], everything[f"{measure}_standard_error"][name]
            )
        assert set(metric.interval(measure)) == {"rotation", "scale"}
    assert records["lee"].units == ("radian", "log factor")
    quiet = lm.LocalEquivarianceError("rotation", with_noise=False)
    assert list(quiet.statistics()) == ["relative", "lee", "rms"]


def test_consistency_is_at_most_one():
    metric = lm.PredictionConsistency()
    metric.update(cnn(), images(16))
    for low, high in metric.interval().values():
        assert 0 < low <= high <= 1


def test_fingerprints_of_half_types_and_of_states_without_a_grid():
    metric = lm.LocalEquivarianceError("rotation", with_noise=False)
    metric.update(lambda v: v.float().mean((2, 3)), images(3).half())
    assert len(metric.images_fingerprint()) == 32
