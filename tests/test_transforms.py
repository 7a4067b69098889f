"""Finite actions and their derivatives at 0: signs, axes and units on asymmetric images, and the group law."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import central_difference, moved, waves

import lie_metric as lm
from lie_metric import transforms as T

BILINEAR = lm.Resampling("bilinear", "zeros")


def dot(row, column, size=5):
    image = torch.zeros(1, size, size, dtype=torch.float64)
    image[0, row, column] = 1.0
    return image


def place(image):
    """Row and column of the centre of mass."""
    total = image.sum()
    rows = torch.arange(image.shape[-2], dtype=image.dtype)
    columns = torch.arange(image.shape[-1], dtype=image.dtype)
    return (
        round(((image.sum((0, 2)) * rows).sum() / total).item(), 6),
        round(((image.sum((0, 1)) * columns).sum() / total).item(), 6),
    )


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        (lambda x: T.translate(x, 0.4, "x", BILINEAR), (1, 2)),  # 0.4 half sides = 1 pixel: content to the left
        (lambda x: T.translate(x, 0.4, "y", BILINEAR), (0, 3)),  # and up
        (lambda x: T.rotate(x, math.pi / 2, BILINEAR), (3, 3)),  # a quarter turn clockwise, y down
        (lambda x: T.rotate(x, -math.pi / 2, BILINEAR), (1, 1)),
        (lambda x: T.shear(x, 1.0, "x", BILINEAR), (1, 4)),  # read at x + y: what is above the centre moves right
        (lambda x: T.shear(x, 1.0, "y", BILINEAR), (0, 3)),
    ],
)
def test_where_a_point_goes(action, wanted):
    """The point stands one pixel above and one to the right of the centre (2, 2)."""
    assert place(action(dot(1, 3))) == wanted


def test_scale_enlarges_and_stretch_compresses():
    assert place(T.scale(dot(4, 5, 9), math.log(2), BILINEAR)) == (4, 6)
    assert place(T.stretch(dot(2, 4), math.log(2), "x", BILINEAR)) == (2, 3)
    assert place(T.stretch(dot(4, 2), math.log(2), "y", BILINEAR)) == (3, 2)
    grid = torch.arange(64, dtype=torch.float64) - 31.5
    blob = torch.exp(-((grid[:, None] + 6) ** 2 + (grid - 6) ** 2) / 20)[None]
    moved = place(T.hyperbolic_rotate(blob, 0.5))
    # Read at ((cosh, sinh), (sinh, cosh)) p: the anti-diagonal point (6, -6) goes outwards by e^0.5.
    assert moved == pytest.approx((31.5 - 6 * math.exp(0.5), 31.5 + 6 * math.exp(0.5)), abs=0.2)


def test_units_on_a_wide_image():
    """Half of the shorter side is the unit along both axes, so that a rotation stays one."""
    image = torch.zeros(1, 4, 12, dtype=torch.float64)
    image[0, 1, 8] = 1
    assert place(T.translate(image, 1.0, "x", BILINEAR)) == (1, 6)
    assert place(T.translate(image, 0.5, "y", BILINEAR)) == (0, 8)
    aligned = lm.Resampling("bilinear", "zeros", align_corners=True)
    assert place(T.translate(image, 1.0, "x", aligned)) == (1, 6.5)  # 3 / 2 pixels
    square = torch.zeros(1, 5, 9, dtype=torch.float64)
    square[0, 2, 6] = 1
    assert place(T.rotate(square, math.pi / 2, BILINEAR)) == (4, 4)


def test_tangents_of_a_quadratic_by_hand():
    """x(p) = p_x² + 3 p_x p_y on isotropic coordinates: X·x = ∇x · A p̃ away from the border."""
    n = 16
    unit = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 2)
    px, py = unit[None].expand(n, n), unit[:, None].expand(n, n)
    image = px**2 + 3 * px * py
    dx, dy = 2 * px + 3 * py, 3 * px
    wanted = {
        "translation_x": dx,
        "translation_y": dy,
        "rotation": dx * py - dy * px,
        "hyperbolic_rotation": dx * py + dy * px,
        "scale": -dx * px - dy * py,
        "shear_x": dx * py,
        "shear_y": dy * px,
        "stretch_x": dx * px,
        "stretch_y": dy * py,
        "saturation": image,
    }
    found = T.tangents(image[None], lm.generators("all"), lm.Resampling("cubic"))[:, 0]
    for generator, value in zip(lm.generators("all"), found, strict=True):
        torch.testing.assert_close(value[1:-1, 1:-1], wanted[generator.name][1:-1, 1:-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interpolation", ["bspline", "cubic", "bilinear", "fourier"])
@pytest.mark.parametrize("align", [False, True])
def test_tangents_are_the_derivative_of_apply(interpolation, align):
    resampling = lm.Resampling(interpolation, align_corners=align)
    image = torch.randn(2, 2, 7, 10, dtype=torch.float64)
    generators = lm.generators("all")
    for generator, tangent in zip(generators, T.tangents(image, generators, resampling), strict=True):
        zero = torch.tensor(0.0, dtype=torch.float64)
        _, moved = torch.func.jvp(lambda t, g=generator: T.apply(image, g, t, resampling), (zero,), (zero + 1,))
        torch.testing.assert_close(tangent, moved, rtol=1e-11, atol=1e-12)


def test_tangents_against_finite_differences():
    image = waves(2, 20)
    for generator, tangent in zip(
        lm.generators("all"), T.tangents(image, lm.generators("all"), lm.Resampling()), strict=True
    ):
        slow = central_difference(lambda t, g=generator: T.apply(image, g, t))
        torch.testing.assert_close(tangent, slow, rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([g.name for g in lm.generators("all")]), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
def test_group_law_up_to_interpolation(name, s, t):
    size = 48
    grid = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / (size / 2)
    blob = torch.exp(-((grid[:, None] - 0.1) ** 2 + 2 * (grid + 0.15) ** 2) / 0.05)[None]
    twice = T.apply(T.apply(blob, name, t), name, s)
    torch.testing.assert_close(twice, T.apply(blob, name, s + t), rtol=0, atol=5e-4)
    torch.testing.assert_close(T.apply(T.apply(blob, name, t), name, -t), blob, rtol=0, atol=5e-4)


STENCILS = [
    *itertools.product(("bspline", "cubic", "bilinear"), ("reflection", "border", "zeros", "circular"), (False, True)),
    *itertools.product(("fourier",), ("circular", "reflection"), (False, True)),
]
OBLIQUE = lm.Generator("oblique", ((0.3, -0.8, 0.4), (0.5, 0.2, -0.7)), 0.6)


@pytest.mark.parametrize("stencil", STENCILS, ids=str)
@pytest.mark.parametrize("generator", [OBLIQUE, *lm.generators("rotation")], ids=lambda g: g.name)
def test_finite_action_is_that_of_an_explicit_matrix(generator, stencil):
    """A wide image, moved so far that much of it is read beyond the frame; one even side, one odd."""
    image = torch.randn(2, 5, 8, dtype=torch.float64)
    wanted = moved(
        image, generator, 0.9, **dict(zip(("interpolation", "padding", "align_corners"), stencil, strict=True))
    )
    torch.testing.assert_close(T.apply(image, generator, 0.9, lm.Resampling(*stencil)), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stencil", STENCILS, ids=str)
def test_no_time_moves_nothing_bit_for_bit(stencil, dtype):
    images = torch.randn(2, 1, 6, 9).to(dtype)
    for generator in (OBLIQUE, *lm.generators("all")):
        for t in (0.0, torch.zeros(2)):
            assert torch.equal(T.apply(images, generator, t, lm.Resampling(*stencil)), images)


@pytest.mark.parametrize("interpolation", ["bspline", "cubic", "bilinear", "fourier"])
def test_autocast_does_not_round_the_pixels(interpolation):
    images, stencil = torch.rand(2, 3, 9, 12), lm.Resampling(interpolation)
    generators = lm.generators("all")

    def everything():
        return [T.apply(images, g, t, stencil) for g in generators for t in (0.0, 0.3)], T.tangents(
            images, generators, stencil
        )

    wanted, wanted_tangents = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (images @ images.mT).dtype == torch.bfloat16
        found, tangents = everything()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(tangents, wanted_tangents)


def test_vmap_over_images_and_parameters():
    images, t = torch.randn(3, 2, 6, 7, dtype=torch.float64), torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(T.rotate)(images, t), T.rotate(images, t))

    def turned(v):
        return T.rotate(images[0], v).square().sum()

    gradients = torch.vmap(torch.func.grad(turned))(t)
    curvatures = torch.vmap(torch.func.hessian(turned))(t)
    for v, gradient, curvature in zip(t.tolist(), gradients, curvatures, strict=True):
        torch.testing.assert_close(gradient, central_difference(lambda h, v=v: turned(v + h)), rtol=1e-6, atol=1e-6)
        slope = torch.func.grad(turned)
        second = central_difference(lambda h, v=v: slope(torch.tensor(v + h, dtype=torch.float64)))  # noqa: B023
        torch.testing.assert_close(curvature, second, rtol=1e-5, atol=1e-5)


def test_parameters_by_image_and_gradients_with_respect_to_them():
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    together = T.rotate(images, t)
    alone = torch.stack([T.rotate(image, float(v)) for image, v in zip(images, t.detach(), strict=True)])
    torch.testing.assert_close(together, alone)
    assert torch.autograd.gradcheck(lambda v: T.rotate(images, v), (t,))
    assert T.saturate(images, t).shape == images.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_and_half_types_are_computed_in_float32(dtype):
    image = torch.rand(1, 1, 16, 16).to(dtype)
    turned = T.rotate(image, 0.2)
    assert turned.dtype == dtype
    assert torch.equal(turned, T.rotate(image.float(), 0.2).to(dtype))
    tangent = T.tangents(image, lm.generators("rotation"), lm.Resampling())
    assert tangent.dtype == dtype
    assert torch.equal(tangent, T.tangents(image.float(), lm.generators("rotation"), lm.Resampling()).to(dtype))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: T.rotate(torch.zeros(1, 8, 8, dtype=torch.uint8), 0.1), TypeError, "got torch.uint8"),
        (lambda: T.rotate([1.0], 0.1), TypeError, "must be a tensor, got list"),
        (lambda: T.rotate(torch.zeros(8, 8), 0.1), ValueError, r"got shape \(8, 8\)"),
        (lambda: T.rotate(torch.zeros(0, 1, 8, 8), 0.1), ValueError, "non-empty"),
        (lambda: T.rotate(torch.zeros(2, 1, 8, 8), torch.zeros(3)), ValueError, r"of shape \(2,\)"),
        (lambda: T.rotate(torch.zeros(2, 1, 8, 8), "much"), TypeError, "`t` must be a number"),
        (lambda: T.rotate(torch.zeros(2, 1, 8, 8), float("nan")), ValueError, "`t` must be finite, got nan"),
        (lambda: T.scale(torch.zeros(1, 8, 8), torch.tensor(torch.inf)), ValueError, "`t` must be finite, got inf"),
        (lambda: T.shear(torch.zeros(2, 1, 8, 8), torch.tensor([0, torch.nan])), ValueError, "finite, got nan"),
        (
            lambda: torch.func.vmap(lambda t: T.rotate(torch.zeros(1, 8, 8), t))(torch.tensor([0, torch.nan])),
            ValueError,
            "`t` must be finite, got nan",
        ),
        (lambda: T.translate(torch.zeros(1, 8, 8), 0.1, "z"), ValueError, "`axis` must be"),
        (lambda: T.apply(torch.zeros(1, 8, 8), "translation", 0.1), ValueError, "single generator"),
        (lambda: T.apply(torch.zeros(1, 8, 8), "turn", 0.1), ValueError, "got 'turn'"),
        (lambda: T.rotate(torch.zeros(1, 1, 8), 0.1, lm.PAPER), ValueError, "at least two pixels wide"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tangents_of_half_types_are_rounded_once(dtype):
    image = torch.rand(2, 1, 12, 10).to(dtype)
    generators = lm.generators("all")
    found = T.tangents(image, generators, lm.Resampling())
    assert torch.equal(found, T.tangents(image.float(), generators, lm.Resampling()).to(dtype))


@pytest.mark.parametrize("stencil", STENCILS, ids=str)
def test_tangents_are_the_derivative_of_apply_for_every_stencil(stencil):
    resampling, image = lm.Resampling(*stencil), torch.randn(1, 1, 5, 8, dtype=torch.float64)
    generators = (OBLIQUE, *lm.generators("all"))
    zero = torch.tensor(0.0, dtype=torch.float64)
    for generator, tangent in zip(generators, T.tangents(image, generators, resampling), strict=True):
        _, moved = torch.func.jvp(lambda t, g=generator: T.apply(image, g, t, resampling), (zero,), (zero + 1,))
        torch.testing.assert_close(tangent, moved, rtol=1e-11, atol=1e-12)


def test_tangents_of_a_combination_are_the_combination_of_tangents():
    image = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    rotation, shear, saturation = lm.generators("rotation", "shear_x", "saturation")
    mixed = 0.7 * rotation - 1.3 * shear + 0.4 * saturation
    a, b, c, whole = T.tangents(image, (rotation, shear, saturation, mixed), lm.Resampling())
    torch.testing.assert_close(whole, 0.7 * a - 1.3 * b + 0.4 * c, rtol=1e-12, atol=1e-12)
    assert T.tangents(image, (), lm.Resampling()).shape == (0, 2, 3, 6, 9)


@pytest.mark.parametrize("interpolation", ["bspline", "cubic", "bilinear", "fourier"])
def test_tangents_with_channels_last(interpolation):
    stencil = lm.Resampling(interpolation, "circular" if interpolation == "fourier" else "reflection")
    image = torch.rand(2, 3, 6, 9, dtype=torch.float64)
    wanted = T.tangents(image, lm.generators("all"), stencil).movedim(2, -1)
    found = T.tangents(image.movedim(1, -1), lm.generators("all"), stencil, channels_last=True)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_tangents_are_the_same_whether_they_are_differentiated_or_not():
    """Without gradients they are written in place, which tensors under a transform of torch cannot be."""
    image, generators, stencil = torch.rand(2, 3, 6, 9), lm.generators("all"), lm.Resampling()
    wanted = T.tangents(image.requires_grad_(), generators, stencil)
    assert wanted.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(T.tangents(image, generators, stencil), wanted, rtol=0, atol=0)
        mapped = torch.func.vmap(lambda x: T.tangents(x, generators, stencil), out_dims=1)(image)
        torch.testing.assert_close(mapped, wanted, rtol=1e-6, atol=1e-6)
        _, along = torch.func.jvp(lambda x: T.tangents(x, generators, stencil), (image,), (torch.ones_like(image),))
        torch.testing.assert_close(along, T.tangents(torch.ones_like(image), generators, stencil), rtol=1e-5, atol=1e-5)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(image, image)
            along = torch.autograd.forward_ad.unpack_dual(T.tangents(dual, generators, stencil)).tangent
            torch.testing.assert_close(along, wanted, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(T.tangents(image, generators, stencil), wanted, rtol=0, atol=0)
    T.tangents(image, generators, stencil).sum().backward()  # nothing cached belongs to the inference


@pytest.mark.parametrize(("align", "inside"), [(False, [True, True, True, True]), (True, [True, True, True, False])])
def test_the_frame_ends_at_the_edges_or_at_the_centres_of_the_outermost_pixels(align, inside):
    """Half a pixel further along x, then y, in an image that is not square."""
    stencil = lm.Resampling("bilinear", align_corners=align)
    unit = 1.5 if align else 2.0  # pixels in half of the shorter side
    step = torch.tensor([[0.5 / unit]], dtype=torch.float64)
    found = T.reads_inside(torch.zeros(1, 1, 6, 4), lm.generators("translation_x"), step, stencil)
    assert found.shape == (1, 6, 4)
    assert found[0].tolist() == [inside] * 6
    found = T.reads_inside(torch.zeros(1, 1, 6, 4), lm.generators("translation_y"), step, stencil)
    assert found[0, :, 0].tolist() == [True, True, *inside]
    back = T.reads_inside(torch.zeros(1, 1, 6, 4), lm.generators("translation_x"), -step, stencil)
    assert back[0, 0].tolist() == inside[::-1]
