"""Replicates against brute force, their intervals against simulated truth, and the fingerprints of images."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lie_metric.functional.student import quantile, two_sided
from lie_metric.functional.sums import GROUPS, Indices, Replicates, fingerprints, grouped, standard_error


def ratio(sums):
    return (sums["x"] / sums["y"]).sqrt()


def brute_force(x, y, groups):
    """Value and jackknife error of sqrt(Σx/Σy) by leaving out the images themselves, as in the paper's Eq. 2.3."""
    x, y, groups = x.tolist(), y.tolist(), [int(g) % GROUPS for g in groups]

    def value(kept):
        return math.sqrt(math.fsum(x[i] for i in kept) / math.fsum(y[i] for i in kept))

    n, whole = len(x), value(range(len(x)))
    used = sorted(set(groups))
    left = {g: value([i for i in range(n) if groups[i] != g]) for g in used}
    h = {g: n / groups.count(g) for g in used}
    pseudo = {g: h[g] * whole - (h[g] - 1) * left[g] for g in used}
    estimate = whole * len(used) - sum((1 - 1 / h[g]) * left[g] for g in used)  # of the jackknife, Eq. 2.2

    def error(centre):
        return math.sqrt(sum((pseudo[g] - centre) ** 2 / (h[g] - 1) for g in used) / len(used))

    return whole, left, error(sum(pseudo.values()) / len(used)), error(estimate)


@pytest.mark.parametrize("groups", [range(20), range(200), [0, 0, 0, 5, 5, 9] * 4, [63, 64, 1, 1, 2] * 3])
def test_replicates_are_what_leaving_images_out_gives(groups):
    groups = list(groups)
    x, y = torch.rand(2, len(groups), dtype=torch.float64)
    found = Replicates.of(grouped({"x": x, "y": y}, groups), ratio)
    whole, left, error, about_estimate = brute_force(x, y, groups)
    assert found.groups == len(left)
    assert found.value.item() == pytest.approx(whole, rel=1e-13)
    for g in range(GROUPS):
        assert found.left_out[g].item() == pytest.approx(left.get(g, whole), rel=1e-12)
    assert found.standard_error().item() == pytest.approx(error, rel=1e-10)
    # Eq. 2.3 is about the estimate of Eq. 2.2, which is not quite the mean where groups are unequal.
    assert found.standard_error().item() == pytest.approx(about_estimate, rel=0.2)


def test_one_group_has_no_error_and_functions_go_entry_by_entry():
    sums = grouped({"x": torch.rand(3, 2).double()}, [7, 7, 7])
    found = Replicates.of(sums, lambda s: s["x"] / s["images"][..., None])
    assert found.standard_error().isnan().all()
    assert all(end.isnan().all() for end in found.interval())
    sums = grouped({"x": torch.rand(9, 2).double() + 1}, range(9))
    found = Replicates.of(sums, lambda s: s["x"] / s["images"][..., None])
    logs = Replicates.of(sums, lambda s: (s["x"] / s["images"][..., None]).log())
    torch.testing.assert_close(found.map(torch.log).standard_error(), logs.standard_error())
    torch.testing.assert_close(found.standard_error(), standard_error(sums, lambda s: s["x"] / s["images"][..., None]))


def test_intervals_by_hand():
    sums = grouped({"x": torch.tensor([1.0, 2, 4, 9]).double()}, range(4))
    found = Replicates.of(sums, lambda s: s["x"] / s["images"])
    q = stats.t.ppf(0.95, 3)
    error = torch.tensor([1.0, 2, 4, 9]).double().std().item() / 2
    low, high = found.interval(0.9)
    assert low.item() == pytest.approx(4 * math.exp(-q * error / 4))
    assert high.item() == pytest.approx(4 * math.exp(q * error / 4))
    low, high = found.interval(0.9, logarithmic=False)
    assert (low.item(), high.item()) == pytest.approx((4 - q * error, 4 + q * error))
    for level in (0, 1, 95, -0.5, True, "0.95"):
        with pytest.raises(ValueError, match="`level` must be between 0 and 1"):
            found.interval(level)


@settings(max_examples=60)
@given(st.floats(0.3, 3000), st.floats(0, 60), st.floats(0.01, 0.9999))
def test_student(freedom, t, level):
    assert two_sided(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-9, abs=1e-300)
    assert two_sided(-t, freedom) == two_sided(t, freedom)
    assert quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_student_at_its_ends():
    assert quantile(0.95, math.inf) == pytest.approx(stats.norm.ppf(0.975))
    assert two_sided(math.inf, 3) == 0
    assert two_sided(0.0, 3) == 1
    assert math.isnan(two_sided(1.0, 0))
    assert math.isnan(two_sided(math.nan, 3))
    assert math.isnan(quantile(0.95, 0))
    assert math.isnan(quantile(95, 3))


def simulated(images, repetitions, seed, deviation=0.8):
    """Σ‖L f‖² and Σ‖f - E f‖² by group for many samples of images, and the true ratio: log-normal, correlated."""
    source = torch.Generator().manual_seed(seed)
    common, own, other = torch.randn(3, images, repetitions, generator=source, dtype=torch.float64)
    violation = (deviation * common - deviation**2 / 2).exp()
    spread = (0.4 * (0.3 * common + 0.91**0.5 * own) - 0.08).exp()
    return violation, spread, common, other


def summed(rows):
    return grouped({name: value for name, value in rows.items()}, range(len(next(iter(rows.values())))))


def statistic(sums):
    return (sums["x"] / sums["y"]).sqrt()


@pytest.mark.parametrize(
    ("images", "repetitions"),
    [
        (64, 2000),
        (256, 1000),
        pytest.param(64, 20000, marks=pytest.mark.slow),
        pytest.param(256, 8000, marks=pytest.mark.slow),
    ],
)
def test_intervals_cover_the_truth(images, repetitions):
    violation, spread, *_ = simulated(images, repetitions, images)
    low, high = Replicates.of(summed({"x": violation, "y": spread}), statistic).interval()
    covered = ((low < 1) & (high > 1)).double().mean().item()
    assert 0.93 - 2 / repetitions**0.5 * 0.25 <= covered <= 0.97, covered


def test_images_that_belong_together():
    """Crops of twenty photos, alike up to a little: intervals by image are far too narrow, by photo right."""
    repetitions, photos, crops = 1500, 20, 8
    source = torch.Generator().manual_seed(0)
    photo = torch.randn(photos, 1, repetitions, generator=source, dtype=torch.float64)
    crop = torch.randn(photos, crops, repetitions, generator=source, dtype=torch.float64)
    rows = {"x": (0.5 * photo + 0.2 * crop - 0.145).exp().flatten(0, 1), "y": torch.ones(160, repetitions).double()}
    numbers = torch.arange(photos).repeat_interleave(crops).tolist()

    def covered(indices):
        low, high = Replicates.of(grouped(rows, indices), statistic).interval()
        return ((low < 1) & (high > 1)).double().mean().item()

    assert covered(Indices(range(160), numbers)) > 0.915
    assert covered(range(160)) < 0.75


class TestFingerprints:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
    def test_any_change_is_seen(self, dtype):
        x = (torch.randn(6, 3, 5, 7) * 9).to(dtype)
        found = fingerprints(x)
        assert found.dtype == torch.float64
        assert found.unique().numel() == 6
        assert bool(((found >= 0) & (found < 2**32) & (found == found.floor())).all())
        torch.testing.assert_close(fingerprints(x.flip(0)), found.flip(0), rtol=0, atol=0)
        torch.testing.assert_close(fingerprints(x.mT.contiguous().mT), found, rtol=0, atol=0)
        for change in (lambda v: -v, lambda v: v.roll(1, -1), lambda v: v.flip(-1), lambda v: v.flip(1)):
            assert (fingerprints(change(x)) != found).all()
        for place in ((0, 0, 0), (2, 4, 6), (1, 2, 3)):
            changed = x.clone()
            changed[(slice(None), *place)] += 1
            assert (fingerprints(changed) != found).all()

    def test_numbers_stay_the_same(self):
        """Files keep them: other numbers would tell images apart that are the same."""
        x = torch.arange(12, dtype=torch.float32).reshape(2, 1, 2, 3)
        assert fingerprints(x).tolist() == [3244831659.0, 3234938908.0]

    def test_against_whole_numbers(self):
        """The formula in Python's integers."""
        x = torch.randn(2, 1, 2, 2)

        def scrambled(z):
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
            return z ^ (z >> 31)

        weights = [scrambled(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(5)]
        for row, found in zip(x.flatten(1).view(torch.int32).tolist(), fingerprints(x).tolist(), strict=True):
            total = weights[0] + sum(w * word for w, word in zip(weights[1:], row, strict=True))
            assert found == (scrambled(total % 2**64) >> 16) % 2**32

    def test_sums_over_images_are_seen_too(self):
        x = torch.rand(2, 1, 4, 4)
        step = torch.full((1, 4, 4), 0.25)
        shifted = torch.stack([x[0] + step, x[1] - step])
        assert fingerprints(x).sum() != fingerprints(shifted).sum()
        assert fingerprints(x[:0]).shape == (0,)
        assert fingerprints(torch.zeros(2, 0)).shape == (2,)
