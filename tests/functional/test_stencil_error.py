"""The stencil's own error on a model: the difference of two stencils, and the truth where it is known."""

import math
import warnings

import pytest
import torch
from cases import images
from torch import nn

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.functional.stencil_error import other_stencil


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)).double()


@pytest.mark.parametrize(
    "stencil", [lm.Resampling(), lm.PAPER, lm.Resampling("fourier"), lm.Resampling("cubic", "zeros")], ids=str
)
def test_it_is_the_difference_of_two_lie_derivatives(stencil):
    model, x = net(), images(5)
    model(x)
    found = F.stencil_error(model, x, ("rotation", "scale", "shear_x"), resampling=stencil)
    with torch.no_grad():
        one, other = (
            lm.lie_derivative(model, x, ("rotation", "scale", "shear_x"), resampling=each)
            for each in (stencil, other_stencil(stencil))
        )
        spread = 5 * model(x).var(0).sum()
    for name, value in found.items():
        wanted = ((one[name] - other[name]).square().sum() / spread).sqrt()
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-12)


def test_an_image_moves_along_with_its_own_stencil():
    """Of a scaled identity what the stencils disagree about in the input they disagree about in the output."""
    x, grid = images(4), {"output_representation": lm.representations.Image()}
    found = F.stencil_error(lambda v: 2 * v, x, "affine", **grid)
    assert all(value < 1e-12 for value in found.values())
    assert all(value > 1e-3 for value in F.stencil_error(torch.square, x, "affine", **grid).values())


@pytest.mark.parametrize("interpolation", ["bspline", "cubic", "bilinear"])
def test_it_is_the_error_where_the_truth_is_known(interpolation):
    """Sums of plane waves up to 0.45 cycles per pixel have a known derivative, which the other stencil finds."""
    size, count = 32, 24
    source = torch.Generator().manual_seed(0)
    place = torch.arange(size, dtype=torch.float64)
    x, true = torch.zeros(count, 1, size, size).double(), torch.zeros(count, 1, size, size).double()
    for _ in range(120):
        k = torch.randint(-14, 15, (2,), generator=source).double() * 2 * math.pi / size
        if not k.any():
            continue
        a, phase = torch.randn(count, generator=source).double() / k.norm(), torch.rand(count, generator=source) * 7
        angle = (k[0] * place)[None, None, :] + (k[1] * place)[None, :, None] + phase[:, None, None].double()
        x += (a[:, None, None] * angle.cos())[:, None]
        true -= (a[:, None, None] * k[0] * angle.sin())[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(8192, 6)
    )
    model = model.double().requires_grad_(False)
    stencil = lm.Resampling(interpolation, "circular")
    estimate = F.stencil_error(model, x, "translation_x", resampling=stencil)["translation_x"]
    exact = torch.func.jvp(model, (x,), (size / 2 * true,))[1]
    with torch.no_grad():
        off = lm.lie_derivative(model, x, "translation_x", resampling=stencil)["translation_x"] - exact
        truth = (off.square().sum() / (count * model(x).var(0).sum())).sqrt()
    assert truth > 0.05
    torch.testing.assert_close(estimate, truth, rtol=1e-6, atol=0)


def test_metric_and_function_agree():
    model, x = net(), images(6)
    model(x)
    metric = lm.StencilError("affine")
    metric.update(model, x[:4])
    metric.update(model, x[4:])
    torch.testing.assert_close(metric.compute(), F.stencil_error(model, x, "affine"))
    assert all(error > 0 for error in metric.standard_error().values())
    assert all(metric.record().units)


def test_a_trusted_method_is_used_without_a_check():
    x, calls = images(4), []

    def model(v):
        calls.append(1)
        return v.mean((2, 3))

    metric = lm.StencilError("rotation", output_representation=lm.representations.Invariant())
    metric.trust("forward")
    metric.update(model, x)
    assert len(calls) == 1


class TestRoughStencils:
    """Stencils that are right for smooth images alone say so, with what they are off by."""

    @staticmethod
    def told(images, resampling, times=1):
        metric = lm.LocalEquivarianceError(("translation_x", "rotation"), resampling=resampling)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                metric.update(lambda x: x.mean((2, 3)), images)
        return [str(one.message) for one in caught if "is far from" in str(one.message)]

    @staticmethod
    def images(rough):
        source = torch.Generator().manual_seed(0)
        drawn = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=source)
        frequency = torch.fft.fftfreq(32).square()
        kept = (frequency[:, None] + frequency).sqrt() < (0.5 if rough else 0.1)
        return torch.fft.ifft2(torch.fft.fft2(drawn) * kept).real

    def test_the_papers_stencil_on_rough_images(self):
        (told,) = self.told(self.images(rough=True), lm.PAPER, times=3)  # once
        given = lm.transforms.tangents(self.images(rough=True), lm.generators("translation_x"), lm.PAPER)
        wanted = lm.transforms.tangents(self.images(rough=True), lm.generators("translation_x"), lm.Resampling())
        assert f"translation_x {((given - wanted).norm() / wanted.norm()).item():.2g}" in told
        assert "the paper's" in told

    def test_waves_that_go_on_at_the_opposite_border(self):
        ramp = torch.arange(32.0, dtype=torch.float64).expand(2, 1, 32, 32)
        assert len(self.told(ramp, lm.Resampling("fourier", "circular"))) == 1
        assert not self.told(self.images(rough=False), lm.Resampling("fourier", "circular"))

    def test_smooth_images_and_other_stencils(self):
        assert not self.told(self.images(rough=False), lm.PAPER)
        for stencil in (lm.Resampling(), lm.Resampling("cubic"), lm.Resampling("fourier", "reflection")):
            assert not self.told(self.images(rough=True), stencil)
