"""Projective generators of the plane: exact groups of points and images, and homographies of image libraries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import central_difference

import lie_metric as lm
from lie_metric import transforms as T
from lie_metric.algebra import exponential, horizon, spanning_set
from lie_metric.representations import (
    ChannelsLast,
    Field,
    Image,
    Padded,
    Photograph,
    Points,
    Tokens,
)

STENCIL = lm.Resampling()
SIDEWAYS, DOWN = lm.generators("perspective")
MIXED = (
    lm.generators("rotation")[0] + 0.3 * SIDEWAYS - 0.7 * DOWN + 0.2 * lm.generators("translation_y")[0]
).with_name("mixed")
BOTH = ("perspective_x", "perspective_y", "mixed")
GENERATOR = {one.name: one for one in (SIDEWAYS, DOWN, MIXED)}
number = st.floats(-0.2, 0.2, allow_nan=False)
NEAR = {"atol": 1e-9, "rtol": 1e-9}


def random(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(height=48, width=48, count=2):
    y, x = torch.linspace(-1, 1, height).double()[:, None], torch.linspace(-1, 1, width).double()
    return torch.stack([(2 * x + 3 * y + k).sin() + (4 * x * y - k).cos() for k in range(count)])[:, None]


def apart(tensor, margin=12):
    """Without a border, in which padding shows."""
    return tensor[..., margin:-margin, margin:-margin]


def projected(matrix, points):
    """A homography on points (..., 2), written out."""
    x, y = points.unbind(-1)
    last = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2]
    rows = [(row[0] * x + row[1] * y + row[2]) / last for row in matrix[:2]]
    return torch.stack(rows, -1)


class TestAlgebra:
    def test_names_and_groups(self):
        names = [one.name for one in lm.generators("perspective")]
        assert names == ["perspective_x", "perspective_y"]
        assert [one.name for one in lm.generators("projective")][-2:] == names
        assert len(lm.generators("projective")) == 11
        assert [horizon(one) for one in (SIDEWAYS, 2 * DOWN - SIDEWAYS)] == [(1.0, 0.0), (-1.0, 2.0)]
        assert "perspective_x" not in [one.name for one in lm.generators("all")]

    def test_eight_tangents_span_the_projective_group(self):
        basis, matrix = spanning_set(lm.generators("affine", "perspective"))
        assert len(basis) == 8
        assert tuple(matrix.shape) == (11, 8)

    @settings(max_examples=25)
    @given(number, number)
    def test_exponentials_are_a_group(self, s, t):
        S, U, both = (exponential(MIXED, torch.tensor(v, dtype=torch.float64)) for v in (s, t, s + t))
        torch.testing.assert_close(S @ U, both, atol=1e-9, rtol=1e-9)

    def test_exponential_of_one_perspective_is_its_last_row(self):
        found = exponential(DOWN, torch.tensor(0.25, dtype=torch.float64))
        torch.testing.assert_close(
            found, torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0.25, 1]]).double(), atol=1e-15, rtol=0
        )
        assert torch.equal(exponential(MIXED, torch.zeros(2)), torch.eye(3).expand(2, 3, 3))

    def test_units_are_named(self):
        assert lm.figures.unit_of("perspective_x") == "inverse half side"
        assert lm.figures.unit_of("perspective_y", pixels=False) == "inverse unit of length"


KEYPOINTS = {
    "units": Points(2),
    "pixels": Points.of_image(32, 48),
    "about a place": Points(2, 2.5, (1.0, -2.0)),
}


@pytest.fixture(params=KEYPOINTS)
def points(request):
    representation = KEYPOINTS[request.param]
    origin = torch.tensor(representation.origin, dtype=torch.float64)
    return representation, origin + representation.unit * random(4, 5, 2, seed=1)


@pytest.mark.parametrize("name", BOTH)
class TestPoints:
    @settings(max_examples=15)
    @given(s=number, t=number)
    def test_one_parameter_group(self, name, s, t):
        for representation in KEYPOINTS.values():
            X = GENERATOR[name]
            x = torch.tensor(representation.origin).double() + representation.unit * random(4, 5, 2)
            twice = representation.act(representation.act(x, X, s, STENCIL), X, t, STENCIL)
            torch.testing.assert_close(twice, representation.act(x, X, s + t, STENCIL), atol=1e-9, rtol=1e-9)

    def test_tangents_are_the_derivative_of_the_action(self, name, points):
        representation, x = points
        X, h = GENERATOR[name], 1e-3
        steps = [representation.act(x, X, k * h, STENCIL) for k in (-2, -1, 1, 2)]
        wanted = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
        torch.testing.assert_close(representation.tangents(x, [X], STENCIL)[0], wanted, **NEAR)

    def test_linear_in_the_generator(self, name, points):
        representation, x = points
        a, b = GENERATOR[name], lm.generators("shear_x")[0]
        one, two, both = representation.tangents(x, [a, b, 2 * a - 3 * b], STENCIL)
        torch.testing.assert_close(both, 2 * one - 3 * two, **NEAR)
        assert torch.equal(two, representation.tangents(x, [b], STENCIL)[0])

    def test_one_parameter_for_each_sample(self, name, points):
        representation, x = points
        t = torch.linspace(-0.2, 0.2, len(x), dtype=torch.float64)
        each = [representation.act(x[k : k + 1], GENERATOR[name], t[k], STENCIL) for k in range(len(x))]
        torch.testing.assert_close(representation.act(x, GENERATOR[name], t, STENCIL), torch.cat(each))
        assert torch.equal(representation.act(x, GENERATOR[name], 0.0, STENCIL), x)

    def test_in_half_of_the_digits(self, name, points):
        representation, x = points
        for each in (representation.act(x.float(), GENERATOR[name], 0.2, STENCIL),):
            assert each.dtype == torch.float32
            torch.testing.assert_close(
                each.double(), representation.act(x, GENERATOR[name], 0.2, STENCIL), atol=1e-4, rtol=1e-5
            )


def test_points_by_hand():
    """p goes to p / (1 - t p_x): what is at the right comes nearer."""
    x = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    moved = Points(2).act(x, SIDEWAYS, 0.5, STENCIL)
    torch.testing.assert_close(moved, torch.tensor([[2.0, 1.0], [-2 / 3, 1 / 3]]))
    assert Points(2).tangents(x, [SIDEWAYS], STENCIL)[0].tolist() == [[1.0, 0.5], [1.0, -0.5]]


def test_the_bracket_of_a_perspective_and_a_shift():
    """[P_x, T_x] is a stretch along x and a scale: fields (-x², -xy) and (1, 0) give (2x, y)."""
    x = random(5, 2)
    shift = lm.generators("translation_x")[0]

    def along(X, p):
        return Points(2).tangents(p, [X], STENCIL)[0]

    def derivative(X, Y, p):
        return torch.func.jvp(lambda q: along(X, q), (p,), (along(Y, p),))[1]

    bracket = derivative(SIDEWAYS, shift, x) - derivative(shift, SIDEWAYS, x)
    torch.testing.assert_close(bracket, -torch.stack([2 * x[:, 0], x[:, 1]], -1))


@pytest.mark.parametrize("name", BOTH)
class TestImages:
    def test_tangents_are_the_derivative_of_the_action(self, name):
        x, X = random(2, 3, 9, 12), GENERATOR[name]
        t, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        for stencil in (
            STENCIL,
            lm.Resampling("cubic", "border"),
            lm.Resampling("fourier"),
            lm.Resampling(align_corners=True),
        ):
            wanted = torch.func.jvp(lambda s, by=stencil: T.apply(x, X, s, by), (t,), (one,))[1]
            torch.testing.assert_close(Image().tangents(x, [X], stencil)[0], wanted, **NEAR)
            slow = central_difference(lambda s, by=stencil: T.apply(x, X, s, by), 1e-5)
            torch.testing.assert_close(Image().tangents(x, [X], stencil)[0], slow, atol=2e-3, rtol=1e-3)

    def test_one_parameter_group_up_to_interpolation(self, name):
        x, X = smooth(), GENERATOR[name]
        twice, once = T.apply(T.apply(x, X, 0.1), X, 0.15), T.apply(x, X, 0.25)
        assert apart(twice - once).abs().max() < 2e-4
        assert apart(once - x).abs().max() > 0.1
        assert torch.equal(T.apply(x, X, 0.0), x)

    def test_linear_in_the_generator(self, name):
        x, a, b = random(2, 1, 8, 8), GENERATOR[name], lm.generators("scale")[0]
        one, two, both = Image().tangents(x, [a, b, 2 * a - 3 * b], STENCIL)
        torch.testing.assert_close(both, 2 * one - 3 * two)

    def test_keypoints_move_with_what_they_stand_on(self, name):
        """The moved image has at the moved keypoint what the image had at the keypoint."""
        height, width = 64, 80
        x, X, kind = smooth(height, width, 1), GENERATOR[name], Points.of_image(64, 80)
        places = torch.tensor(kind.origin).double() + 16 * random(1, 30, 2)

        def read(image, at):
            grid = (at + 0.5) / torch.tensor([width, height]) * 2 - 1
            return lm.resampling.grid_sample(image, grid[:, None])[0, 0, 0]

        moved = read(T.apply(x, X, 0.2), kind.act(places, X, 0.2, STENCIL))
        assert (read(x, places) - read(T.apply(x, X, 0.2), places)).abs().max() > 0.1
        torch.testing.assert_close(moved, read(x, places), atol=1e-5, rtol=0)
        # To first order: X·x at a place is the slope against the keypoint's velocity.
        x.requires_grad_()
        at = places.clone().requires_grad_()
        slope = torch.autograd.grad(read(x, at).sum(), at)[0]
        change = read(Image().tangents(x.detach(), [X], STENCIL)[0], places)
        torch.testing.assert_close(
            change, -(slope * kind.tangents(places, [X], STENCIL)[0]).sum(-1)[0], atol=1e-3, rtol=0
        )

    def test_layouts_agree(self, name):
        x, X = random(2, 3, 6, 8), GENERATOR[name]
        wanted, turned = Image().tangents(x, [X], STENCIL)[0], Image().act(x, X, 0.2, STENCIL)
        rows, last = x.flatten(2).mT, x.movedim(1, -1)
        tokens = torch.cat([torch.ones(2, 1, 3).double(), rows], 1)
        for kind, tensor, back in (
            (ChannelsLast(), last, lambda moved: moved.movedim(-1, 1)),
            (Tokens((6, 8), prefix=1), tokens, lambda moved: moved[:, 1:].mT.unflatten(-1, (6, 8))),
            (Photograph(), x, lambda moved: moved),
            (Field(2), x, lambda moved: moved),
        ):
            torch.testing.assert_close(back(kind.tangents(tensor, [X], STENCIL)[0]), wanted)
            torch.testing.assert_close(back(kind.act(tensor, X, 0.2, STENCIL)), turned)

    @pytest.mark.parametrize("stencil", [STENCIL, lm.Resampling(align_corners=True)], ids=str)
    def test_a_border_moves_with_the_field_inside(self, name, stencil):
        """Of a map with a border the inner part is moved as the field alone is, away from the border."""
        X, sides = GENERATOR[name], (2, 5, 3, 1)
        wide = smooth(44, 47, 1)
        inner = wide[..., 3:-1, 2:-5]
        padded = Padded(Image(), sides)
        for inside, alone in (
            (padded.tangents(wide, [X], stencil)[0], Image().tangents(inner, [X], stencil)[0]),
            (padded.act(wide, X, 0.1, stencil), Image().act(inner, X, 0.1, stencil)),
        ):
            torch.testing.assert_close(apart(inside[..., 3:-1, 2:-5]), apart(alone), atol=1e-4, rtol=0)


class TestAgainstHomographies:
    """What image libraries do with four corners or a 3x3 matrix of pixels, worked out from the formula alone."""

    @staticmethod
    def matrix(t_x, t_y, height, width, shift):
        """Where content goes, in pixels with the first pixel's centre at ``shift``."""
        half = min(height, width) / 2
        units = torch.tensor(
            [[half, 0, width / 2 - 0.5 + shift], [0, half, height / 2 - 0.5 + shift], [0, 0, 1]], dtype=torch.float64
        )
        ours = torch.eye(3, dtype=torch.float64)
        ours[2, :2] = -torch.tensor([t_x, t_y], dtype=torch.float64)
        return units @ ours @ torch.linalg.inv(units)

    @pytest.mark.parametrize(("name", "t"), [("perspective_x", 0.3), ("perspective_y", -0.25)])
    @pytest.mark.parametrize("size", [(32, 32), (24, 40)])
    def test_torchvision(self, name, t, size):
        functional = pytest.importorskip("torchvision.transforms.v2.functional")
        height, width = size
        if t * max(size) / min(size) > 0.9:
            t /= 2
        parameters = (t, 0) if name[-1] == "x" else (0, t)
        corners = torch.tensor([[0.0, 0], [width, 0], [width, height], [0, height]]).double()
        ends = projected(self.matrix(*parameters, *size, 0.5), corners)  # it counts from the edge of the first pixel
        x = random(2, 3, *size)
        theirs = functional.perspective(
            x, corners.tolist(), ends.tolist(), interpolation=functional.InterpolationMode.BILINEAR
        )
        ours = T.apply(x, name, t, lm.Resampling("bilinear", "zeros"))
        assert (ours - x).abs().max() > 0.5
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)

    @pytest.mark.parametrize("size", [(32, 32), (24, 40)])
    def test_kornia(self, size):
        kornia = pytest.importorskip("kornia")
        x, (t_x, t_y) = random(2, 3, *size), (0.2, -0.3)
        theirs = kornia.geometry.warp_perspective(x, self.matrix(t_x, t_y, *size, 0.0).expand(2, 3, 3), size)
        together = (t_x * SIDEWAYS + t_y * DOWN).with_name("both")
        ours = T.apply(x, together, 1.0, lm.Resampling("bilinear", "zeros"))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        points = random(2, 7, 2) * 10 + 12
        moved = kornia.geometry.transform_points(self.matrix(t_x, t_y, *size, 0.0).expand(2, 3, 3), points)
        torch.testing.assert_close(Points.of_image(*size).act(points, together, 1.0, STENCIL), moved)

    def test_derivatives_of_their_operators_at_the_identity(self):
        """A central difference of bilinear reading is the slope of the cubic stencil."""
        kornia = pytest.importorskip("kornia")
        functional = pytest.importorskip("torchvision.transforms.v2.functional")
        x, size = random(1, 2, 20, 20), (20, 20)
        corners = torch.tensor([[0.0, 0], [20, 0], [20, 20], [0, 20]]).double()

        def by_kornia(t):
            return kornia.geometry.warp_perspective(x, self.matrix(t, 0, *size, 0.0)[None], size)

        def by_torchvision(t):
            ends = projected(self.matrix(t, 0, *size, 0.5), corners)
            return functional.perspective(
                x, corners.tolist(), ends.tolist(), interpolation=functional.InterpolationMode.BILINEAR
            )

        wanted = Image().tangents(x, [SIDEWAYS], lm.Resampling("cubic"))[0]
        for operator, h, within in ((by_kornia, 1e-6, 1e-4), (by_torchvision, 1e-4, 2e-2)):
            found = (operator(h) - operator(-h)) / (2 * h)
            torch.testing.assert_close(apart(found, 1), apart(wanted, 1), atol=within, rtol=0)
        assert apart(wanted, 1).abs().max() > 3
