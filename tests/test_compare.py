"""Comparisons against simulated truth, against brute force and scipy, and what they refuse."""

import math
import warnings

import pytest
import torch
from cases import cnn, images
from scipy import stats
from torch import nn

import lie_metric as lm
from lie_metric.compare import Compared, Comparison, around, holm, over_trainings
from lie_metric.functional.sums import Replicates, grouped
from lie_metric.records import Record

pytestmark = pytest.mark.filterwarnings("ignore:The output of:UserWarning")


def record(rows, names, **changes):
    """The record of sqrt(Σx/Σy) of each of some columns."""
    replicates = Replicates.of(grouped(rows, range(len(rows["x"]))), lambda s: (s["x"] / s["y"]).sqrt())
    units, settings = ("radian",) * len(names), {"resampling": "bspline"}
    about = {
        "units": units,
        "settings": settings,
        "fingerprint": "f",
        "input_shape": (3, 8, 8),
        "spread": 1.0,
    } | changes
    return Record("LocalEquivarianceError", "relative", tuple(names), replicates=replicates, **about)


def pair(count, repetitions, seed, ratio=1.0, deviation=0.8, shared=0.8):
    """Two models over the same images, many times: log-normal ‖L f‖², correlated over images, true ratio as given."""
    source = torch.Generator().manual_seed(seed)
    common, one, other, spread = torch.randn(4, count, repetitions, generator=source, dtype=torch.float64)
    own = (1 - shared**2) ** 0.5
    rows = [
        {"x": scale**2 * (deviation * (shared * common + own * z) - deviation**2 / 2).exp(), "y": (0.3 * spread).exp()}
        for z, scale in ((one, ratio), (other, 1.0))
    ]
    names = [str(k) for k in range(repetitions)]
    return record(rows[0], names), record(rows[1], names)


SIZES = [
    (64, 1000),
    (256, 500),
    pytest.param(64, 10000, marks=pytest.mark.slow),
    pytest.param(256, 5000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("count", "repetitions"), SIZES)
class TestTruth:
    def test_paired_intervals_cover_and_the_test_has_its_size(self, count, repetitions):
        rows = lm.compare(*pair(count, repetitions, count)).rows
        covered = sum(row.low < 1 < row.high for row in rows) / repetitions
        rejected = sum(row.p < 0.05 for row in rows) / repetitions
        slack = 2 * (0.05 * 0.95 / repetitions) ** 0.5
        assert 0.93 - slack <= covered <= 0.97 + slack, covered
        assert abs(rejected - 0.05) <= 0.02 + slack, rejected
        assert rejected == pytest.approx(1 - covered, abs=1e-9)

    def test_known_differences_are_found_as_often_as_theory_says(self, count, repetitions):
        ratio = 0.85
        rows = lm.compare(*pair(count, repetitions, count + 1, ratio)).rows
        covered = sum(row.low < ratio < row.high for row in rows) / repetitions
        assert 0.92 <= covered <= 0.98
        found = sum(row.p < 0.05 and row.ratio < 1 for row in rows) / repetitions
        # log d = (log x̄ - log x̄') / 2, with Var log x̄ ≈ (e^{σ²} - 1) / n and the covariance by the shared part.
        deviation = 0.8
        variance = (math.exp(deviation**2) - math.exp(deviation**2 * 0.64)) / (2 * count)
        wanted = stats.norm.cdf(-math.log(ratio) / variance**0.5 - 1.96)
        assert found == pytest.approx(wanted, abs=0.06)

    def test_pairing_makes_intervals_narrower(self, count, repetitions):
        a, b = pair(count, repetitions, count + 2)
        paired = torch.tensor([row.over_images for row in lm.compare(a, b)])
        apart = sum((one.replicates.standard_error() / one.replicates.value).square() for one in (a, b)).sqrt()
        assert 1.4 < (apart / paired).mean() < 2.2


class Linear(nn.Module):
    """Outputs that are linear in the image, so that each image's part of every sum is known."""

    def __init__(self, seed):
        super().__init__()
        self.matrix = torch.randn(4, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return x.flatten(1) @ self.matrix.mT


def measured(model, x, groups=None, cls=lm.LocalEquivarianceError, **options):
    metric = cls(("rotation", "scale"), **options) if cls is lm.LocalEquivarianceError else cls(**options)
    metric.update(model, x, groups=groups)
    return metric


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 5]])
@pytest.mark.parametrize("measure", ["relative", "lee"])
def test_brute_force(groups, measure):
    """The ratio and its error from the model's own outputs, images left out by hand."""
    x, models = images(12), (Linear(0), Linear(1))
    found = lm.compare(*(measured(model, x, groups) for model in models), measure)
    labels = list(range(12)) if groups is None else groups
    for name in ("rotation", "scale"):
        parts = []
        for model in models:
            L = lm.lie_derivative(model, x, name)[name]
            parts.append((L.square().sum(1), model(x)))

        def value(part, kept):
            square, f = part
            if measure == "lee":
                return square[kept].mean() / 4
            return (square[kept].sum() / (f[kept] - f[kept].mean(0)).square().sum()).sqrt()

        everything = torch.ones(12).bool()
        whole = [value(part, everything).log() for part in parts]
        pseudo, weights = [], []
        for g in sorted(set(labels)):
            kept = torch.tensor([label != g for label in labels])
            h = 12 / int((~kept).sum())
            one, other = (h * w - (h - 1) * value(p, kept).log() for w, p in zip(whole, parts, strict=True))
            pseudo.append(one - other)
            weights.append(1 / (h - 1))
        pseudo, weights = torch.stack(pseudo), torch.tensor(weights, dtype=torch.float64)
        error = ((pseudo - pseudo.mean()).square() * weights).mean().sqrt().item()
        row, centre = found[name], (whole[0] - whole[1]).item()
        freedom = len(set(labels)) - 1
        assert row.ratio == pytest.approx(math.exp(centre), rel=1e-9)
        assert row.over_images == row.standard_error == pytest.approx(error, rel=1e-7)
        assert row.p == pytest.approx(2 * stats.t.sf(abs(centre) / error, freedom), rel=1e-6)
        q = stats.t.ppf(0.975, freedom)
        assert (row.low, row.high) == pytest.approx(
            (math.exp(centre - q * error), math.exp(centre + q * error)), rel=1e-6
        )
        assert math.isnan(row.over_trainings)


def test_several_trainings_are_paired_in_order():
    x = images(20)
    a, b = [measured(Linear(s), x) for s in range(3)], [measured(Linear(10 + s), x) for s in range(3)]
    found = lm.compare(a, b)
    assert (found.over, found.trainings, found.images, len(found)) == ("trainings", 3, 20, 2)
    for name in ("rotation", "scale"):
        logs = [math.log(m.compute()[name] / n.compute()[name]) for m, n in zip(a, b, strict=True)]
        wanted = stats.ttest_1samp(logs, 0)
        low, high = wanted.confidence_interval()
        row = found[name]
        assert row.p == pytest.approx(wanted.pvalue, rel=1e-9)
        assert (row.low, row.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)
        assert row.over_trainings == row.standard_error == pytest.approx(stats.sem(logs))
        singles = [lm.compare(m, n)[name].over_images for m, n in zip(a, b, strict=True)]
        assert 0 < row.over_images <= sum(singles) / 3
        geometric = math.exp(sum(math.log(m.compute()[name]) for m in a) / 3)
        assert row.a == pytest.approx(geometric)
    assert "over 3 pairs of trainings" in str(found)
    assert "over the 20 images" in str(found)


def test_results_are_tables():
    x = images(20)
    a, b = measured(Linear(0), x), measured(Linear(1), x)
    found = lm.compare(a, b)
    assert [row.name for row in found] == ["rotation", "scale"]
    frame = found.to_frame()
    assert list(frame["name"]) == ["rotation", "scale"]
    assert {"a", "b", "ratio", "low", "high", "p", "p_holm", "verdict", "over_images", "over_trainings"} <= set(frame)
    assert "do not cover the spread between trainings" in " ".join(str(found).split())
    assert "Holm" in str(found)
    with pytest.raises(AttributeError):
        found.rows = ()
    with pytest.raises(AttributeError):
        found.rows[0].ratio = 1.0
    with pytest.raises(KeyError, match="must be one of"):
        found["shear"]
    other = lm.compare(b, a)
    assert other["scale"].ratio == pytest.approx(1 / found["scale"].ratio)
    assert other["scale"].p == pytest.approx(found["scale"].p)
    assert lm.compare(a, a)["scale"].p == 1
    assert lm.compare(a, a)["scale"].verdict == "undecided"


def test_verdicts_are_corrected():
    wanted = {"a is less", "a is more", "undecided"}
    a, b = pair(256, 40, 0, ratio=0.8)
    found = lm.compare(a, b)
    assert {row.verdict for row in found} <= wanted
    assert all((row.verdict == "a is less") == (row.p_holm <= 0.05) for row in found)
    assert lm.compare(b, a)["3"].verdict in {"a is more", "undecided"}
    # Under no difference the chance of any verdict in a family of ten is 5 %.
    a, b = pair(64, 3000, 5)
    p = [row.p for row in lm.compare(a, b)]
    families = [holm(p[start : start + 10]) for start in range(0, 3000, 10)]
    assert sum(min(family) < 0.05 for family in families) / 300 < 0.09


def test_holm_step_by_step():
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    corrected = holm([math.nan, 0.02, 0.03])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.04, 0.04])


def test_ends_of_what_is_around():
    assert around(0.0, 0.0, 5, 0.95) == (1, 1, 1, 1)
    assert around(1.0, 0.0, 5, 0.95)[3] == 0
    ratio, low, high, p = around(1.0, math.nan, 5, 0.95)
    assert ratio == math.exp(1)
    assert all(map(math.isnan, (low, high, p)))
    assert around(1.0, 1e6, 5, 0.95)[1:3] == (0, math.inf)
    assert math.isnan(over_trainings([1.0])[1])


class TestRefused:
    X = images(8)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda x: measured(Linear(1), x.flip(0)), "same images, got 8 images and as many others"),
            (lambda x: measured(Linear(1), x[:7]), "same images, got 8 images and 7 images"),
            (lambda x: measured(Linear(1), x * 2), "same images"),
            (lambda x: measured(Linear(1), x, [0] * 4 + [1] * 4), "same images, .* or the same in other groups"),
            (
                lambda x: measured(Linear(1), x, resampling=lm.PAPER),
                "same stencil, got bspline.* Measure both with the same",
            ),
            (lambda x: measured(Linear(1), x, output="probabilities"), "same option `output`"),
            (lambda x: measured(Linear(1), x, lee_output="probabilities"), "same option `lee_output`"),
            (lambda x: measured(nn.Flatten(), x[..., :12]), "same size of images"),
            (lambda x: measured(Linear(1), x, cls=lm.OrbitVariance), "same class"),
        ],
    )
    def test_what_differs(self, make, match):
        with pytest.raises(ValueError, match=f"`a` and `b` must have the {match}"):
            lm.compare(measured(Linear(0), self.X), make(self.X))

    def test_generators_and_units(self):
        one = measured(Linear(0), self.X)
        other = lm.LocalEquivarianceError(("scale", "rotation"))
        other.update(Linear(1), self.X)
        with pytest.raises(ValueError, match="same generators, got"):
            lm.compare(one, other)
        a, b = pair(8, 2, 0)
        with pytest.raises(ValueError, match="same units"):
            lm.compare(a, record({"x": torch.rand(8, 2), "y": torch.rand(8, 2)}, ["0", "1"], units=("pixel", "pixel")))
        with pytest.raises(ValueError, match="must be that of the records, got 'lee'"):
            lm.compare(a, b, "lee")
        with pytest.raises(ValueError, match=r"`measure` must be one of \['lee', 'relative', 'rms'\]"):
            lm.compare(one, one, "other")

    def test_what_may_differ(self):
        """How a model is called, what was said of its output, and callables, whose meaning no text tells."""
        one = measured(cnn(), self.X, function=lambda module, x: module(x))
        other = measured(cnn(), self.X, output_representation=lm.representations.Invariant(), seed=3, method="reverse")
        assert lm.compare(one, other)["rotation"].ratio == pytest.approx(1)
        one, other = (measured(cnn(), self.X, output=lambda y, k=k: y * k) for k in (1, 2))
        assert lm.compare(one, other)["rotation"].ratio == pytest.approx(1)

    def test_too_few_or_mixed(self):
        one = measured(Linear(0), self.X)
        with pytest.raises(
            ValueError, match=r"at least 2 pairs of trainings, got 1: a spread between trainings needs two"
        ):
            lm.compare([one], [one])
        with pytest.raises(ValueError, match="must hold as many trainings as `a`, got 1 and 2"):
            lm.compare([one, one], [one])
        with pytest.raises(TypeError, match="both single or both sequences"):
            lm.compare(one, [one])
        for bad in (3, [one, 3], "run", None):
            with pytest.raises(TypeError, match="`b` must be a metric of this library, a record"):
                lm.compare(one, bad)
        with pytest.raises(ValueError, match="`level` must be between"):
            lm.compare(one, one, level=5)

    def test_zero_and_nan_are_named(self):
        x = self.X
        one, zero = measured(Linear(0), x), measured(lambda v: v.flatten(1)[:, :4] * 0 + v.mean(), x)
        with pytest.warns(UserWarning, match=r"`ratio` or its error is NaN for \['rotation', 'scale'\]: a value is"):
            found = lm.compare(zero, one)
        assert found["scale"].verdict == "undefined"
        assert math.isnan(found["scale"].ratio)
        a, b = pair(8, 2, 0)
        x = torch.zeros(8, 2).double()
        nothing = record({"x": x.clone(), "y": x + 1}, ["0", "1"])
        x[3, 1] = 1.0  # without the fourth image it is zero
        with pytest.warns(UserWarning, match=r"NaN for \['0', '1'\]"):
            assert all(math.isnan(row.ratio) for row in lm.compare(nothing, b))
        with pytest.warns(UserWarning, match=r"NaN for \['0', '1'\]"):
            row = lm.compare(a, record({"x": x, "y": x + 1}, ["0", "1"]))["1"]
        assert row.ratio > 0
        assert row.verdict == "undefined"


def test_a_frame_needs_pandas(monkeypatch):
    found = lm.compare(*pair(8, 2, 0))
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lie_metric\[examples\]'"):
        found.to_frame()


def test_decibels_are_compared_as_mean_squares():
    x = images(10)
    smooth, rough = nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)
    both = []
    for model in (smooth, rough):
        metric = lm.BandLimitedEquivariance(1.0, ["eq_t_frac"])
        metric.update(model, x)
        both.append(metric)
    row = lm.compare(*both)["eq_t_frac"]
    db = [metric.compute()["eq_t_frac"].item() for metric in both]
    assert (row.a, row.b) == pytest.approx(db)
    assert row.ratio == pytest.approx(10 ** ((db[1] - db[0]) / 10))
    errors = [metric.sum_error.sum(1) / metric.sum_count.sum(1) for metric in both]
    assert errors[0].nansum() < errors[1].nansum()
    assert row.ratio < 1
    assert "decibels" in str(lm.compare(*both))
    low, high = both[0].interval()["eq_t_frac"]
    error = both[0].standard_error()["eq_t_frac"]
    assert (high - low).item() == pytest.approx(2 * stats.t.ppf(0.975, 9) * error.item())


def test_nothing_is_warned_of_without_cause():
    x = images(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The output of")
        lm.compare(measured(Linear(0), x), measured(Linear(1), x))


def test_standard_errors_in_words_are_one_for_each_row():
    rows = [
        Compared(name, 1.0, 2.0, 0.5, 0.4, 0.6, 0.001, 0.001, "a is less", error, math.nan)
        for name, error in (("scale", 0.1), ("shear_x", 0.2), ("rotation", 0.1))
    ]
    assert "over images 0.1, 0.2, 0.1." in Comparison(tuple(rows), "relative", 0.95, 1, 256).caption
    assert "over images 0.1." in Comparison((rows[0], rows[2]), "relative", 0.95, 1, 256).caption
