"""Signals, images and volumes under one meter: stencils, groups, spacings, fibres, and the measures on them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from references import _Row, central_difference
from torch import nn

import lie_metric as lm
from lie_metric import orbits, testing
from lie_metric import transforms as T
from lie_metric.lattice import CUBE, ELEMENTS, Cubic, Roll, elements
from lie_metric.representations import (
    ChannelsLast,
    Covectors,
    Field,
    Image,
    Invariant,
    Irreps,
    Points,
    Tensors,
    Vectors,
    Velocities,
    infer_output_representation,
    map_samples,
)
from lie_metric.resampling import displace, grid_sample, slopes

FOURIER = lm.Resampling("fourier")
STENCILS = [
    *itertools.product(("bspline", "cubic", "bilinear"), ("reflection", "border", "zeros", "circular"), (False, True)),
    *itertools.product(("fourier",), ("circular", "reflection"), (False, True)),
]
SIZES = {1: (7,), 2: (5, 6), 3: (4, 5, 6)}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator(dimension, seed=0, size=1.0, intensity=0.0):
    return lm.Generator("oblique", (size * random(dimension, dimension + 1, seed=seed)).tolist(), intensity)


def waves(size, seed=0, count=6, highest=2):
    """A periodic sum of plane waves of up to ``highest`` cycles along each axis, and its slopes along x, y, ..."""
    drawn = torch.Generator().manual_seed(seed)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    total, steep = torch.zeros(size, dtype=torch.float64), [torch.zeros(size, dtype=torch.float64) for _ in size]
    for _ in range(count):
        cycles = torch.randint(-highest, highest + 1, (len(size),), generator=drawn).tolist()
        omega = [2 * math.pi * k / n for k, n in zip(cycles, size, strict=True)]
        phase = sum(w * place for w, place in zip(omega, places, strict=True)) + 6 * float(
            torch.rand((), generator=drawn)
        )
        total += phase.sin()
        for axis, w in enumerate(reversed(omega)):
            steep[axis] += w * phase.cos()
    return total, steep


class TestStencils:
    @pytest.mark.parametrize("dimension", [1, 3])
    @pytest.mark.parametrize("stencil", STENCILS, ids=str)
    def test_displacement_is_a_sum_over_all_samples(self, stencil, dimension):
        """Far beyond the frame too, against the kernel's formula, one point at a time."""
        size = SIZES[dimension]
        field, steps = random(1, 2, *size), 4 * random(1, *size, dimension, seed=1)
        rows = [_Row(n, *stencil) for n in reversed(size)]
        found = displace(field, steps, lm.Resampling(*stencil))
        for place in itertools.islice(itertools.product(*map(range, size)), 0, None, 7):
            wanted = field[0]
            for axis, row in enumerate(rows):
                wanted = wanted @ row.weights(place[-1 - axis] + steps[0][place][axis].item())
            torch.testing.assert_close(found[(0, slice(None), *place)], wanted, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("dimension", [1, 3])
    @pytest.mark.parametrize("stencil", STENCILS, ids=str)
    def test_slopes_are_the_derivative_of_displacement(self, stencil, dimension):
        resampling, size = lm.Resampling(*stencil), SIZES[dimension]
        field, zero = random(1, 2, *size), torch.zeros(1, *size, dimension, dtype=torch.float64)
        assert torch.equal(displace(field, zero, resampling), field)
        for axis, slope in enumerate(slopes(field, resampling, dimension=dimension)):
            along = torch.zeros_like(zero)
            along[..., axis] = 1
            _, moved = torch.func.jvp(lambda d: displace(field, d, resampling), (zero,), (along,))
            torch.testing.assert_close(slope, moved, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("dimension", [1, 2, 3])
    def test_slopes_of_plane_waves(self, dimension):
        size = (9, 11, 8)[:dimension]
        field, wanted = waves(size)
        for found, slope in zip(slopes(field, FOURIER, dimension=dimension), wanted, strict=True):
            torch.testing.assert_close(found, slope, rtol=0, atol=1e-12)
        last = slopes(field[..., None], FOURIER, channels_last=True, dimension=dimension)
        for found, slope in zip(last, wanted, strict=True):
            torch.testing.assert_close(found[..., 0], slope, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dimension", [1, 3])
    def test_bspline_is_that_of_scipy(self, dimension):
        ndimage = pytest.importorskip("scipy.ndimage")
        size = SIZES[dimension]
        field, grid = random(1, 1, *size), 2 * torch.rand(1, *size, dimension, dtype=torch.float64) - 1
        points = (grid[0] + 1) * (torch.tensor(size[::-1]) - 1) / 2
        points = list(points.flip(-1).movedim(-1, 0).numpy())
        wanted = ndimage.map_coordinates(field[0, 0].numpy(), points, order=3, mode="mirror")
        found = grid_sample(field, grid, lm.Resampling(align_corners=True))[0, 0]
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=1e-12)

    def test_trilinear_is_that_of_torch(self):
        field, grid = random(2, 3, 4, 5, 6), 1.5 * random(2, 3, 2, 4, 3, seed=1)
        found = grid_sample(field, grid, lm.Resampling("bilinear", "border"))
        wanted = F.grid_sample(field, grid, padding_mode="border", align_corners=False)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("interpolation", ["bspline", "bilinear", "fourier"])
    def test_derivatives_of_every_mode(self, interpolation):
        field = random(1, 1, 2, 2, 2).requires_grad_()
        steps = (torch.rand(1, 2, 2, 2, 3, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
        torch.autograd.gradcheck(
            lambda a, b: displace(a, b, lm.Resampling(interpolation))[..., ::2, :],
            (field, steps),
            check_forward_ad=True,
            check_batched_grad=True,
        )

    def test_half_types(self):
        field, steps = random(1, 1, 4, 4, 4).to(torch.bfloat16), random(1, 4, 4, 4, 3)
        assert torch.equal(
            displace(field, steps, lm.Resampling()), displace(field.float(), steps, lm.Resampling()).to(torch.bfloat16)
        )


class TestActions:
    @pytest.mark.parametrize("dimension", [1, 2, 3])
    @pytest.mark.parametrize("stencil", [("bspline",), ("cubic", "zeros"), ("bilinear", "border", True), ("fourier",)])
    def test_tangents_are_the_derivative_of_apply(self, stencil, dimension):
        resampling, spacing = lm.Resampling(*stencil), (1.0, 0.5, 2.0)[:dimension]
        field, X = random(2, 2, *SIZES[dimension]), generator(dimension, intensity=0.4)
        zero = torch.tensor(0.0, dtype=torch.float64)
        _, moved = torch.func.jvp(lambda t: T.apply(field, X, t, resampling, spacing=spacing), (zero,), (zero + 1,))
        found = T.tangents(field, [X], resampling, spacing=spacing)[0]
        torch.testing.assert_close(found, moved, rtol=1e-11, atol=1e-12)
        last = T.tangents(field.movedim(1, -1), [X], resampling, True, spacing)[0]
        torch.testing.assert_close(last.movedim(-1, 1), found, rtol=1e-11, atol=1e-12)

    @settings(max_examples=10, deadline=None)
    @given(st.floats(-2, 2), st.floats(-2, 2))
    def test_translations_of_waves_are_an_exact_group(self, s, t):
        field = waves((6, 7, 9))[0][None]
        X = lm.Generator("shift", ((0, 0, 0, 1), (0, 0, 0, -0.7), (0, 0, 0, 0.4)))
        twice = T.apply(T.apply(field, X, s, FOURIER), X, t, FOURIER)
        torch.testing.assert_close(twice, T.apply(field, X, s + t, FOURIER), rtol=0, atol=1e-12)

    @settings(max_examples=5, deadline=None)
    @given(
        st.sampled_from(["rotation_x", "rotation_y", "rotation_z", "scale", "shear_xz"]),
        st.floats(-0.15, 0.15),
        st.floats(-0.15, 0.15),
    )
    def test_group_law_up_to_interpolation(self, name, s, t):
        places = torch.meshgrid(*[torch.linspace(-1, 1, 27, dtype=torch.float64)] * 3, indexing="ij")
        blob = torch.exp(-(places[0] ** 2 + 2 * (places[1] - 0.1) ** 2 + (places[2] + 0.1) ** 2) / 0.07)[None]
        (X,) = lm.generators(name, dimension=3)
        twice = T.apply(T.apply(blob, X, t), X, s)
        torch.testing.assert_close(twice, T.apply(blob, X, s + t), rtol=0, atol=5e-3)

    @pytest.mark.parametrize("dimension", [1, 2, 3])
    def test_content_moves_as_points_do(self, dimension):
        """A blob's centre, in a volume of unequal sides and distances, and a point under the same generator."""
        size, spacing = (21, 27, 31)[:dimension], (0.8, 1.0, 1.3)[:dimension]
        axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size]
        unit = min(n * step for n, step in zip(reversed(size), spacing, strict=True)) / 2
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1) * torch.tensor(spacing) / unit
        start = torch.tensor([[0.15, -0.2, 0.1]], dtype=torch.float64)[:, :dimension]
        blob = (-(grid - start).square().sum(-1) / 0.05).exp()[None]
        for X in lm.generators("affine", dimension=dimension):
            moved = T.apply(blob, X, 0.2, spacing=spacing)[0]
            found = (grid * moved[..., None]).flatten(0, -2).sum(0) / moved.sum()
            wanted = Points(dimension).act(start, X, 0.2, lm.Resampling())[0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=4e-3)

    def test_a_volume_that_is_constant_along_z_is_an_image(self):
        image = random(2, 3, 8, 9)
        volume = image[:, :, None].expand(2, 3, 10, 8, 9)
        pairs = {"translation_x": "translation_x", "translation_y": "translation_y", "rotation_z": "rotation"}
        pairs |= {"shear_xy": "shear_x", "stretch_y": "stretch_y", "hyperbolic_xy": "hyperbolic_rotation"}
        for stencil in (lm.Resampling(), lm.PAPER, FOURIER):
            for solid, flat in pairs.items():
                (X,), (Y,) = lm.generators(solid, dimension=3), lm.generators(flat)
                (found,), (wanted,) = T.tangents(volume, [X], stencil), T.tangents(image, [Y], stencil)
                torch.testing.assert_close(found, wanted[:, :, None].expand_as(found), rtol=0, atol=1e-12)
                found, wanted = T.apply(volume, X, 0.3, stencil), T.apply(image, Y, 0.3, stencil)
                torch.testing.assert_close(found, wanted[:, :, None].expand_as(found), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("align", [False, True])
    def test_a_row_of_an_image_is_a_signal(self, align):
        signal = random(2, 3, 8)
        image = signal[:, :, None].expand(2, 3, 9, 8)
        stencil = lm.Resampling("cubic", "border", align)
        for line, flat in {"translation_x": "translation_x", "scale": "stretch_x"}.items():
            (X,), (Y,), t = lm.generators(line, dimension=1), lm.generators(flat), 0.3 if line[0] == "t" else -0.3
            found, wanted = T.apply(signal, X, abs(t), stencil), T.apply(image, Y, t, stencil)[:, :, 4]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)

    def test_spacing_turns_in_physical_space(self):
        """Every other slice of a fine volume: turned coarse, or fine and then thinned, smooth content is the same."""
        z, y, x = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (31, 21, 21)), indexing="ij"
        )
        fine = torch.exp(-((x - 2) ** 2 + 2 * y**2 + (z + 1.5) ** 2) / 30)[None]
        coarse = fine[:, ::2]
        for name in ("rotation_x", "rotation_y", "shear_xz"):
            # The unit is half of the shortest side, x and y, in both.
            moved = T.apply(fine, name, 0.3, dimension=3)[:, ::2]
            found = T.apply(coarse, name, 0.3, dimension=3, spacing=(1, 1, 2))
            torch.testing.assert_close(found, moved, rtol=0, atol=4e-3)
            wrong = T.apply(coarse, name, 0.3, dimension=3)
            assert (wrong - moved).abs().max() > 0.03

    @pytest.mark.parametrize("angle", [0.4, -1.1])
    def test_rotations_are_those_of_scipy(self, angle):
        ndimage = pytest.importorskip("scipy.ndimage")
        volume, cosine, sine = random(5, 6, 7), math.cos(angle), math.sin(angle)
        about_x = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]], dtype=torch.float64)  # on (z, y, x)
        centre = (torch.tensor(volume.shape, dtype=torch.float64) - 1) / 2
        wanted = ndimage.affine_transform(
            volume.numpy(), about_x.numpy(), (centre - about_x @ centre).numpy(), order=3, mode="mirror"
        )
        found = T.apply(volume[None], "rotation_x", angle, lm.Resampling(align_corners=True), dimension=3)[0]
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=1e-11)

    def test_a_common_factor_of_spacings_changes_nothing(self):
        volume, X = random(1, 1, 4, 5, 6), generator(3)
        for spacing in ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)):
            torch.testing.assert_close(T.apply(volume, X, 0.3, spacing=spacing), T.apply(volume, X, 0.3))
        one, other = (T.apply(volume, X, 0.3, spacing=s) for s in ((1.0, 2.0, 3.0), (0.5, 1.0, 1.5)))
        torch.testing.assert_close(one, other)

    def test_parameters_by_volume_and_their_gradients(self):
        volumes, t = random(2, 1, 3, 3, 4), torch.tensor([0.1, -0.3], dtype=torch.float64, requires_grad=True)
        (X,) = lm.generators("rotation_x", dimension=3)
        together = T.apply(volumes, X, t)
        for k in range(2):
            torch.testing.assert_close(together[k], T.apply(volumes[k], X, t[k].item()))
        assert torch.autograd.gradcheck(lambda v: T.apply(volumes, X, v), (t,))

    def test_pixels_per_unit_and_the_frame(self):
        (X,) = lm.generators("translation_z", dimension=3)
        assert T.pixels_per_unit(X, (6, 8, 10), lm.Resampling()) == 3
        assert T.pixels_per_unit(X, (6, 8, 10), lm.Resampling(), (1, 1, 2)) == 2  # half of 8, in slices of 2
        step = torch.tensor([[1 / 3]], dtype=torch.float64)  # one slice
        found = T.reads_inside(torch.zeros(1, 1, 6, 8, 10), (X,), step, lm.Resampling())
        assert found.shape == (1, 6, 8, 10)
        assert found[0, :, 0, 0].tolist() == [True] * 5 + [False]
        # 0.7 / 3 of half of 8 pixels are less than half of a slice of 2, and 0.7 of a slice of 1.
        found = T.reads_inside(torch.zeros(1, 1, 6, 8, 10), (X,), 0.7 * step, lm.Resampling(), (1, 1, 2))
        assert found.all()
        assert not T.reads_inside(torch.zeros(1, 1, 6, 8, 10), (X,), 0.7 * step, lm.Resampling()).all()


FIBRES = {
    "scalars": (None, 3),
    "vectors": (Vectors(3), 6),
    "covectors": (Covectors(3), 3),
    "velocities": (Velocities(3), 3),
    "matrices": (Tensors(3, 2), 9),
    "rank 0": (Tensors(3, 0), 2),
}


@pytest.fixture(params=FIBRES)
def fibre(request):
    return FIBRES[request.param]


class TestFields:
    def test_tangents_are_the_derivative_of_the_action(self, fibre):
        kind, channels = fibre
        field, X = (
            Field(3, (1.0, 1.0, 0.8), kind),
            lm.Generator("g", generator(3).matrix, 0.3, {"boost_y": 0.5} if kind == Velocities(3) else {}),
        )
        f = waves((5, 6, 6), highest=1)[0] * random(2, channels, 1, 1, 1)
        slow = central_difference(lambda t: field.act(f, X, t, FOURIER), 1e-3)
        torch.testing.assert_close(field.tangents(f, [X], FOURIER)[0], slow, rtol=0, atol=1e-7)

    def test_parameters_by_sample(self, fibre):
        kind, channels = fibre
        field, X, f = Field(3, fibre=kind), generator(3), random(2, channels, 4, 4, 4)
        t = torch.tensor([0.2, -0.4], dtype=torch.float64)
        alone = [field.act(f[k : k + 1], X, t[k].item(), lm.Resampling()) for k in range(2)]
        torch.testing.assert_close(field.act(f, X, t, lm.Resampling()), torch.cat(alone))

    def test_linear_in_the_generator(self, fibre):
        kind, channels = fibre
        field, f, a, b = Field(3, fibre=kind), random(1, channels, 3, 4, 5), generator(3, 1), generator(3, 2)
        one, two, both = field.tangents(f, [a, b, 2 * a - 3 * b], lm.Resampling())
        torch.testing.assert_close(both, 2 * one - 3 * two, rtol=1e-10, atol=1e-10)

    def test_channels_that_move_together_lie_side_by_side(self):
        two = random(1, 4, 5, 5)
        X = lm.generators("rotation")
        found = Field(2, fibre=Vectors(2)).tangents(two, X, lm.Resampling())
        for k in (0, 2):
            alone = Field(2, fibre=Vectors(2)).tangents(two[:, k : k + 2], X, lm.Resampling())
            torch.testing.assert_close(found[:, :, k : k + 2], alone)
        turning = found - Image().tangents(two, X, lm.Resampling())
        torch.testing.assert_close(turning[0], torch.stack([-two[:, 1], two[:, 0], -two[:, 3], two[:, 2]], 1))

    def test_what_is_left_at_rest(self):
        f = random(2, 9, 4, 4, 4)
        (block,) = Field(3).components(f)
        torch.testing.assert_close(block, f.flatten(2).mT)
        assert Field(3, fibre=Vectors(3)).components(f) == ()
        (trace,) = Field(3, fibre=Tensors(3, 2)).components(f)
        wanted = (f[:, 0] + f[:, 4] + f[:, 8]) / 3**0.5
        torch.testing.assert_close(trace[..., 0].abs(), wanted.flatten(1).abs())
        scalars = Field(3, fibre=Tensors(3, 0)).components(f)
        torch.testing.assert_close(torch.cat(scalars, 2), block)

    def test_images_are_what_they_were(self):
        image = random(2, 3, 5, 6)
        assert repr(Image()) == "Image()"
        assert Image() == Image()
        assert Image() != Field(2)
        assert len({Image(), Image(), Field(2), Field(2)}) == 2
        X = lm.generators("all")
        assert torch.equal(Image().tangents(image, X, lm.Resampling()), Field(2).tangents(image, X, lm.Resampling()))
        assert Field(3).charges == {"intensity"}
        assert Field(3, fibre=Velocities(3)).charges == {"intensity", "boost_x", "boost_y", "boost_z"}

    def test_half_types_and_no_generators(self):
        flow = Field(2, fibre=Vectors(2))
        f, X = random(1, 2, 5, 5).half(), lm.generators("rotation")
        found = flow.tangents(f, X, lm.Resampling())
        assert torch.equal(found, flow.tangents(f.float(), X, lm.Resampling()).half())
        assert flow.act(f, X[0], 0.1, lm.Resampling()).dtype == torch.half
        assert flow.tangents(f, [], lm.Resampling()).shape == (0, 1, 2, 5, 5)

    def test_maps_act_as_exponentials_and_permutations_do(self, fibre):
        kind, channels = fibre
        if kind is None or kind == Velocities(3):
            return
        field, f, X = Field(3, fibre=kind), random(2, channels, 5, 5, 5), generator(3, size=0.3)
        from lie_metric.representations.affine import content_map as exponentials

        maps = exponentials(X, torch.tensor(0.4, dtype=torch.float64))[None]
        for each in (field, Field(3, (1.0, 1.0, 2.0), kind)):
            torch.testing.assert_close(each.transform(f, maps), each.act(f, X, 0.4, lm.Resampling()))
        g = CUBE["rotate_y_90"]
        matrix = torch.tensor(g.matrix, dtype=torch.float64)
        maps = F.pad(matrix, (0, 1))[None]
        (Y,) = lm.generators("rotation_y", dimension=3)
        turned = field.act(f, Y, math.pi / 2, lm.Resampling())
        torch.testing.assert_close(map_samples(field, f, g, maps), turned, rtol=0, atol=1e-10)
        torch.testing.assert_close(field.transform(f, maps), turned, rtol=0, atol=1e-10)

    def test_irreps_as_a_fibre(self):
        pytest.importorskip("e3nn")
        field = Field(3, fibre=Irreps("1x0e+1x1o"))
        (X,) = lm.generators("rotation_x", dimension=3)
        f = waves((6, 6, 6), highest=1)[0] * random(1, 4, 1, 1, 1)
        slow = central_difference(lambda t: field.act(f, X, t, FOURIER), 1e-3)
        torch.testing.assert_close(field.tangents(f, [X], FOURIER)[0], slow, rtol=0, atol=1e-7)


def gradient(image):
    """Central differences along x, y, ... with the channel of each in this order, periodic."""
    axes = range(1, image.ndim - 1)
    return torch.cat([(image.roll(-1, -axis) - image.roll(1, -axis)) / 2 for axis in axes], 1)


def within(size, dimension, seed, width=0.04):
    """Smooth blobs about the centre, which do not reach the frame."""
    places = torch.meshgrid(*[torch.linspace(-1, 1, size, dtype=torch.float64)] * dimension, indexing="ij")
    drawn = 0.1 * random(3, dimension, seed=seed)
    blobs = [
        torch.exp(
            -sum((place - shift) ** 2 for place, shift in zip(places, each, strict=True)) / (width * (1 + 0.3 * k))
        )
        for k, each in enumerate(drawn)
    ]
    return (blobs[0] - 0.7 * blobs[1] + 0.5 * blobs[2])[None]


class TestMeasures:
    @pytest.mark.parametrize(("dimension", "size"), [(2, 96), (3, 25)])
    def test_gradients_are_covectors(self, dimension, size):
        images = torch.stack([within(size, dimension, seed, (0.04, 0.07)[dimension - 2]) for seed in range(3)])
        names = ("rotation", "scale", "hyperbolic_rotation") if dimension == 2 else ("rotation_x", "scale", "shear_xy")

        def relative(fibre):
            return lm.functional.relative(
                gradient,
                images,
                names,
                input_representation=Field(dimension),
                output_representation=Field(dimension, fibre=fibre),
            )

        right, wrong = relative(Covectors(dimension)), relative(Vectors(dimension))
        for name in names:
            assert right[name] < (0.03 if dimension == 2 else 0.15), (name, right)
            # For rotations there is no difference of vectors and covectors.
            assert wrong[name] > 0.75 or name.startswith("rotation"), (name, wrong)
        scalars = relative(None)
        assert 0.6 < scalars[names[0]] < 1.3

    def test_gradients_in_periodic_waves(self):
        """By the stencil of the derivative nothing but rounding is left."""
        waves_ = torch.stack([waves((12, 14), seed)[0][None] for seed in range(3)])

        def exact(image):
            return torch.cat(slopes(image, FOURIER), 1)

        found = lm.functional.relative(
            exact, waves_, "translation", resampling=FOURIER, output_representation=Field(2, fibre=Covectors(2))
        )
        assert max(found.values()) < 1e-13

    def test_a_flow_is_a_field_of_vectors(self):
        """Of an image the rate at which its content is carried towards brighter places, in units of space."""
        images = torch.stack([within(48, 2, seed) for seed in range(3)])
        flows = torch.cat([gradient(images), gradient(images.flip(0))], 1)
        field = Field(2, fibre=Vectors(2))

        def lengths(v):  # turns with the vectors
            return v * v.unflatten(1, (2, 2)).square().sum(2, keepdim=True).expand(-1, -1, 2, -1, -1).flatten(1, 2)

        def measured(declared):
            return lm.functional.relative(
                lengths,
                flows,
                ("rotation", "translation_x"),
                input_representation=field,
                output_representation=declared,
            )

        right, wrong = measured(field), measured(Field(2))
        assert right["rotation"] < 0.02
        assert 0.8 < wrong["rotation"] < 1.2
        # Saturation is no symmetry of it: cubes grow three times as fast.
        found = lm.functional.relative(
            lengths, flows, "saturation", input_representation=field, output_representation=field
        )
        assert found["saturation"].item() == pytest.approx(2, rel=1e-6)

    def test_divergence_is_a_scalar_and_a_constant_vector_is_none(self):
        images = torch.stack([within(48, 2, seed) for seed in range(3)])

        def divergence(v):
            return gradient(v[:, :1])[:, :1] + gradient(v[:, 1:])[:, 1:]

        found = lm.functional.relative(
            divergence,
            gradient(images),
            "rotation",
            input_representation=Field(2, fibre=Vectors(2)),
            output_representation=Image(),
        )
        assert found["rotation"] < 0.03
        with pytest.warns(UserWarning, match="does not move"):
            constant = lm.functional.relative(
                lambda x: torch.ones_like(x).repeat(1, 2, 1, 1),
                images,
                "rotation",
                output_representation=Field(2, fibre=Vectors(2)),
            )
        assert constant["rotation"].item() == pytest.approx(1, rel=1e-9)

    @pytest.mark.parametrize("dimension", [1, 3])
    def test_circular_convolutions_are_exactly_equivariant_to_translation(self, dimension):
        torch.manual_seed(0)
        kind = {1: nn.Conv1d, 3: nn.Conv3d}[dimension]
        model = kind(2, 5, 3, padding=1, padding_mode="circular").double()
        metric = lm.LocalEquivarianceError(
            ("translation", "scale"), input_representation=Field(dimension), resampling=FOURIER, with_noise=True
        )
        metric.update(model, random(3, 2, *SIZES[dimension]))
        found = metric.compute()
        assert all(found[name] < 1e-13 for name in found if name.startswith("translation")), found
        assert found["scale"] > 0.05
        assert "Field" in metric.described
        assert all(value.isfinite() for value in metric.sensitivity().values())

    def test_volumes_to_keypoints(self):
        """The centre of mass in units of half of the shortest side, of a volume and a vector that comes with it."""
        spacing = (1.0, 1.0, 1.5)
        z, y, x = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (16, 22, 24)), indexing="ij"
        )
        grid = torch.stack([x, y, 1.5 * z], -1) / 11
        drawn = 0.2 * random(4, 3)
        blobs = torch.stack([(-(grid - centre).square().sum(-1) / 0.06).exp()[None] for centre in drawn])

        def carried(parts):
            mass = parts["volume"].sum((1, 2, 3, 4))
            return torch.einsum("bczyx,zyxk->bk", parts["volume"], grid) / mass[:, None] + parts["arrow"]

        found = lm.functional.relative(
            carried,
            {"volume": blobs, "arrow": random(4, 3, seed=1)},
            "affine",
            input_representation={"volume": Field(3, spacing), "arrow": Vectors(3)},
            output_representation=Points(3),
        )
        assert max(found.values()) < 2e-3, found

    def test_planted_violations_are_found(self):
        torch.manual_seed(0)
        ramp = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None, None]
        metric = lm.LocalEquivarianceError("translation", input_representation=Field(3), resampling=FOURIER)
        metric.update(lambda v: v * (1 + ramp), torch.stack([waves((6, 6, 6), seed)[0][None] for seed in range(3)]))
        found = metric.compute()
        assert max(found["translation_x"], found["translation_y"]) < 1e-12
        assert found["translation_z"] > 0.5

    def test_classifiers_of_signals_and_volumes(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double()
        found = lm.functional.relative(
            model,
            random(3, 1, 5, 6, 7),
            "rigid",
            input_representation=Field(3, (1.0, 1.0, 2.0)),
            output_representation=Invariant(),
        )
        assert list(found) == [f"{kind}_{axis}" for kind in ("translation", "rotation") for axis in "xyz"]
        penalty = lm.functional.equivariance_penalty(
            model,
            random(3, 1, 5, 6, 7),
            "translation",
            input_representation=Field(3),
            output_representation=Invariant(),
        )
        penalty.backward()
        assert model[0].weight.grad.abs().max() > 0

    @pytest.mark.parametrize("dimension", [1, 3])
    def test_layers_of_signals_and_volumes(self, dimension):
        """By a band-limited stencil convolutions break nothing, and activations, which alias, all there is."""
        torch.manual_seed(0)
        kind = {1: nn.Conv1d, 3: nn.Conv3d}[dimension]
        first, second = (kind(a, b, 1).double() for a, b in ((1, 3), (3, 2)))

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = first, second

            def forward(self, x):
                return self.second(self.first(x).relu()).square().mean(tuple(range(2, x.ndim)))

        report = lm.layerwise_equivariance_error(
            Net(),
            random(30, 1, *(5,) * dimension),
            "translation",
            input_representation=Field(dimension),
            output_representation=Invariant(),
            resampling=FOURIER,
        )
        assert max(report.residual.values()) < 1e-12
        shares = {(row.name, row.generator): row.share for row in report.by("type")}
        for axis in "xyz"[:dimension]:
            assert abs(shares["convolution", f"translation_{axis}"]) < 1e-10
        with pytest.raises(ValueError, match="of dimension"):
            lm.layerwise_equivariance_error(
                Net(), random(2, 1, *(5,) * dimension), lm.generators("rotation"), input_representation=Field(dimension)
            )

    def test_noise_keeps_the_spectrum_of_volumes(self):
        from lie_metric.functional.noise import like_tangents

        tangents = random(2, 3, 2, 4, 5, 6)
        for representation, moved in ((Field(3), tangents), (Field(1), tangents[..., 0, 0, :])):
            drawn = like_tangents(moved, representation, [0, 1, 2], 0)
            axes = tuple(range(3, moved.ndim))
            torch.testing.assert_close(torch.fft.fftn(drawn, dim=axes).abs(), torch.fft.fftn(moved, dim=axes).abs())
            assert not torch.allclose(drawn, moved)
            assert torch.equal(like_tangents(moved[:, 1:2], representation, [1], 0), drawn[:, 1:2])


class TestInference:
    @pytest.mark.parametrize(
        ("layout", "given", "returned", "wanted"),
        [
            (Field(3), (1, 8, 9, 10), (4, 8, 9, 10), Field(3)),
            (Field(3), (1, 8, 12, 16), (4, 4, 6, 8), Field(3)),
            (Field(3, (1.0, 1.0, 3.0)), (1, 4, 12, 12), (4, 4, 12, 12), Field(3, (1.0, 1.0, 3.0))),
            (Field(3), (3, 8, 8, 8), (3, 8, 8, 8), None),  # eight channels behind, or three before
            (Field(3), (1, 8, 9, 10), (4, 8, 9, 5), None),
            (Field(3), (1, 8, 9, 10), (3, 8, 9, 10), "three scalars"),
            (Field(3), (3, 9, 10, 11), (3, 9, 10, 11), Field(3)),
            (Field(3), (1, 8, 9, 10), (5,), Invariant()),
            (Field(1), (2, 64), (5, 64), Field(1)),
            (Field(1), (2, 64), (1, 64), Field(1)),
            (Field(1), (2, 64), (5, 32), None),
            (Field(1), (2, 64), (64, 64), None),
            (Field(2), (3, 8, 12), (7, 8, 12), Image()),
            (Field(2, (1.0, 2.0)), (3, 8, 12), (7, 8, 12), Field(2, (1.0, 2.0))),
            (Field(2), (3, 8, 12), (2, 8, 12), r"two scalars.*`Field\(2, fibre=Vectors\(2\)\)`"),
            (Field(2, fibre=Vectors(2)), (2, 8, 12), (2, 8, 12), "two scalars"),
            (Field(2, fibre=Vectors(2)), (2, 8, 15), (6, 8, 15), "6 scalars"),
            (Field(2, fibre=Vectors(2)), (2, 8, 12), (1, 8, 12), Image()),
            (Image(), (3, 8, 12), (2, 8, 12), r"`Field\(2, fibre=Vectors\(2\)\)`"),
        ],
        ids=str,
    )
    def test_outputs(self, layout, given, returned, wanted):
        output, inputs = torch.zeros(2, *returned), torch.zeros(2, *given)
        if wanted is None and returned == given:
            inputs = output = torch.zeros(2, 8, 8, 8, 8)
        if wanted is None or isinstance(wanted, str):
            with pytest.raises(ValueError, match=wanted or "`output_representation` must be given"):
                infer_output_representation(output, inputs, None, layout)
        else:
            found = infer_output_representation(output, inputs, None, layout)
            assert found == wanted
            assert type(found) is type(wanted)


class TestLattice:
    def test_turns_are_those_of_the_generators(self):
        volume = random(1, 2, 5, 5, 5)
        for axis, (turns, degrees) in itertools.product("xyz", ((1, 90), (2, 180), (3, 270))):
            (X,) = lm.generators(f"rotation_{axis}", dimension=3)
            turned = T.apply(volume, X, turns * math.pi / 2, lm.Resampling("bilinear"))
            torch.testing.assert_close(CUBE[f"rotate_{axis}_{degrees}"](volume), turned, rtol=0, atol=1e-12)

    def test_about_z_and_flips_are_those_of_images(self):
        volume = random(2, 4, 4, 4)
        pairs = {"rotate_z_90": "rotate_90", "rotate_z_270": "rotate_270", "flip_x": "flip_horizontal"}
        for solid, flat in (pairs | {"flip_y": "flip_vertical"}).items():
            assert torch.equal(CUBE[solid](volume), ELEMENTS[flat](volume))
        assert torch.equal(CUBE["flip_z"](volume), volume.flip(-3))
        assert torch.equal(CUBE["inversion"](volume), volume.flip(-1, -2, -3))

    def test_they_are_a_group_of_48_with_24_turns(self):
        everything = list(CUBE.values())
        volume = torch.arange(27).reshape(3, 3, 3)
        assert len({tuple(g(volume).flatten().tolist()) for g in everything}) == 48
        for g in everything:
            matrix = torch.tensor(g.matrix, dtype=torch.float64)
            assert torch.linalg.det(matrix).round() == (1 if g.proper else -1)
            assert torch.equal(g.inverse(g(volume)), volume)
            for h in everything[::5]:
                assert torch.equal((g @ h)(volume), g(h(volume)))
                assert (g @ h).name in CUBE
        assert [g.proper for g in everything] == [True] * 24 + [False] * 24
        assert len(elements("O")) == 23
        assert len(elements("O_h", Roll(0, 0, 1))) == 48

    def test_where_a_voxel_goes(self):
        """By the matrix of each element, for every element."""
        for g in CUBE.values():
            volume = torch.zeros(3, 3, 3)
            volume[0, 1, 2] = 1  # x = 1, y = 0, z = -1
            x, y, z = (sum(m * p for m, p in zip(row, (1, 0, -1), strict=True)) for row in g.matrix)
            assert g(volume)[z + 1, y + 1, x + 1] == 1, g.name

    def test_flips_keep_every_size_and_quarter_turns_need_equal_sides(self):
        flat = torch.zeros(2, 4, 4)
        assert CUBE["rotate_z_90"](flat).shape == flat.shape
        assert CUBE["inversion"](flat).shape == flat.shape
        with pytest.raises(ValueError, match="as long along all axes that 'rotate_x_90' exchanges, got 2×4×4"):
            CUBE["rotate_x_90"](flat)

    def test_shifts_along_three_axes(self):
        volume = torch.arange(24).reshape(2, 3, 4)
        assert torch.equal(Roll(1, 2, -1)(volume), volume.roll((1, -2, -1), (0, 1, 2)))
        assert repr(Roll(1, 0, 2)) == "Roll(dx=1, dy=0, dz=2)"
        assert Roll(1, 0, 2).inverse == Roll(-1, 0, -2)
        assert torch.equal(Roll(0, 2, 4).on_grid(volume, (4, 6, 8)), Roll(0, 1, 2)(volume))
        with pytest.raises(ValueError, match="whole pixels"):
            Roll(0, 0, 1).on_grid(volume, (4, 6, 8))
        assert torch.equal(Roll(2).on_grid(torch.arange(4)[None], (8,)), torch.tensor([[1, 2, 3, 0]]))

    def test_exact_permutations_of_networks(self):
        torch.manual_seed(0)
        plain = nn.Conv3d(1, 2, 3, padding=1).double()
        cubic = nn.Conv3d(1, 2, 3, padding=1).double()
        with torch.no_grad():
            weight = cubic.weight.clone()
            cubic.weight.copy_(sum(g(weight) for g in CUBE.values()) / 48)
        x = random(2, 1, 5, 5, 5)

        def violation(model, *transforms):
            return testing.lattice_violation(
                model, x, transforms, input_representation=Field(3), output_representation=Field(3)
            )

        assert max(value.max() for value in violation(cubic, "O_h").values()) < 1e-14
        assert min(value.min() for value in violation(plain, "O_h").values()) > 0.1
        orbit = orbits.lattice("O")[-1]
        assert (len(orbit), orbit.complete) == (24, True)
        found = lm.functional.finite_equivariance_error(
            cubic, x, orbits.lattice("O", "flips_xyz"), input_representation=Field(3), output_representation=Field(3)
        )
        assert max(found.values()) < 1e-14

    def test_fibres_turn_with_their_places(self):
        x = random(2, 1, 6, 6, 6)
        options = {"input_representation": Field(3)}
        for name in ("rotate_x_90", "flip_y", "inversion", "cube_+y+z+x"):
            covectors = testing.lattice_violation(
                gradient, x, name, output_representation=Field(3, fibre=Covectors(3)), **options
            )
            scalars = testing.lattice_violation(gradient, x, name, output_representation=Field(3), **options)
            assert covectors[name].max() < 1e-14
            assert scalars[name].min() > 0.5
        flat = testing.lattice_violation(gradient, x[..., 0], "D4", output_representation=Field(2, fibre=Covectors(2)))
        assert max(value.max() for value in flat.values()) < 1e-14

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: Cubic((0, 1, 1)), "`axes` must be a permutation"),
            (lambda: CUBE["flip_x"](torch.zeros(2, 2)), r"axes \(..., D, H, W\)"),
            (lambda: elements("rotate_w_90"), "for volumes from"),
            (lambda: Roll(0, 0, 1)(torch.zeros(2, 2)), r"\(..., D, H, W\) for Roll"),
            (
                lambda: testing.lattice_violation(
                    torch.sin, torch.zeros(1, 2, 8), "rotate_180", input_representation=Field(1)
                ),
                "no more axes than the grid has, got 'rotate_180'",
            ),
            (
                lambda: testing.lattice_violation(
                    torch.sin, torch.zeros(1, 1, 4, 4, 4), "rotate_x_90", input_representation=Field(3, (1, 1, 2))
                ),
                "must not exchange axes along which samples are",
            ),
        ],
    )
    def test_bad_input(self, make, match):
        with pytest.raises(ValueError, match=match):
            make()


class TestFinite:
    def test_listed_and_displaced_transforms_of_volumes(self):
        torch.manual_seed(0)
        volumes = torch.stack([waves((8, 9, 10), seed, highest=1)[0][None] for seed in range(3)])
        model = nn.Conv3d(1, 1, 3, padding=1, padding_mode="circular").double()
        asked = (
            *orbits.listed("translation", [0.3], dimension=3),
            orbits.uniform("translation", 0.2, samples=1, dimension=3),
            *orbits.displaced("translation", (1,), border="reflect", dimension=3),
            *orbits.displaced("translation_z", (2,), border="crop", dimension=3),
        )
        found = lm.functional.finite_equivariance_error(
            model, volumes, asked, input_representation=Field(3), output_representation=Field(3), resampling=FOURIER
        )
        assert found["translation_x_0.3"] < 1e-12
        assert found["translation_within_0.2"] < 1e-12
        assert all(value.isfinite() for value in found.values())

    def test_crops_of_signals_and_volumes_agree_for_pooled_models(self):
        """A model of the middle alone, which shifts by whole samples move away."""
        pooled = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
        signals = random(3, 2, 40).cumsum(-1)
        (orbit,) = orbits.displaced("translation", (2,), border="crop", dimension=1)
        found = lm.functional.finite_equivariance_error(
            pooled, signals, [orbit], input_representation=Field(1), output_representation=Invariant()
        )
        first, second = signals[..., :-2].mean(-1), signals[..., 2:].mean(-1)
        spread = 2 * len(first) * first.var(0).sum()
        wanted = ((second - first).square().sum() / spread).sqrt()
        torch.testing.assert_close(found["translation_x_2px"], wanted)

    def test_what_counts_is_told_in_physical_space(self):
        """0.7 of a voxel along z is less than half of a slice of two."""
        (orbit,) = orbits.listed("translation_z", [0.7 / 3], dimension=3)
        (element,) = orbit.draw((0,), (6, 8, 10), 0, lm.Resampling())
        assert element.valid(Field(3, (1.0, 1.0, 2.0)), torch.zeros(1, 1, 6, 8, 10)).all()
        assert not element.valid(Field(3), torch.zeros(1, 1, 6, 8, 10)).all()

    def test_spaced_and_turning_fields_act_by_themselves(self):
        volumes = torch.stack([within(21, 3, seed) for seed in range(2)])[:, :, ::2]
        spaced, orbit = Field(3, (1.0, 1.0, 2.0)), orbits.listed("rotation_x", [0.4], dimension=3)
        options = {"input_representation": spaced}

        def measured(declared):
            found = lm.functional.finite_equivariance_error(
                torch.sin, volumes, orbit, output_representation=declared, **options
            )
            return found["rotation_x_0.4"]

        assert measured(spaced) < 0.05
        assert measured(Field(3)) > 0.15
        with pytest.raises(ValueError, match="in units of t for samples that are not equally far apart"):
            lm.functional.finite_equivariance_error(
                torch.sin, volumes, orbits.displaced("rotation", (1,), dimension=3), **options
            )


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Field(4), ValueError, "`dimension` must be 1 for signals"),
        (lambda: Field(3, (1.0, 2.0)), ValueError, "`spacing` must hold 3 positive distances.*x, y, z"),
        (lambda: Field(3, (1.0, 2.0, 0.0)), ValueError, "`spacing` must hold 3 positive"),
        (lambda: Field(2, 2.0), ValueError, "`spacing` must hold 2 positive"),
        (lambda: Field(2, (1.0, math.inf)), ValueError, r"`spacing` must hold 2 positive .*got \(1.0, inf\)"),
        (
            lambda: T.tangents(torch.zeros(1, 4, 4), [generator(2)], lm.PAPER, False, (1,)),
            ValueError,
            "`spacing` must hold 2",
        ),
        (lambda: Field(3, fibre=Vectors(2)), ValueError, "`fibre` must be of dimension 3"),
        (lambda: Field(3, fibre=Field(3)), TypeError, "`fibre` must be a representation with a `size`"),
        (lambda: Field(3, fibre=2), TypeError, r"Pass e.g. `Vectors\(3\)`"),
        (lambda: Field(3).check(torch.zeros(2, 1, 4, 4), "inputs"), ValueError, r"\(B, C, D, H, W\)"),
        (lambda: Field(1).check(torch.zeros(2, 4), "inputs"), ValueError, r"\(B, C, T\)"),
        (lambda: Field(2, fibre=Vectors(2)).check(torch.zeros(2, 3, 4, 4), "output"), ValueError, "multiple of 2 chan"),
        (
            lambda: Field(3).tangents(torch.zeros(1, 1, 4, 4, 4), lm.generators("rotation"), lm.Resampling()),
            ValueError,
            r"`generators` must be of dimension 3 to move Field\(dimension=3",
        ),
        (
            lambda: Image().act(torch.zeros(1, 1, 4, 4), lm.generators("scale", dimension=3)[0], 0.1, lm.Resampling()),
            ValueError,
            r"must be of dimension 2 to move Image\(\)",
        ),
        (lambda: T.apply(torch.zeros(1, 8), "scale", 0.1, dimension=4), ValueError, "`dimension` must be 1"),
        (lambda: T.apply(torch.zeros(1, 8), "scale", 0.1, dimension=1, spacing=(1, 1)), ValueError, "`spacing` must"),
        (lambda: T.apply(torch.zeros(8), "scale", 0.1, dimension=1), ValueError, r"signal \(C, T\) or batch \(N, C, T"),
        (lambda: T.apply(torch.zeros(1, 8, 8), "scale", 0.1, dimension=3), ValueError, r"volume \(C, D, H, W\)"),
        (lambda: T.apply(torch.zeros(1, 1, 4, 4), generator(3), 0.1, dimension=2), ValueError, "of dimension 2"),
        (
            lambda: T.apply(torch.zeros(1, 1, 4, 4), "scale", 0.1, lm.PAPER, dimension=3),
            ValueError,
            "at least two pixels wide.*got 1×4×4",
        ),
        (
            lambda: T.tangents(torch.zeros(1, 4, 4), [*lm.generators("scale"), generator(3)], lm.PAPER),
            ValueError,
            "one",
        ),
        (
            lambda: Image().check(torch.zeros(1, 1, 4, 4, 4), "inputs"),
            ValueError,
            r"Pass `.*Field\(3\)` if they are \(B, C, D, H",
        ),
        (
            lambda: Image().check(torch.zeros(1, 1, 4), "inputs"),
            ValueError,
            r"Pass `.*Field\(1\)` if they are \(B, C, T\)",
        ),
        (
            lambda: T.warp(torch.zeros(1, 1, 4, 4, 4), lm.generators("scale"), torch.zeros(1, 1), lm.PAPER),
            ValueError,
            "of the dimension of the grid, 3",
        ),
        (
            lambda: lm.functional.finite_equivariance_error(
                torch.sin,
                torch.zeros(2, 1, 4, 4, 4),
                orbits.listed("rotation", [0.1]),
                input_representation=Field(3),
                output_representation=Field(3),
            ),
            ValueError,
            r"dimension (of the grid, )?3",
        ),
        (lambda: T.pixels_per_unit(generator(3), (4, 4), lm.PAPER), ValueError, "that of the grid, got 'oblique'"),
        (lambda: grid_sample(torch.zeros(1, 1, 4), torch.zeros(1, 4, 2)), ValueError, "`grid` must have shape"),
        (lambda: grid_sample(torch.zeros(1, 1, 4), torch.zeros(1, 4, 4, 4, 3)), ValueError, r"\(N, C, D, H, W\)"),
        (
            lambda: lm.functional.relative_stability(
                torch.sin, torch.zeros(2, 1, 4, 4, 4), input_representation=Field(3)
            ),
            TypeError,
            "images of scalars",
        ),
        (
            lambda: lm.functional.eq_t(torch.sin, torch.zeros(2, 1, 8), input_representation=Field(1)),
            TypeError,
            "images of scalars",
        ),
        (
            lambda: lm.lie_derivative(torch.sin, torch.zeros(1, 1, 4, 4, 4), "hue", input_representation=Field(3)),
            ValueError,
            "known generators of space",
        ),
        (
            lambda: lm.lie_derivative(torch.sin, torch.zeros(1, 1, 4, 4, 4), "boost", input_representation=Field(3)),
            ValueError,
            "must act on the inputs, got 'boost_x'",
        ),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_channels_last_has_no_generators_of_space():
    with pytest.raises(ValueError, match="dimension"):
        ChannelsLast().tangents(torch.zeros(1, 4, 4, 4, 1), lm.generators("scale", dimension=3), lm.Resampling())
