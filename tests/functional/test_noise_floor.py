"""The noise floor: against the measure itself on the controls, analytic slopes, and what it must not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import spectrum

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.functional.noise_floor import _controls

STENCILS = [
    lm.Resampling(),
    lm.PAPER,
    lm.Resampling("cubic", "circular"),
    lm.Resampling("bspline", "border"),
    lm.Resampling("bspline", "zeros"),
    lm.Resampling("fourier"),
    lm.Resampling("fourier", "reflection", align_corners=True),
]


def photos(n=24, height=16, width=20, highest=0.3, seed=0):
    """Random content up to a frequency in cycles per pixel, continued by reflection."""
    drawn = torch.randn(n, 2, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y, x = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    low_y, low_x = (int(2 * highest * size) for size in (height, width))
    along_y = (math.pi * (y[:, None] + 0.5) * torch.arange(low_y) / height).cos()
    along_x = (math.pi * (x[:, None] + 0.5) * torch.arange(low_x) / width).cos()
    return along_y @ drawn[..., :low_y, :low_x] @ along_x.mT


@pytest.mark.parametrize("stencil", STENCILS, ids=str)
class TestEveryStencil:
    def test_square_is_what_the_measure_reports_on_an_equivariant_function(self, stencil):
        x, *_ = _controls(photos(), stencil, 8, 1)
        floor = F.noise_floor(photos(), "affine", resampling=stencil, count=8, seed=1)
        found = F.relative(
            torch.square, x, "affine", resampling=stencil, output_representation=lm.representations.Image()
        )
        torch.testing.assert_close(floor, found, rtol=1e-9, atol=1e-12)

    def test_identity_is_the_error_of_the_tangents(self, stencil):
        x, true_x, true_y = _controls(photos(), stencil, 8, 1)
        unit = (min(x.shape[-2:]) - stencil.align_corners) / 2
        floor = F.noise_floor(photos(), "translation", "identity", resampling=stencil, count=8, seed=1)
        tangents = lm.transforms.tangents(x, lm.generators("translation"), stencil)
        for name, found, true in zip(floor, tangents, (true_x, true_y), strict=True):
            wanted = ((found - unit * true).square().sum() / (x - x.mean()).square().sum() * 7 / 8).sqrt()
            assert floor[name].item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)

    def test_slopes_of_the_controls_are_derivatives(self, stencil):
        """Fourier interpolation of the continued image knows them, but for the edges of what is not periodic."""
        period = "circular" if stencil.padding == "circular" else "reflection"
        exact = lm.Resampling("fourier", period, stencil.align_corners)
        x, *true = _controls(photos(), stencil, 4, 0)
        for found, wanted in zip(lm.resampling.slopes(x, exact), true, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


@pytest.mark.parametrize("interpolation", ["bilinear", "cubic", "bspline", "fourier"])
def test_mean_square_under_circular_translation_is_zero(interpolation):
    """Summation by parts: an antisymmetric slope leaves nothing, a one-sided one does."""
    stencil = lm.Resampling(interpolation, "circular")
    floor = F.noise_floor(photos(), "translation", "mean_square", resampling=stencil, count=8)
    x, *_ = _controls(photos(), stencil, 8, 0)
    found = F.relative(lambda v: v.square().mean((1, 2, 3)), x, "translation", resampling=stencil)
    torch.testing.assert_close(floor, found, rtol=1e-9, atol=1e-12)
    for value in floor.values():
        assert (value > 0.1) if interpolation == "bilinear" else (value < 1e-12)


def test_the_band_of_the_images_decides():
    """The floor of smooth content is lower; Fourier is exact on squares as long as they do not alias."""
    for control in ("square", "identity", "mean_square"):
        floors = {
            (name, highest): F.noise_floor(
                photos(highest=highest), "rotation", control, resampling=lm.Resampling(name, "reflection")
            )["rotation"]
            for name in ("bilinear", "cubic", "bspline")
            for highest in (0.1, 0.4)
        }
        assert all(floors[name, 0.1] < floors[name, 0.4] / 2 for name in ("bilinear", "cubic", "bspline"))
        assert floors["bspline", 0.1] < floors["cubic", 0.1] < floors["bilinear", 0.1]
    fourier = lm.Resampling("fourier", "reflection")
    assert F.noise_floor(photos(highest=0.2), "rotation", resampling=fourier)["rotation"] < 1e-11
    assert F.noise_floor(photos(highest=0.4), "rotation", resampling=fourier)["rotation"] > 0.1


@pytest.mark.parametrize("interpolation", ["bilinear", "cubic", "bspline"])
def test_identity_is_the_error_on_the_images_themselves(interpolation):
    """Controls stand for images: plane waves whose slopes are known, measured directly."""
    stencil = lm.Resampling(interpolation, "circular")
    pairs = [spectrum(32, 0.4, seed) for seed in range(30)]
    images, slopes = (torch.stack(part)[:, None] for part in zip(*pairs, strict=True))
    error = lm.transforms.tangents(images, lm.generators("translation_x"), stencil)[0] - 16 * slopes
    wanted = (error.square().sum() / images.square().sum()).sqrt()
    found = F.noise_floor(images, "translation_x", "identity", resampling=stencil, count=256)["translation_x"]
    assert found.item() == pytest.approx(wanted.item(), rel=0.1)


@pytest.mark.parametrize("stencil", [lm.Resampling(), lm.Resampling("fourier"), lm.PAPER], ids=str)
def test_controls_have_the_spectrum_of_the_images(stencil):
    images = photos(200, 7, 9)
    x, *_ = _controls(images, stencil, 4000, 0)
    images = images - images.mean((-2, -1), keepdim=True)
    # The mean square of differences at a distance is the spectrum in other words; circular shifts wrap around.
    for dy, dx in ((0, 1), (0, 3), (2, 0), (1, 2)):
        inside = (...,) if stencil.padding == "circular" else (..., slice(dy, None), slice(dx, None))
        controls, given = ((v - v.roll((dy, dx), (-2, -1)))[inside].square().mean().item() for v in (x, images))
        assert controls == pytest.approx(given, rel=0.1)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_contrast_and_brightness_of_the_images_do_not_matter(contrast, brightness):
    plain = F.noise_floor(photos(4), "affine", count=4)
    other = F.noise_floor(contrast * (photos(4) + brightness), "affine", count=4)
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=0)


def test_dtypes_shapes_and_what_is_exact():
    double = F.noise_floor(photos(), ("affine", "saturation"))
    assert list(double)[-1] == "saturation"
    assert double["saturation"] == 0
    assert all(value.ndim == 0 and value.dtype == torch.float64 for value in double.values())
    single = F.noise_floor(photos().float(), ("affine", "saturation"))
    torch.testing.assert_close(single, double, rtol=1e-5, atol=0)
    line = F.noise_floor(photos(height=16)[..., :1, :], "translation_x", "identity")
    assert 0 < line["translation_x"] < 1


def test_every_option_matters():
    plain = F.noise_floor(photos(), "rotation")["rotation"]
    for options in ({"seed": 1}, {"count": 32}, {"control": "identity"}, {"resampling": lm.PAPER}):
        assert F.noise_floor(photos(), "rotation", **options)["rotation"] != plain


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    F.noise_floor(photos(), "rotation")
    assert torch.equal(before, torch.get_rng_state())


def test_below_floor():
    marks = F.below_floor(
        {"a": torch.tensor(0.25), "b": 0.5, "c": math.nan}, {"a": 0.25, "b": torch.tensor(0.1), "c": 1}
    )
    assert marks == {"a": True, "b": False, "c": False}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"images": [1]}, TypeError, "`images` must be a tensor, got list"),
        ({"images": photos().int()}, TypeError, "`images` must have a floating-point dtype"),
        ({"images": photos()[0, 0]}, ValueError, "`images` must be a non-empty image"),
        ({"images": photos() * math.nan}, ValueError, "`images` must be finite"),
        ({"images": torch.full((2, 3, 8, 8), 0.3)}, ValueError, "`images` must vary over positions"),
        ({"generators": "turn"}, ValueError, "got 'turn'"),
        ({"control": "cube"}, ValueError, "`control` must be one of .* got 'cube'"),
        ({"resampling": "bspline"}, TypeError, "`resampling` must be a `Resampling`"),
        ({"count": 1}, ValueError, "`count` must be an integer of at least 2, got 1"),
        ({"count": 2.5}, ValueError, "`count` must be an integer"),
        ({"seed": -1}, ValueError, "`seed` must be a non-negative integer"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        F.noise_floor(**({"images": photos()} | arguments))
