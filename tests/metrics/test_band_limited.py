"""EQ-T, EQ-T_frac and EQ-R against loops in NumPy, analytic waves, and planted violations."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import ImageToImage, TokensOut, cnn
from scipy import ndimage
from torch import nn

import lie_metric as lm
from lie_metric import filters
from lie_metric import functional as F
from lie_metric.functional.band_limited import _draw

FUNCTIONS = {"eq_t": F.eq_t, "eq_t_frac": F.eq_t_frac, "eq_r": F.eq_r}


def smooth(count=4, size=32, cells=8, channels=3, seed=0):
    cells = torch.rand(
        count, channels, cells, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return nn.functional.interpolate(cells, size=size, mode="bicubic")


def wave(size, frequency, angle, phase=0.3):
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    x, y = axis.expand(size, size), axis[:, None].expand(size, size)
    return torch.cos(2 * math.pi * frequency * (math.cos(angle) * x + math.sin(angle) * y) + phase)


def blur():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1)).double()


def test_eq_t_against_a_loop_over_images():
    """Slices of NumPy arrays: what of both images overlaps after a shift by whole pixels."""
    model, x = blur(), smooth()
    f, total, count = model(x).detach().numpy(), 0.0, 0
    for n in range(4):
        dx, dy = (int(step) for step in (_draw(n, 0)[:2] * 0.125 * 32).round())
        moved = np.zeros((3, 32, 32))
        for i in range(32):
            for j in range(32):
                if 0 <= i + dy < 32 and 0 <= j + dx < 32:
                    moved[:, i, j] = x[n, :, i + dy, j + dx]
        y = model(torch.tensor(moved)[None])[0].detach().numpy()
        for i in range(32):
            for j in range(32):
                if 0 <= i + dy < 32 and 0 <= j + dx < 32:
                    total += ((y[:, i, j] - f[n, :, i + dy, j + dx]) ** 2).sum()
                    count += 4
    wanted = 10 * math.log10(2.0**2 / (total / count))
    assert F.eq_t(model, x, data_range=2.0).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", ["eq_t", "eq_t_frac"])
def test_classifiers_have_the_mean_square(kind):
    model, x = cnn(), smooth(size=16)
    model.eval()
    steps = torch.stack([_draw(n, 0)[:2] for n in range(4)]) * 2
    moved, _ = filters.shift(x, steps.round().long()) if kind == "eq_t" else filters.translate(x, steps)
    wanted = (model(moved) - model(x)).square().mean()
    torch.testing.assert_close(FUNCTIONS[kind](model, x), wanted.detach())


@pytest.mark.parametrize("frequency", [0.05, 0.15, 0.25])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_filters_against_analytic_waves(frequency, angle):
    """Relative to the amplitude of 1, over the pixels whose filters lie in the frame; each kernel ripples by 2 %."""
    image = wave(48, frequency, angle)[None, None]
    axis = torch.arange(48, dtype=torch.float64) - 23.5
    x, y = axis.expand(48, 48), axis[:, None].expand(48, 48)

    def at(x, y):
        return torch.cos(2 * math.pi * frequency * (math.cos(angle) * x + math.sin(angle) * y) + 0.3)

    moved, inside = filters.translate(image, torch.tensor([[0.37, -1.81]]))
    assert inside.float().mean() > 0.7
    assert (moved[0, 0] - at(x + 0.37, y - 1.81))[inside[0]].abs().max() < 0.03
    turn = torch.tensor([0.6], dtype=torch.float64)
    turned, inside = filters.rotate(image, turn)
    c, s = math.cos(0.6), math.sin(0.6)
    assert inside.sum() > 900
    assert (turned[0, 0] - at(c * x + s * y, c * y - s * x))[inside[0]].abs().max() < 0.05
    same, inside = filters.low_pass(image, turn)
    assert (same[0, 0] - image[0, 0])[inside[0]].abs().max() < 0.05


def test_what_the_turned_lattice_cannot_carry_is_taken_away():
    """A diagonal wave beyond half a cycle per pixel along the axes of the turned lattice."""
    image = wave(64, 0.62, math.pi / 4)[None, None]
    turned, inside = filters.rotate(image, torch.tensor([math.pi / 4], dtype=torch.float64))
    assert turned[0, 0][inside[0]].abs().max() < 0.1
    kept, inside = filters.low_pass(image, torch.tensor([math.pi / 4], dtype=torch.float64))
    assert kept[0, 0][inside[0]].abs().max() < 0.1
    whole, inside = filters.low_pass(image, torch.tensor([0.0], dtype=torch.float64))
    assert whole[0, 0][inside[0]].abs().max() > 0.25


def test_rotation_turns_as_the_transforms_do_and_as_scipy():
    image = smooth(1, 48, 6, 1)
    turned, inside = filters.rotate(image, torch.tensor([0.4], dtype=torch.float64))
    other = lm.transforms.rotate(image, 0.4)
    assert (turned - other)[inside[:, None]].abs().max() < 0.01
    by_scipy = ndimage.rotate(image[0, 0].numpy(), -math.degrees(0.4), reshape=False, order=5)
    assert np.abs(turned[0, 0].numpy() - by_scipy)[inside[0].numpy()].max() < 0.01


def test_equivariant_models_score_high_and_violations_low():
    x, ramp = smooth(channels=1), torch.linspace(0, 1, 32, dtype=torch.float64)
    identity, placed = lambda v: 1.0 * v, lambda v: v * ramp
    assert F.eq_t(identity, x, data_range=1.0) == math.inf
    assert F.eq_t_frac(identity, x, data_range=1.0) > 200
    assert F.eq_r(identity, x, data_range=1.0) > 50
    for function in FUNCTIONS.values():
        assert function(placed, x, data_range=1.0) < 30
    sharp = lambda v: (v > 0.5).double()  # noqa: E731
    assert F.eq_t(sharp, x, data_range=1.0) == math.inf
    assert F.eq_t_frac(sharp, x, data_range=1.0) < 30


def test_stretched_outputs_move_by_as_much_of_their_width():
    up, down = nn.Upsample(scale_factor=2), nn.AvgPool2d(2)
    x = smooth(6)
    for model in (up, down):
        assert F.eq_t(model, x, data_range=1.0) == math.inf
    net, tokens = ImageToImage().double(), TokensOut().double()  # 16 → 12 pixels; 4 × 4 tokens behind one
    assert F.eq_t(net, smooth(4, 16), data_range=1.0, max_shift=0.3).isfinite()
    assert F.eq_t(tokens, smooth(4, 16), data_range=1.0, max_shift=0.3).isfinite()


def test_class_is_function_whatever_the_batches():
    model, x = blur(), smooth(6)
    metric, split = (lm.BandLimitedEquivariance(data_range=2.0) for _ in range(2))
    metric.update(model, x)
    split.update(model, x[:4])
    assert all(value.isfinite() for value in split(model, x[4:]).values())
    for kind, function in FUNCTIONS.items():
        assert metric.compute()[kind] == function(model, x, data_range=2.0)
        assert split.compute()[kind] == pytest.approx(metric.compute()[kind].item(), rel=1e-9)
        assert metric.standard_error()[kind] > 0
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    clone = copy.deepcopy(metric)
    clone.reset()
    clone.update(model, x)
    assert clone.compute() == metric.compute()
    # Twice the range is 6.02 dB more.
    assert F.eq_t(model, x, data_range=4.0) - metric.compute()["eq_t"] == pytest.approx(20 * math.log10(2))
    assert F.eq_t(model, x, data_range=2.0, seed=1) != metric.compute()["eq_t"]
    assert F.eq_t(model, x, data_range=2.0, max_shift=0.4) != metric.compute()["eq_t"]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: F.eq_t(blur(), smooth()), ValueError, "`data_range` must be given"),
        (lambda: F.eq_t(cnn(), smooth(size=16), data_range=1.0), ValueError, "`data_range` must be None"),
        (lambda: lm.BandLimitedEquivariance(data_range=0.0), ValueError, "`data_range` must be a positive number"),
        (lambda: lm.BandLimitedEquivariance(kinds="eq_t"), ValueError, "`kinds` must be a sequence of some of"),
        (lambda: lm.BandLimitedEquivariance(max_shift=0.9), ValueError, r"`max_shift` must be in \(0, 0.5\]"),
        (lambda: lm.BandLimitedEquivariance(seed=-1), ValueError, "`seed` must be a non-negative integer"),
        (lambda: F.eq_t(blur(), smooth(), sede=1), TypeError, "`options` must be among"),
        (lambda: F.eq_t(lambda x: x.mean(0)[None], smooth()), ValueError, "`output` must have one entry"),
        (
            lambda: F.eq_t(
                nn.AvgPool2d(16), smooth(), data_range=1.0, output_representation=lm.representations.Image()
            ),
            ValueError,
            "`max_shift` must allow for shifts that move the output of 2×2 by whole pixels too",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_images_smaller_than_the_filters_are_nan_with_a_reason():
    with pytest.warns(UserWarning, match=r"\['eq_r'\] are NaN: no pixel has all of its filter within the frame"):
        assert F.eq_r(lambda x: x, smooth(2, 12), data_range=1.0).isnan()


@pytest.mark.parametrize("shape", [(32, 32), (28, 36)])
def test_eq_r_compares_what_was_low_passed(shape):
    """White noise has most of its content where the turned lattice carries none; its low-pass takes it away."""
    x = torch.randn(3, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = blur()
    angles = torch.stack([_draw(n, 0)[2] for n in range(3)]) * math.pi
    moved, _ = filters.rotate(x, angles)
    (found, one), (wanted, other) = filters.low_pass(model(moved), angles), filters.rotate(model(x), angles)
    both = (one * other)[:, None].expand_as(found)
    error = (found - wanted)[both].square().mean()
    plain = (model(moved) - wanted)[both].square().mean()
    assert plain > 1.05 * error
    torch.testing.assert_close(F.eq_r(model, x, data_range=2.0), 10 * (4 / error).log10().detach())
