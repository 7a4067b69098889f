"""The grid-sample op against torch, SciPy and analytic derivatives, to every order and in every mode."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from references import spectrum

import lie_metric as lm
from lie_metric.resampling import displace, grid_sample, slopes

PADDINGS = ("reflection", "border", "zeros", "circular")
ALL = [
    *(
        lm.Resampling(i, p, a)
        for i, p, a in itertools.product(("bspline", "cubic", "bilinear"), PADDINGS, (False, True))
    ),
    *(lm.Resampling("fourier", p, a) for p, a in itertools.product(("circular", "reflection"), (False, True))),
]
IMAGE = torch.randn(2, 3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GRID = torch.rand(2, 7, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5 - 2.5


def pixels(grid, align):
    size = torch.tensor([12, 9])
    return (grid + 1) * (size - 1) / 2 if align else ((grid + 1) * size - 1) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("resampling", ALL, ids=str)
def test_zero_displacement_returns_the_image_bit_for_bit(resampling, dtype):
    image = IMAGE.to(dtype)
    result = displace(image, torch.zeros(1, 9, 12, 2, dtype=torch.float64), resampling)
    assert result.dtype == dtype
    assert torch.equal(result, image)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("padding", ["reflection", "border", "zeros"])
def test_bilinear_is_that_of_torch(padding, align):
    found = grid_sample(IMAGE, GRID, lm.Resampling("bilinear", padding, align))
    wanted = F.grid_sample(IMAGE, GRID, padding_mode=padding, align_corners=align)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("padding", "align", "mode"),
    [("reflection", True, "mirror"), ("reflection", False, "reflect"), ("circular", False, "grid-wrap")],
)
def test_bspline_is_that_of_scipy(padding, align, mode):
    ndimage = pytest.importorskip("scipy.ndimage")
    found = grid_sample(IMAGE, GRID, lm.Resampling("bspline", padding, align))
    where = pixels(GRID, align)
    for n, c in itertools.product(range(2), range(3)):
        points = [where[n, ..., 1].numpy(), where[n, ..., 0].numpy()]
        wanted = ndimage.map_coordinates(IMAGE[n, c].numpy(), points, order=3, mode=mode)
        # SciPy starts its recursion for "reflect" approximately, to some 1e-11.
        torch.testing.assert_close(found[n, c], torch.from_numpy(wanted), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("padding", "mode"), [("border", "replicate"), ("zeros", "constant"), ("circular", "circular")]
)
@pytest.mark.parametrize("interpolation", ["bspline", "cubic", "bilinear"])
def test_padding_is_that_of_an_image_extended_by_hand(interpolation, padding, mode):
    inside = F.pad(IMAGE, (12, 12, 9, 9), mode=mode)
    wide = F.pad(inside, (36, 36, 27, 27), mode=mode) if mode != "circular" else inside
    margin = torch.tensor([48, 36] if mode != "circular" else [12, 9])
    x, y = (pixels(GRID, False) + margin).unbind(-1)
    size = torch.tensor([wide.shape[-1], wide.shape[-2]])
    grid = (torch.stack([x, y], -1) * 2 + 1) / size - 1
    other = "circular" if mode == "circular" else "border"
    found = grid_sample(IMAGE, GRID, lm.Resampling(interpolation, padding))
    wanted = grid_sample(wide, grid, lm.Resampling(interpolation, other))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_keys_kernel_by_its_formula():
    """Keys (1981), Eq. 4 with a = -1/2, one axis."""
    row = IMAGE[0, 0, 0]
    u = 0.3
    weights = torch.tensor(
        [
            -0.5 * u + u**2 - 0.5 * u**3,
            1 - 2.5 * u**2 + 1.5 * u**3,
            0.5 * u + 2 * u**2 - 1.5 * u**3,
            -0.5 * u**2 + 0.5 * u**3,
        ],
        dtype=torch.float64,
    )
    step = torch.zeros(1, 1, 12, 2, dtype=torch.float64)
    step[..., 0] = u
    found = displace(row[None, None, None], step, lm.Resampling("cubic", "circular"))[0, 0, 0]
    wanted = sum(w * row.roll(1 - k) for k, w in enumerate(weights))
    torch.testing.assert_close(found, wanted)


def test_fourier_moves_waves_exactly():
    x = torch.arange(12, dtype=torch.float64)

    def wave(p):
        return torch.sin(2 * torch.pi * 3 * p / 12 + 0.3) + torch.cos(2 * torch.pi * 5 * p / 12)

    step = torch.zeros(1, 4, 12, 2, dtype=torch.float64)
    step[..., 0] = 0.37
    found = displace(wave(x).expand(1, 1, 4, 12), step, lm.Resampling("fourier"))
    torch.testing.assert_close(found[0, 0, 0], wave(x + 0.37), rtol=0, atol=1e-13)


@pytest.mark.parametrize("resampling", ALL, ids=str)
def test_slopes_are_the_derivative_of_the_finite_op(resampling):
    zero = torch.zeros(1, 9, 12, 2, dtype=torch.float64)
    for axis, slope in enumerate(slopes(IMAGE, resampling)):
        direction = torch.zeros_like(zero)
        direction[..., axis] = 1
        _, moved = torch.func.jvp(lambda d: displace(IMAGE, d, resampling), (zero,), (direction,))
        torch.testing.assert_close(slope, moved, rtol=1e-11, atol=1e-12)


def test_bilinear_slope_is_taken_on_the_floor_side():
    row = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64).expand(1, 1, 4, 4)
    assert slopes(row, lm.PAPER)[0][0, 0, 0].tolist() == [3, 5, 7, -7]  # reflected about the last pixel's centre
    assert slopes(row, lm.Resampling("bilinear"))[0][0, 0, 0].tolist() == [3, 5, 7, 0]  # about its edge


@pytest.mark.parametrize("size", [8, 16, 64, 65, 224])
def test_no_rounding_flips_the_side(size):
    """At every size, in float32, all columns take the same side."""
    ramp = (torch.arange(size, dtype=torch.float32) ** 2).expand(1, 1, 3, size)
    slope = slopes(ramp, lm.PAPER)[0][0, 0, 0, :-1]
    assert torch.equal(slope, ramp[0, 0, 0].diff())
    turned = torch.func.jvp(
        lambda t: lm.transforms.apply(ramp, "translation_x", t, lm.Resampling("bilinear")),
        (torch.tensor(0.0),),
        (torch.tensor(1.0),),
    )[1][0, 0, 0, :-1]
    torch.testing.assert_close(turned, 1.5 * ramp[0, 0, 0].diff())


@pytest.mark.parametrize(
    "resampling",
    [
        lm.Resampling(),
        lm.Resampling("cubic", "zeros"),
        lm.Resampling("bilinear", "border", True),
        lm.Resampling("fourier"),
    ],
    ids=str,
)
def test_derivatives_of_every_order_and_mode(resampling):
    image = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    # Away from the kinks of the bilinear stencil.
    step = (
        torch.rand(2, 3, 4, 2, dtype=torch.float64) * 0.8 + 0.1 + torch.randint(-3, 3, (2, 3, 4, 2))
    ).requires_grad_()

    def function(a, b):
        return displace(a, b, resampling)[..., ::2, ::2]

    torch.autograd.gradcheck(
        function, (image, step), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    # One image is enough here: that none sees another shows in the first derivatives.
    one = tuple(value[:1].detach().requires_grad_() for value in (image, step))
    torch.autograd.gradgradcheck(function, one, check_fwd_over_rev=True)


def test_the_fraction_of_a_pixel_is_as_exact_far_from_the_corner():
    """In float32 the position 4000.3 has lost three digits of its fraction."""
    row = torch.rand(1, 1, 1, 4096)
    step = torch.zeros(1, 1, 4096, 2, dtype=torch.float64)
    step[..., 0] = 0.3
    exact = displace(row.double(), step, lm.Resampling("bilinear"))
    error = (displace(row, step, lm.Resampling("bilinear")) - exact).abs().flatten()
    assert error[3000:].max() < 2e-7


SYMBOLS = {  # what the slope makes of a wave exp(iωp), where the derivative makes iω of it
    "bilinear": lambda w: (torch.cos(w) - 1, torch.sin(w)),
    "cubic": lambda w: (0 * w, torch.sin(w)),
    "bspline": lambda w: (0 * w, 3 * torch.sin(w) / (2 + torch.cos(w))),
    "fourier": lambda w: (0 * w, w),
}


@pytest.mark.parametrize("interpolation", SYMBOLS)
@pytest.mark.parametrize("axis", [0, 1])
def test_slope_of_a_wave_in_closed_form(interpolation, axis):
    """Every frequency below half a cycle per pixel, one a row; a torch bicubic (a = -3/4) would be off by half."""
    size = 24
    place = torch.arange(size, dtype=torch.float64)
    w = 2 * torch.pi / size * torch.arange(1, size // 2, dtype=torch.float64)[:, None]
    real, imaginary = SYMBOLS[interpolation](w)
    wave = torch.cos(w * place + 0.4)
    wanted = real * wave - imaginary * torch.sin(w * place + 0.4)
    image = wave if axis == 0 else wave.T
    found = slopes(image.contiguous(), lm.Resampling(interpolation, "circular"))
    if axis == 1:
        wanted = wanted.T
    torch.testing.assert_close(found[axis], wanted, rtol=0, atol=1e-12)


BOUNDS = {  # relative error of ∂x: broad band (1/f up to 0.4 cycles/pixel, 64 px), smooth (6 cycles an image, 224 px)
    "bilinear": ((0.55, 0.8), (0.03, 0.07)),
    "cubic": ((0.28, 0.42), (0.001, 0.004)),
    "bspline": ((0.06, 0.14), (0, 4e-4)),
    "fourier": ((0, 1e-12), (0, 1e-12)),
}


@pytest.mark.parametrize("interpolation", BOUNDS)
def test_error_of_the_slope_against_the_analytic_derivative(interpolation, record_property):
    """Which stencil measures which image how well: the error table of the README."""
    resampling = lm.Resampling(interpolation, "circular")
    for (size, highest), (low, high) in zip(((64, 0.4), (224, 6 / 224)), BOUNDS[interpolation], strict=True):
        errors = []
        for seed in range(4):
            image, wanted = spectrum(size, highest, seed)
            errors.append(((slopes(image, resampling)[0] - wanted).norm() / wanted.norm()).item())
        error = sum(errors) / len(errors)
        print(f"{interpolation}, {size} px: {error:.2g}")
        record_property(f"{size}px", error)
        assert low <= error <= high


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.Resampling("nearest"), ValueError, "`interpolation` must be one of"),
        (lambda: lm.Resampling(padding="mirror"), ValueError, "`padding` must be one of"),
        (lambda: lm.Resampling("fourier", "zeros"), ValueError, "must be periodic"),
        (lambda: lm.Resampling(align_corners=1), TypeError, "`align_corners` must be"),
        (lambda: grid_sample(IMAGE.long(), GRID), TypeError, "`image` must be a floating-point tensor"),
        (lambda: grid_sample(IMAGE[0], GRID), ValueError, r"`image` must have shape \(N, C, H, W\)"),
        (lambda: grid_sample(IMAGE, GRID[..., :1]), ValueError, "`grid` must have shape"),
        (lambda: grid_sample(IMAGE, GRID.expand(2, 7, 5, 2)[[0, 0, 0]]), ValueError, "`grid` must have shape"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("interpolation", ["bspline", "cubic", "bilinear"])
def test_nothing_of_a_small_step_is_lost_to_the_pixel_index(interpolation):
    """At pixel 4000, float32 positions are 2e-4 apart: coordinates are split into pixel and fraction in float64."""
    row = torch.sin(torch.arange(4096, dtype=torch.float64) / 3).expand(1, 1, 1, 4096)
    step = torch.full((1, 1, 4096, 2), 1e-5, dtype=torch.float64)
    step[..., 1] = 0
    resampling = lm.Resampling(interpolation, "circular")
    found = displace(row.float(), step, resampling).double() - row.float()
    wanted = 1e-5 * slopes(row, resampling)[0]
    # What is left is the rounding of the values themselves, 6e-8 of a change of 3e-6.
    assert (found - wanted).abs().max() < 2e-7


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("padding", ["circular", "reflection"])
def test_fourier_keeps_a_constant_and_passes_through_half_of_the_nyquist_wave(size, padding):
    """An even period has one wave of half a cycle per pixel, which only its cosine carries: cos(πu) between pixels."""
    resampling = lm.Resampling("fourier", padding)
    step = torch.zeros(1, 1, size, 2, dtype=torch.float64)
    step[..., 0] = 0.3
    ones = torch.ones(1, 1, 1, size, dtype=torch.float64)
    torch.testing.assert_close(displace(ones, step, resampling), ones, rtol=0, atol=1e-13)
    if size == 8 and padding == "circular":
        sign = (-1.0) ** torch.arange(size, dtype=torch.float64).expand(1, 1, 1, size)
        found = displace(sign, step, resampling)
        torch.testing.assert_close(found, sign * math.cos(0.3 * math.pi), rtol=0, atol=1e-12)
        assert slopes(sign, resampling)[0].abs().max() < 1e-13


@pytest.mark.parametrize("batch", [1, 2])
def test_grid_is_shared_or_one_for_each_image(batch):
    grid = GRID[:batch]
    for interpolation in ("bspline", "fourier"):
        resampling = lm.Resampling(interpolation)
        together = grid_sample(IMAGE, grid, resampling)
        alone = [grid_sample(IMAGE[n : n + 1], grid[min(n, batch - 1)][None], resampling) for n in range(2)]
        assert together.shape == (2, 3, 7, 5)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("resampling", ALL, ids=str)
def test_tiny_images_have_finite_values_and_slopes(resampling, shape):
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    moved = displace(image, torch.full((1, *shape, 2), 0.3, dtype=torch.float64), resampling)
    assert moved.isfinite().all()
    zero, one = torch.zeros(1, *shape, 2, dtype=torch.float64), torch.ones(1, *shape, 2, dtype=torch.float64)
    _, change = torch.func.jvp(lambda d: displace(image, d, resampling), (zero,), (one,))
    torch.testing.assert_close(change, sum(slopes(image, resampling)), rtol=1e-11, atol=1e-12)
