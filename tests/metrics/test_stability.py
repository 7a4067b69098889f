"""Relative stability against a loop over images and models with a known answer."""

import copy
import math
import pickle

import pytest
import torch
from cases import ImageToImage, cnn, images
from torch import nn

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.functional.stability import deformation
from lie_metric.resampling import displace

CPU = torch.device("cpu")


def smooth(count=64, size=32, cells=5):
    return nn.functional.interpolate(images(count, cells), size=size, mode="bicubic")


def test_against_a_loop_over_images():
    """Displacements summed mode by mode at each pixel, and the noise drawn anew."""
    model, x = cnn(), images(4)
    model.eval()
    steps = deformation((16, 16), range(4), 1 / 16, 3, 0, CPU) * 16
    source = torch.Generator().manual_seed(2)
    variance = {(i, j): 1 / (i * i + j * j) for i in (1, 2, 3) for j in (1, 2, 3) if i * i + j * j <= 9}
    scale = 2 / sum(variance.values())
    draws = torch.randn(2, len(variance), dtype=torch.float64, generator=source)
    for row, column in ((0, 0), (5, 9), (15, 3)):
        for k in range(2):
            wanted = sum(
                math.sqrt(scale * s) * draws[k, m]
                * math.sin(i * math.pi * (column + 0.5) / 16) * math.sin(j * math.pi * (row + 0.5) / 16)
                for m, ((i, j), s) in enumerate(variance.items())
            )  # fmt: skip
            assert steps[2, row, column, k].item() == pytest.approx(wanted.item(), rel=1e-10)
    deformed, noisy = 0.0, 0.0
    for n in range(4):
        moved = displace(x[n : n + 1], steps[n : n + 1], lm.Resampling())
        eta = torch.randn(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        eta *= (moved[0] - x[n]).norm() / eta.norm()
        deformed += (model(moved) - model(x[n : n + 1])).square().sum()
        noisy += (model((x[n] + eta)[None]) - model(x[n : n + 1])).square().sum()
    f = model(x)
    apart = 2 * len(f) * f.var(0).sum()
    found = F.relative_stability(model, x)
    for name, value in (
        ("relative_stability", deformed / noisy),
        ("deformation", deformed / apart),
        ("noise", noisy / apart),
    ):
        torch.testing.assert_close(found[name], value.detach())


@pytest.mark.parametrize("length", [0.5, 2.0])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_deformations_are_as_long_as_asked_and_fixed_on_the_frame(length, size):
    steps = deformation(size, range(2000), length / min(size), 4, 0, CPU) * min(size)
    assert steps.square().sum(-1).mean().sqrt() == pytest.approx(length, rel=0.05)
    centre = steps[:, size[0] // 2, size[1] // 2].square().mean()
    assert steps[:, 0].square().mean() < 0.1 * centre
    assert abs(steps.mean()) < 0.05 * length


def test_known_answers():
    """Noise is white, deformations of smooth images are smooth: a blur lets one through, a Laplacian the other."""
    x = smooth()
    kernel = torch.ones(3, 1, 5, 5, dtype=torch.float64) / 25
    blurred = lambda v: nn.functional.conv2d(v, kernel, groups=3, padding=2).mean((2, 3))  # noqa: E731
    torch.manual_seed(0)
    weights = torch.randn(3 * 32 * 32, 5, dtype=torch.float64)
    linear = lambda v: v.flatten(1) @ weights  # noqa: E731
    found = {name: F.relative_stability(model, x) for name, model in {"white": linear, "pooled": blurred}.items()}
    assert found["white"]["relative_stability"] == pytest.approx(1, abs=0.3)
    edges = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=torch.float64).expand(3, 1, 3, 3)
    sharp = lambda v: nn.functional.conv2d(v, edges, groups=3).flatten(1)  # noqa: E731
    wide = lambda v: nn.functional.avg_pool2d(v, 8).flatten(1)  # noqa: E731
    assert F.relative_stability(sharp, x)["relative_stability"] < 0.5
    assert F.relative_stability(wide, x)["relative_stability"] > 2
    assert F.relative_stability(lambda v: v.sin(), x)["relative_stability"] < 0.01


def test_class_is_function_whatever_the_batches():
    for model in (cnn(), ImageToImage().double()):
        x = images(6)
        metric, split = lm.RelativeStability(), lm.RelativeStability()
        metric.update(model, x)
        split.update(model, x[:4])
        split.update(model, x[4:])
        wanted = F.relative_stability(model, x)
        for name in metric.names:
            torch.testing.assert_close(metric.compute()[name], wanted[name])
            torch.testing.assert_close(split.compute()[name], wanted[name])
            assert metric.standard_error()[name] > 0
        assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
        clone = copy.deepcopy(metric)
        clone.reset()
        assert all(value.isfinite() for value in clone(model, x).values())


@pytest.mark.parametrize(
    "options",
    [{"displacement": 2.0}, {"cut": 4}, {"seed": 1}, {"resampling": lm.PAPER}, {"output": "probabilities"}],
    ids=str,
)
def test_options_are_passed_on(options):
    model, x = cnn(), images(4)
    metric = lm.RelativeStability(**options)
    metric.update(model, x)
    found = F.relative_stability(model, x, **options)
    assert metric.compute() == found
    assert found["relative_stability"] != F.relative_stability(model, x)["relative_stability"]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: lm.RelativeStability(0.0), ValueError, "`displacement` must be a positive number"),
        (lambda: lm.RelativeStability(cut=1), ValueError, "`cut` must be an integer of at least 2"),
        (lambda: lm.RelativeStability(seed=-1), ValueError, "`seed` must be a non-negative integer"),
        (lambda: F.relative_stability(cnn(), images(), sede=1), TypeError, "`options` must be among"),
        (lambda: F.relative_stability(lambda x: x.mean(0)[None], images()), ValueError, "`output` must have one entry"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_constant_model_is_nan_with_a_reason():
    with pytest.warns(UserWarning, match="`relative_stability` is NaN for .* the output does not vary"):
        found = F.relative_stability(lambda x: x.new_ones(len(x), 2), images())
    assert all(value.isnan() for value in found.values())


@pytest.mark.parametrize("size", [(12, 20), (20, 12)])
def test_images_that_are_not_square(size):
    """Pixels are counted along the shorter side, of the images and of the smaller grid of the output alike."""
    x = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Conv2d(3, 4, 2, 2).double()
    steps = deformation(size, range(3), 1.5 / 12, 3, 0, CPU)
    moved = displace(x, steps * 12, lm.Resampling())
    half = deformation((size[0] // 2, size[1] // 2), range(3), 1.5 / 12, 3, 0, CPU)
    f = model(x).detach()
    wanted = (model(moved) - displace(f, half * 6, lm.Resampling())).square().sum()
    apart = 2 * (f - f.mean((0, 2, 3), keepdim=True)).square().sum() * 3 / 2
    declared = lm.representations.Image()
    found = F.relative_stability(model, x, displacement=1.5, output_representation=declared)["deformation"]
    torch.testing.assert_close(found, (wanted / apart).detach())
