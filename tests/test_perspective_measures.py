"""Measures along projective generators: invariants, frames, every measure, the monitor, and what is refused."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from references import central_difference
from test_perspective import DOWN, MIXED, NEAR, SIDEWAYS, STENCIL, random, smooth
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric import transforms as T
from lie_metric.algebra import horizon
from lie_metric.representations import (
    Boxes,
    Covectors,
    DirectSum,
    Field,
    Flow,
    Image,
    Invariant,
    Linear,
    Masked,
    Photograph,
    Points,
    Tensors,
    Vectors,
    Velocities,
)
from lie_metric.representations.affine import content_map


def cross_ratio(points):
    """Of four points (B, 4, 2) on a line."""
    a, b, c, d = points[..., 0].unbind(-1)
    return (a - c) * (b - d) / ((b - c) * (a - d))


def five_points(points):
    """The invariant of five points (B, 5, 2) of the plane that every projective map leaves."""

    def area(i, j, k):
        return torch.linalg.det(nn.functional.pad(points[:, [i, j, k]], (0, 1), value=1.0))

    return area(3, 2, 0) * area(4, 1, 0) / (area(3, 1, 0) * area(4, 2, 0))


def areas(points):
    """A ratio that affine maps leave, and perspectives do not."""
    one, two = (
        torch.linalg.det(nn.functional.pad(points[:, list(k)], (0, 1), value=1.0)) for k in ((0, 1, 2), (1, 2, 3))
    )
    return one / two


KEYS = {"input_representation": Points(2), "output_representation": Invariant()}
PENTAGON = torch.tensor([[0.0, 0.0], [0.9, 0.1], [0.5, 0.8], [-0.4, 0.7], [-0.8, -0.3]], dtype=torch.float64)


class TestInvariants:
    def collinear(self):
        along = torch.tensor([-0.8, -0.2, 0.3, 0.9], dtype=torch.float64) + 0.05 * random(6, 4)
        start, direction = 0.3 * random(6, 1, 2, seed=1), random(6, 1, 2, seed=2) * 0.2 + torch.tensor([0.6, 0.3])
        return start + along[..., None] * direction

    def test_the_cross_ratio_of_four_points_on_a_line(self):
        found = lm.functional.relative(cross_ratio, self.collinear(), "projective", **KEYS)
        assert max(found.values()) < 1e-13

    def test_five_points_of_the_plane(self):
        x = PENTAGON + 0.1 * random(8, 5, 2)
        found = lm.functional.relative(five_points, x, "projective", **KEYS)
        assert len(found) == 11
        assert max(found.values()) < 1e-13
        metric = lm.FiniteEquivarianceError(lm.orbits.uniform("perspective", 0.3), **KEYS)
        metric.update(five_points, x)
        assert metric.compute()["perspective_within_0.3"] < 1e-12
        lm.testing.assert_equivariant(five_points, x, "projective", **KEYS)

    def test_affine_invariants_are_not_projective_ones(self):
        x = PENTAGON[:4] + 0.1 * random(8, 4, 2)
        found = lm.functional.relative(areas, x, "projective", **KEYS)
        assert max(value for name, value in found.items() if "perspective" not in name) < 1e-13
        assert min(found["perspective_x"], found["perspective_y"]) > 0.05
        with pytest.raises(AssertionError, match="under 'perspective_"):
            lm.testing.assert_equivariant(areas, x, "projective", **KEYS)

    def test_a_planted_violation_at_its_size(self):
        """L of five_points + x/10 of the first point is x²/10 along the perspective in x, and xy/10 in y."""
        x = PENTAGON + 0.1 * random(8, 5, 2)

        def planted(points):
            return five_points(points) + 0.1 * points[:, 0, 0]

        found = lm.lie_derivative(planted, x, "perspective", **KEYS)
        first = x[:, 0]
        torch.testing.assert_close(found["perspective_x"], 0.1 * first[:, 0] ** 2, **NEAR)
        torch.testing.assert_close(found["perspective_y"], 0.1 * first[:, 0] * first[:, 1], **NEAR)
        lee = lm.functional.lee(planted, x, "perspective", **KEYS)
        assert lee["perspective_x"].item() == pytest.approx((0.1 * first[:, 0] ** 2).square().mean().item())

    def test_mixed_generators_are_the_sums(self):
        x = PENTAGON[:4] + 0.1 * random(8, 4, 2)
        found = lm.lie_derivative(areas, x, ("perspective", MIXED), **KEYS)
        torch.testing.assert_close(found["mixed"], 0.3 * found["perspective_x"] - 0.7 * found["perspective_y"], **NEAR)


class TestFrames:
    @pytest.mark.parametrize("size", [(16, 16), (12, 20), (20, 12)])
    @pytest.mark.parametrize("corners", [False, True])
    def test_what_is_read_inside(self, size, corners):
        t, image = torch.tensor([[0.3], [-0.4]], dtype=torch.float64), torch.zeros(2, 1, *size)
        found = T.reads_inside(image, (SIDEWAYS,), t, lm.Resampling(align_corners=corners))
        half, edge = (min(size) - corners) / 2, -0.5 * (not corners)
        for k, parameter in enumerate((0.3, -0.4)):
            for row in range(size[0]):
                for column in range(size[1]):
                    x, y = (column - (size[1] - 1) / 2) / half, (row - (size[0] - 1) / 2) / half
                    last = 1 + parameter * x
                    at = x / last * half + (size[1] - 1) / 2, y / last * half + (size[0] - 1) / 2
                    inside = all(
                        edge - 1e-9 <= a <= side - 1 - edge + 1e-9 for a, side in zip(at, size[::-1], strict=True)
                    )
                    assert found[k, row, column].item() is inside

    def test_a_single_pixel_stays(self):
        for stencil in (STENCIL, lm.Resampling(align_corners=True)):
            x = random(2, 3, 1, 1)
            assert torch.equal(T.apply(x, SIDEWAYS, 0.4, stencil), x)

    def test_beyond_the_horizon_nothing_is_inside(self):
        found = T.reads_inside(torch.zeros(1, 1, 8, 8), (SIDEWAYS,), torch.tensor([[-2.0]]).double(), STENCIL)[0]
        assert not found[:, 6:].any()  # x > 1/2
        assert found[3:5, 3:5].all()

    @pytest.mark.parametrize("size", [(32, 32), (24, 40)])
    @pytest.mark.parametrize("name", ["perspective_x", "perspective_y"])
    @pytest.mark.parametrize("pixels", [1, 2, 8])
    def test_displacements_are_root_mean_squares_over_the_frame(self, name, size, pixels):
        (orbit,) = lm.orbits.displaced(name, (pixels,))
        t, half, total = orbit.parameter(size, STENCIL), min(size) / 2, 0.0
        for row in range(size[0]):
            for column in range(size[1]):
                x, y = (column - (size[1] - 1) / 2) / half, (row - (size[0] - 1) / 2) / half
                last = 1 + t * (x if name[-1] == "x" else y)
                total += (x / last - x) ** 2 + (y / last - y) ** 2
        assert half * math.sqrt(total / size[0] / size[1]) == pytest.approx(pixels, rel=1e-6)
        assert not orbit.shifts

    def test_small_displacements_are_those_of_the_velocity(self):
        t = lm.orbits.displaced("perspective_y", (1e-3,))[0].parameter((20, 30), STENCIL)
        assert t * T.pixels_per_unit(DOWN, (20, 30), STENCIL) == pytest.approx(1e-3, rel=1e-4)

    def test_a_distance_that_is_reached_shortly_before_the_horizon(self):
        """Of exp(t (P_x + T_x)) it enters a frame of 24×40 pixels at t = 0.69, which is tried on the way."""
        both = (SIDEWAYS + lm.generators("translation_x")[0]).with_name("drawn in")
        t = lm.orbits.displaced(both, (12,))[0].parameter((24, 40), STENCIL)
        x, y = ((torch.arange(side) - (side - 1) / 2).double() / 12 for side in (40, 24))
        last = x * math.sinh(t) + math.cosh(t)
        moved = (x * math.cosh(t) + math.sinh(t)) / last - x, y[:, None] / last - y[:, None]
        assert 0 < t < math.atanh(0.6)
        assert 12 * (moved[0] ** 2 + moved[1] ** 2).mean().sqrt().item() == pytest.approx(12, rel=1e-6)

    def test_a_shift_with_a_perspective_is_no_shift_of_whole_pixels(self):
        both = (lm.generators("translation_x")[0] + 0.5 * SIDEWAYS).with_name("both")
        (orbit,) = lm.orbits.displaced(both, (1.5,))
        assert not orbit.shifts

    def test_finite_errors(self):
        """What does the same at every place is equivariant up to interpolation; a filter along x is not."""
        x = smooth(32, 32, 4)
        orbits = (lm.orbits.uniform("perspective", 0.3), *lm.orbits.displaced("perspective_x", (1, 2, 8)))
        grid = {"output_representation": Image()}
        same = lm.functional.finite_equivariance_error(lambda v: 2 * v + v**2, x, orbits, **grid)
        assert list(same) == ["perspective_within_0.3", "perspective_x_1px", "perspective_x_2px", "perspective_x_8px"]
        assert max(same.values()) < 0.03
        slanted = lm.functional.finite_equivariance_error(lambda v: v * torch.linspace(0, 1, 32), x, orbits, **grid)
        assert all(slanted[name] > 1.5 * same[name] for name in same)

    def test_the_curve_tends_to_the_local_error(self):
        x, model = smooth(32, 32, 4), lambda v: v[..., 20:24, 5:9].mean((2, 3))
        finite, local = (
            lm.FiniteEquivarianceError(lm.orbits.displaced("perspective_x", (0.01,))),
            lm.LocalEquivarianceError("perspective_x"),
        )
        for metric in (finite, local):
            metric.update(model, x)
        assert finite.linearity(local)[0]["perspective_x_0.01px"].item() == pytest.approx(1, abs=1e-2)


class TestMeasures:
    x = random(4, 3, 16, 16, seed=3)

    def net(self):
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 4, 3, 2, 1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 5)).double()

    @pytest.mark.parametrize("method", ["forward", "reverse", "double_backward", "difference"])
    def test_against_a_finite_difference_of_the_model(self, method):
        model = self.net()
        with torch.no_grad():
            found = lm.lie_derivative(model, self.x, ("perspective", MIXED), method=method)
        for X in (SIDEWAYS, DOWN, MIXED):
            slow = central_difference(lambda t, X=X: model(T.apply(self.x, X, t)), 1e-4).detach()
            torch.testing.assert_close(found[X.name], slow, atol=1e-6, rtol=1e-5)

    def test_maps_of_channels_are_equivariant(self):
        layer = nn.Conv2d(3, 5, 1).double()
        lm.testing.assert_equivariant(layer, self.x, "projective")
        assert (
            lm.testing.equivariance_violation(nn.Conv2d(3, 5, 3, padding=1).double(), self.x, "perspective")[
                "perspective_x"
            ].min()
            > 0.05
        )

    def test_directions_of_one_span(self):
        metric = lm.LocalEquivarianceError(("affine", "perspective"))
        metric.update(self.net(), self.x)
        values, directions = metric.principal_directions()
        assert values.shape == (8,)
        assert directions.shape == (8, 11)
        own = lm.Generator.combination("least", metric.generators, directions[0])
        assert any(horizon(own))
        again = lm.LocalEquivarianceError(own)
        again.update(self.net(), self.x)
        assert again.lee()["least"].item() == pytest.approx(values[0].item(), rel=1e-6, abs=1e-18)

    def test_pixels_are_units_of_it(self):
        metric = lm.LocalEquivarianceError("perspective")
        metric.update(self.net(), self.x)
        moved = T.pixels_per_unit(SIDEWAYS, (16, 16), STENCIL)
        assert metric.relative(units="pixel")["perspective_x"] * moved == pytest.approx(
            metric.relative()["perspective_x"]
        )

    def test_layers_add_up(self):
        report = lm.layerwise_equivariance_error(self.net(), self.x, ("translation_x", "perspective"))
        assert max(report.residual.values()) < 1e-10

    def test_floors(self):
        images = smooth(24, 24, 6)
        floor = lm.functional.noise_floor(images, "perspective", resampling=lm.Resampling("fourier", "reflection"))
        assert max(floor.values()) < 1e-10
        bilinear = lm.functional.noise_floor(images, "perspective", resampling=lm.PAPER)
        assert min(bilinear.values()) > 1e-2
        found = lm.functional.stencil_error(self.net(), self.x, "perspective")
        assert all(0 < value < 10 for value in found.values())

    def test_a_penalty(self):
        model = self.net()
        lm.equivariance_penalty(model, self.x, "perspective").backward()
        assert model[0].weight.grad.abs().max() > 0

    def test_photographs_change_their_colours_too(self):
        photo, x = Photograph(), self.x
        both = (SIDEWAYS + lm.generators("hue")[0]).with_name("both")
        found, hue = photo.tangents(x, [both, lm.generators("hue")[0]], STENCIL)
        torch.testing.assert_close(found, hue + photo.tangents(x, [SIDEWAYS], STENCIL)[0])
        moved = photo.act(photo.act(x, SIDEWAYS, 0.2, STENCIL), lm.generators("hue")[0], 0.2, STENCIL)
        torch.testing.assert_close(photo.act(x, both, 0.2, STENCIL), moved)
        metric = lm.LocalEquivarianceError(("perspective", "photometric"), input_representation=photo)
        metric.update(self.net(), x)
        assert len(metric.relative()) == 7

    def test_points_that_do_not_count_may_be_anywhere(self):
        kind = Masked(Points(2), torch.tensor([[True, False]]))
        moved = kind.act(torch.tensor([[[0.5, 0.0], [50.0, 0.0]]]), SIDEWAYS, 0.5, STENCIL)
        torch.testing.assert_close(moved, torch.tensor([[[2 / 3, 0.0], [50.0, 0.0]]]))

    def test_own_fields_under_the_name(self):
        """A flow or a matrix under the name is the user's own."""
        x = random(3, 2)
        flow = Flow({"perspective_x": lambda p: p[:, :1] * p}, dimension=2)
        torch.testing.assert_close(flow.tangents(x, [SIDEWAYS], STENCIL), Points(2).tangents(x, [SIDEWAYS], STENCIL))
        spin = Linear({"perspective_x": [[0, 1], [-1, 0]]})
        assert torch.equal(spin.tangents(x, [SIDEWAYS], STENCIL)[0], torch.stack([x[:, 1], -x[:, 0]], 1))

    def test_arrows_point_to_where_the_content_goes(self):
        pytest.importorskip("matplotlib")
        arrows = lm.figures.vector_field(SIDEWAYS).axes[0].collections[0]
        at = torch.tensor(arrows.get_offsets())
        shown = torch.stack([torch.tensor(arrows.U), torch.tensor(arrows.V)], 1)
        torch.testing.assert_close(shown.double(), at[:, :1] * at, atol=1e-6, rtol=0)


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(4 * 49, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_one_argument_of_the_monitor():
    loader = DataLoader(TensorDataset(random(16, 1, 16, 16).float(), torch.arange(16) % 3), 8)
    monitor = lm.EquivarianceMonitor(("perspective", "affine"), num_images=16)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), loader, loader)
    for family in ("equivariance", "equivariance_finite", "equivariance_linearity", "equivariance_floor"):
        for name in ("perspective_x", "perspective_y", "rotation"):
            assert trainer.callback_metrics[f"{family}/{name}"] > 0, (family, name)


KEYPOINT_PAIR = Linear({"perspective_x": torch.eye(4), "perspective_y": torch.zeros(4, 4)})


def keypoint_measure(**options):
    return lm.lie_derivative(lambda v: v, random(2, 4), "perspective", **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        # No such name elsewhere.
        (lambda: lm.generators("perspective_x", dimension=3), "known generators of space, got 'perspective_x'"),
        (lambda: lm.generators("perspective", dimension=1), "known generators of the line, got 'perspective'"),
        # What does not read them says so before anything runs.
        *(
            (
                lambda kind=kind: lm.LocalEquivarianceError("perspective_x", input_representation=kind),
                "got 'perspective_x' with .*`Image` for intensities and perspectives",
            )
            for kind in (Vectors(2), Covectors(2), Velocities(2), Tensors(2, 2), Boxes(2), Field(2, fibre=Vectors(2)),
                         DirectSum((Points(2), Vectors(2))))
        ),
        (
            lambda: lm.LocalEquivarianceError(
                "perspective", input_representation={"image": Image(), "axis": Vectors(2)}
            ),
            r"all parts of the inputs, got 'perspective_x' .* \{'axis': Vectors\(dimension=2\)\} do not read",
        ),
        (
            lambda: lm.LocalEquivarianceError(
                lm.Generator("g", ((0,) * 4,) * 3, charges={"perspective_x": 1}), input_representation=Points(3)
            ),
            "which none of .*Points.dimension=3.* reads",
        ),
        # Outputs are met as they come.
        *(
            (lambda kind=kind: keypoint_measure(input_representation=KEYPOINT_PAIR, output_representation=kind), match)
            for kind, match in (
                (Vectors(4), "of dimension 4|affine to move Vectors"),
                (Boxes(2), r"affine to move Boxes\(dimension=2.* amount at every place. .*corners as `Points`"),
                (DirectSum((Points(2), Points(2))), "affine to move .*a part of their own: `Points"),
            )
        ),
        *(
            (lambda kind=kind, x=x: kind.tangents(x, [SIDEWAYS], STENCIL), "affine to move .*, got 'perspective_x'")
            for kind, x in (
                (Vectors(2), random(2, 2)), (Covectors(2), random(2, 2)), (Velocities(2), random(2, 2)),
                (Tensors(2, 2), random(2, 2, 2)), (Boxes(2), random(2, 4)),
            )
        ),
        (
            lambda: Boxes(2).act(random(2, 4), SIDEWAYS, 0.1, STENCIL),
            "affine to move Boxes.*corners as `Points`",
        ),
        (
            lambda: Field(2, fibre=Vectors(2)).act(random(1, 2, 4, 4), SIDEWAYS, 0.1, STENCIL),
            "affine to move Field.*such as its norm at every place",
        ),
        (lambda: Linear({"scale": torch.eye(2)}).tangents(random(1, 2), [SIDEWAYS], STENCIL), "combinations of"),
        (lambda: content_map(SIDEWAYS, torch.tensor(0.1)), "affine to move 'points by a matrix'"),
        (
            lambda: T.apply(random(1, 4, 4, 4), lm.Generator("g", ((0,) * 4,) * 3, charges={"perspective_x": 1}), 0.1),
            "must be of the plane to have a perspective, got 'g' of dimension 3 with .'perspective_x'.*of your own",
        ),
        # The horizon.
        (lambda: T.perspective(random(1, 8, 8), 1.0), r"horizon .* a frame of 8×8 pixels, got a denominator of 0 "),
        (lambda: T.perspective(random(1, 8, 16), -0.5), r"\|t\| < 0.5 along x and \|t\| < 1 along y"),
        (lambda: T.perspective(random(2, 1, 8, 8), torch.tensor([0.1, 1.5]), "y"), "got a denominator of -0.5 there"),
        (
            lambda: torch.func.vmap(lambda t: T.perspective(PENTAGON[None], t))(torch.tensor([0.5, 1.5])),
            "got a denominator of -0.5 there",
        ),
        (lambda: Points(2).act(random(1, 3, 2) + 3, SIDEWAYS, 0.5, STENCIL), "the points of Points.*points far from"),
        (
            lambda: Points(2).act(torch.tensor([[1.0, 0.0]]).double(), SIDEWAYS, 1 - 1e-7, STENCIL),
            "got a denominator of 1e-07 there",
        ),
        (
            lambda: T.apply(random(1, 8, 16), SIDEWAYS, 0.48, lm.Resampling(align_corners=True)),
            r"a denominator of -0.0286 .*\|t\| < 0.467 along x and \|t\| < 1 along y",
        ),
        (lambda: T.apply(random(1, 8, 8), DOWN, 0.6, spacing=(1, 2)), r"-0.2 .*\|t\| < 1 along x and \|t\| < 0.5 "),
        (
            lambda: lm.functional.finite_equivariance_error(
                lambda v: v.mean((2, 3)), random(4, 3, 8, 8), lm.orbits.listed("perspective_x", (1.2,))
            ),
            "must leave the horizon of a projective map outside",
        ),
        (lambda: T.perspective(random(1, 8, 8), 0.1, "z"), "`axis` must be 'x'"),
        (
            lambda: lm.orbits.displaced(
                (SIDEWAYS + lm.generators("translation_x")[0]).with_name("drawn in"), (5.2,)
            )[0].parameter((8, 8), STENCIL),
            "got 5.2 for 'drawn in' and images of 8×8, where it comes to 5.14. Pass fewer",
        ),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
