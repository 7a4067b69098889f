"""Points, vectors, tensors, irreps and given matrices: exact one-parameter groups, and what they leave at rest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lie_metric as lm
from lie_metric.algebra import coefficients
from lie_metric.representations import (
    Boxes,
    Covectors,
    DirectSum,
    Flow,
    Irreps,
    Linear,
    Masked,
    Packed,
    Parts,
    Points,
    Tensors,
    Vectors,
    Velocities,
)
from lie_metric.representations.affine import content_map

STENCIL = lm.Resampling()
number = st.floats(-1, 1, allow_nan=False)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator(dimension, seed=0, **charges):
    return lm.Generator("g", random(dimension, dimension + 1, seed=seed).tolist(), charges=charges)


SPACE = {
    "points": (Points(3), (4, 5, 3)),
    "pixels": (Points(3, 2.5, (1.0, -2.0, 0.5)), (4, 5, 3)),
    "vectors": (Vectors(3), (4, 3)),
    "covectors": (Covectors(3), (4, 2, 3)),
    "velocities": (Velocities(3), (4, 5, 3)),
    "scalars": (Tensors(3, 0), (4, 2)),
    "matrices": (Tensors(3, 2), (4, 2, 3, 3)),
    "rank 3": (Tensors(3, 3), (2, 3, 3, 3)),
    "side by side": (DirectSum((Points(3, 2.5, (1.0, -2.0, 0.5)), Covectors(3), Tensors(3, 0))), (4, 5, 7)),
}


@pytest.fixture(params=SPACE)
def moved(request):
    representation, shape = SPACE[request.param]
    return representation, random(*shape, seed=1)


def act(representation, tensor, X, t):
    return representation.act(tensor, X, t, STENCIL)


class TestGroups:
    def test_tangents_are_the_derivative_of_the_action(self, moved):
        representation, x = moved
        X, h = generator(3, boost_x=0.3, boost_z=-1.0), 1e-4
        steps = [act(representation, x, X, k * h) for k in (-2, -1, 1, 2)]
        wanted = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
        torch.testing.assert_close(representation.tangents(x, [X], STENCIL)[0], wanted, atol=1e-9, rtol=1e-9)

    @given(number, number)
    def test_one_parameter_group(self, s, t):
        for representation, shape in SPACE.values():
            x, X = random(*shape), generator(3, boost_y=0.7)
            twice = act(representation, act(representation, x, X, s), X, t)
            torch.testing.assert_close(twice, act(representation, x, X, s + t), atol=1e-9, rtol=1e-9)

    def test_zero_is_the_identity(self, moved):
        representation, x = moved
        torch.testing.assert_close(act(representation, x, generator(3), 0.0), x, atol=0, rtol=0)

    def test_one_parameter_for_each_sample(self, moved):
        representation, x = moved
        t = torch.linspace(-1, 1, len(x), dtype=torch.float64)
        each = [act(representation, x[k : k + 1], generator(3), t[k]) for k in range(len(x))]
        torch.testing.assert_close(act(representation, x, generator(3), t), torch.cat(each))

    def test_linear_in_the_generator(self, moved):
        representation, x = moved
        a, b = generator(3, 1, boost_x=1.0), generator(3, 2, boost_y=-2.0)
        one, two, both = representation.tangents(x, [a, b, 2 * a - 3 * b], STENCIL)
        torch.testing.assert_close(both, 2 * one - 3 * two)

    def test_maps_act_as_the_exponentials_do(self, moved):
        representation, x = moved
        X, t = generator(3), torch.tensor(0.4, dtype=torch.float64)
        by_map = representation.transform(x, content_map(X, t)[None])
        torch.testing.assert_close(by_map, act(representation, x, X, 0.4))

    def test_maps_compose(self, moved):
        representation, x = moved
        a, b = (torch.cat([random(1, 3, 3, seed=k), random(1, 3, 1, seed=k + 9)], dim=-1) for k in (3, 4))
        both = torch.cat([b[..., :3] @ a[..., :3], b[..., :3] @ a[..., 3:] + b[..., 3:]], dim=-1)
        twice = representation.transform(representation.transform(x, a), b)
        torch.testing.assert_close(twice, representation.transform(x, both))


class TestMeanings:
    def test_small_turns_keep_lengths(self):
        for angle in (0.01, 0.04, 0.3):
            moved = act(Points(2), torch.tensor([[1.0, 0.0]], dtype=torch.float64), lm.generators("rotation")[0], angle)
            assert abs(moved.norm().item() - 1) < 1e-15

    def test_points_move_with_the_content_of_images(self):
        grid = torch.stack(torch.meshgrid(*[torch.arange(40.0)] * 2, indexing="xy"), dim=-1)
        place, size = torch.tensor([24.0, 15.0]), (40, 40)
        image = (-(grid - place).square().sum(-1) / 8).exp()[None, None]
        for name in ("translation_x", "translation_y", "rotation", "scale", "shear_x", "hyperbolic_rotation"):
            (X,) = lm.generators(name)
            turned = lm.transforms.apply(image, X, 0.2)[0, 0]
            found = (grid * turned[..., None]).sum((0, 1)) / turned.sum()
            wanted = act(Points.of_image(*size), place[None].double(), X, 0.2)[0]
            torch.testing.assert_close(found.double(), wanted, atol=5e-3, rtol=0)

    def test_covectors_keep_their_product_with_vectors(self):
        v, c, X = random(4, 3), random(4, 3, seed=1), generator(3)
        after = act(Vectors(3), v, X, 0.7), act(Covectors(3), c, X, 0.7)
        torch.testing.assert_close((after[0] * after[1]).sum(-1), (v * c).sum(-1))

    def test_gradients_of_a_function_of_points_are_covectors(self):
        # f(g⁻¹ y) has at y the gradient that f had at x = g⁻¹ y, moved.
        X, t, x = generator(3), 0.3, random(5, 3)
        f = lambda p: (p.square().sum(-1) * p[..., 0]).sin()  # noqa: E731
        gradient = torch.func.grad(lambda p: f(p).sum())
        y = act(Points(3), x, X, t)
        moved = torch.func.grad(lambda p: f(act(Points(3), p, X, -t)).sum())(y)
        torch.testing.assert_close(moved, act(Covectors(3), gradient(x), X, t))

    def test_matrices_move_as_products_of_vectors(self):
        v, w, X = random(4, 3), random(4, 3, seed=1), generator(3)
        outer = torch.einsum("bi,bj->bij", v, w)
        turned = torch.einsum("bi,bj->bij", act(Vectors(3), v, X, 0.5), act(Vectors(3), w, X, 0.5))
        torch.testing.assert_close(act(Tensors(3, 2), outer, X, 0.5), turned)

    def test_boosts_add_to_velocities_alone(self):
        (boost,) = lm.generators("boost_y", dimension=3)
        v = random(2, 3)
        torch.testing.assert_close(v - act(Velocities(3), v, boost, 0.5), torch.tensor([[0, 0.5, 0]] * 2).double())
        for still in (Points(3), Vectors(3), Covectors(3)):
            assert torch.equal(act(still, v, boost, 0.5), v)

    def test_boxes_are_two_corners(self):
        boxes, X = random(3, 4), lm.generators("stretch_x")[0] + lm.generators("translation_y")[0]
        corners = act(Points(2), boxes.reshape(3, 2, 2), X, 0.3).reshape(3, 4)
        torch.testing.assert_close(act(Boxes(2), boxes, X, 0.3), corners)

    @pytest.mark.parametrize("name", ["rotation", "shear_y", "hyperbolic_rotation"])
    def test_boxes_do_not_turn(self, name):
        with pytest.raises(ValueError, match=f"parallel to the axes, got '{name}'"):
            Boxes(2).tangents(random(1, 4), lm.generators(name), STENCIL)

    def test_given_matrices_combine(self):
        a, b = random(5, 5), random(5, 5, seed=1)
        kind = Linear({"translation_x": a, "rotation": b})
        x = random(2, 5, seed=2)
        X = 2 * lm.generators("translation_x")[0] - lm.generators("rotation")[0]
        torch.testing.assert_close(kind.tangents(x, [X], STENCIL)[0], x @ (2 * a - b).mT)
        torch.testing.assert_close(act(kind, x, X, 0.1), x @ torch.linalg.matrix_exp(0.1 * (2 * a - b)).mT)
        with pytest.raises(ValueError, match=r"combinations of \['translation_x', 'rotation'\].*got 'scale'"):
            kind.tangents(x, lm.generators("scale"), STENCIL)
        with pytest.raises(TypeError, match="what a map of space does"):
            kind.transform(x, torch.eye(2, 3)[None])

    def test_flows_are_solutions(self):
        matrix = random(3, 3)
        flow, x = Flow({"time": lambda s: s @ matrix.mT, "growth": lambda s: s}), random(4, 3, seed=1)
        time, growth = flow.generators
        wanted = x @ torch.linalg.matrix_exp(0.5 * (matrix + 2 * torch.eye(3))).mT
        torch.testing.assert_close(act(flow, x, time + 2 * growth, 0.5), wanted, atol=1e-6, rtol=1e-6)
        t = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
        torch.testing.assert_close(act(flow, x, growth, t), x * t.exp()[:, None], atol=1e-9, rtol=1e-9)
        with pytest.raises(ValueError, match="combinations of"):
            flow.tangents(x, [lm.Generator("other", (), charges={"other": 1})], STENCIL)
        with pytest.raises(ValueError, match=r"rate of change of shape \(4, 3\)"):
            Flow({"time": lambda s: s[:, :1]}).tangents(x, [time], STENCIL)


class TestInvariants:
    """The directions about whose mean a spread is taken."""

    @pytest.mark.parametrize(
        ("kind", "count"),
        [
            (Points(3), 3), (Vectors(3), 0), (Covectors(2), 0), (Tensors(3, 0), 1), (Tensors(3, 1), 0),
            (Tensors(3, 2), 1), (Tensors(2, 2), 1), (Tensors(3, 3), 0), (Tensors(3, 4), 3), (Boxes(2), 4),
            (DirectSum((Vectors(2), Points(2), Tensors(2, 0))), 3),
        ],
    )  # fmt: skip
    def test_how_many(self, kind, count):
        rows = kind.invariants()
        assert rows.shape == (count, kind.size)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(count, dtype=torch.float64))

    def test_of_matrices_it_is_the_trace(self):
        x = random(2, 5, 3, 3)
        (block,) = Tensors(3, 2).components(x)
        trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(block[..., 0].abs(), trace.abs() / math.sqrt(3))

    def test_of_given_matrices_it_is_what_rests(self):
        kind = Linear({"rotation": [[0, -1, 0], [1, 0, 0], [0, 0, 0]]})
        torch.testing.assert_close(kind.invariants().abs(), torch.tensor([[0.0, 0, 1]], dtype=torch.float64))


class TestIrreps:
    @pytest.fixture(autouse=True)
    def e3nn(self):
        self.o3 = pytest.importorskip("e3nn.o3")

    def test_vectors_are_1o(self):
        x, turns = random(4, 3), lm.generators("rotation", dimension=3)
        kind = Irreps("1x1o")
        torch.testing.assert_close(kind.tangents(x, turns, STENCIL), Vectors(3).tangents(x, turns, STENCIL))

    @pytest.mark.parametrize("degree", range(6))
    def test_spherical_harmonics_are_equivariant(self, degree):
        (X,) = (lm.Generator.affine("turn", torch.tensor([[0, 0.3, -0.2, 1], [-0.3, 0, 0.9, 0], [0.2, -0.9, 0, 2]])),)
        parity = "e" if degree % 2 == 0 else "o"
        kind, points = Irreps(f"1x{degree}{parity}"), random(6, 3)
        still = lm.Generator.affine("turn", torch.tensor(X.matrix) * torch.tensor([1, 1, 1, 0]))
        harmonics = lambda p: self.o3.spherical_harmonics(degree, p, normalize=False)  # noqa: E731
        turned = harmonics(act(Points(3), points, still, 0.8))
        torch.testing.assert_close(act(kind, harmonics(points), X, 0.8), turned, atol=1e-6, rtol=1e-6)

    def test_exact_in_float64(self):
        kind, x = Irreps("2x0e + 1x1o + 1x2e + 1x3o"), random(3, 17)
        a, b, c = lm.generators("rotation", dimension=3)
        bracket = lambda p, q: kind.tangents(kind.tangents(x, [q], STENCIL)[0], [p], STENCIL)[0]  # noqa: E731
        found = bracket(a, b) - bracket(b, a)
        torch.testing.assert_close(found, kind.tangents(x, [c], STENCIL)[0], atol=1e-13, rtol=0)

    def test_reflections_and_turns(self):
        kind, x = Irreps("1x0o + 1x1e + 1x1o + 1x2o"), random(3, 12)
        turn = content_map(lm.generators("rotation_y", dimension=3)[0], torch.tensor(0.7, dtype=torch.float64))
        torch.testing.assert_close(
            kind.transform(x, turn[None]), act(kind, x, lm.generators("rotation_y", dimension=3)[0], 0.7)
        )
        mirror = -torch.eye(3, 4, dtype=torch.float64)[None]
        signs = torch.tensor([-1.0] + [1] * 3 + [-1] * 3 + [-1] * 5, dtype=torch.float64)
        torch.testing.assert_close(kind.transform(x, mirror), x * signs)

    def test_invariants_are_the_even_scalars(self):
        assert Irreps("2x0e + 1x0o + 1x1o").invariants().tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]

    def test_what_changes_lengths_is_refused(self):
        with pytest.raises(ValueError, match=r"leave lengths as they are.*got 'scale'"):
            Irreps("1x1o").tangents(random(1, 3), lm.generators("scale", dimension=3), STENCIL)
        with pytest.raises(ValueError, match="must leave lengths"):
            Irreps("1x1o").transform(random(1, 3), 2 * torch.eye(3, 4)[None])


class TestMadeOfOthers:
    def test_what_is_padded_rests(self):
        x, mask = random(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
        kind, X = Masked(Points(3), mask), generator(3)
        moved, alone = kind.tangents(x, [X], STENCIL)[0], Points(3).tangents(x, [X], STENCIL)[0]
        assert torch.equal(moved[mask], alone[mask])
        assert not moved[~mask].any()
        after = act(kind, x, X, 0.3)
        assert torch.equal(after[~mask], x[~mask])
        assert torch.equal(kind.transform(x, -torch.eye(3, 4)[None].double()), torch.where(mask[..., None], -x, x))
        torch.testing.assert_close(after[mask], act(Points(3), x, X, 0.3)[mask])
        assert [tuple(one.shape) for one in kind.samples(x)] == [(1, 2, 3), (1, 4, 3)]

    def test_graphs_move_one_by_one(self):
        x, batch = random(7, 3), torch.tensor([0, 0, 1, 1, 1, 1, 2])
        kind, X = Packed(Points(3), batch), generator(3)
        t = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
        each = torch.cat([act(Points(3), x[batch == g][None], X, t[g])[0] for g in range(3)])
        torch.testing.assert_close(act(kind, x, X, t), each)
        torch.testing.assert_close(kind.tangents(x, [X], STENCIL)[0], Points(3).tangents(x[None], [X], STENCIL)[0, 0])
        maps = torch.stack([content_map(X, one) for one in t])
        torch.testing.assert_close(kind.transform(x, maps), each)
        assert kind.count == 3

    @pytest.mark.parametrize(
        ("batch", "match"),
        [
            ([0, 0], "each of the 3 nodes"),
            ([1, 0, 0], "ascending"),
            ([0, 2, 2], "got none of graph 1"),
            ([-1, 0, 0], "ascending"),
        ],
    )
    def test_graphs_out_of_order(self, batch, match):
        with pytest.raises(ValueError, match=match):
            Packed(Points(3), torch.tensor(batch)).check(random(3, 3), "pos")

    def test_graphs_whose_nodes_move_by_one_another(self):
        x, batch = random(5, 3), torch.tensor([0, 0, 0, 1, 1])
        contraction = Flow({"time": lambda nodes: nodes.mean(1, keepdim=True) - nodes})
        (moved,) = Packed(contraction, batch).tangents(x, contraction.generators, STENCIL)
        for graph in (slice(3), slice(3, 5)):
            torch.testing.assert_close(moved[graph], x[graph].mean(0) - x[graph])

    def test_kinds_stand_side_by_side(self):
        points, velocities, X = Points(3, 2.0, (1.0, 0.0, -1.0)), Velocities(3), generator(3, boost_x=0.5)
        place, speed = random(4, 5, 3), random(4, 5, 3, seed=1)
        both = DirectSum((points, velocities))
        maps = content_map(X, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
        for function in (
            lambda kind, x: kind.tangents(x, [X], STENCIL)[0],
            lambda kind, x: act(kind, x, X, 0.3),
            lambda kind, x: kind.transform(x, maps),
        ):
            wanted = torch.cat([function(points, place), function(velocities, speed)], dim=-1)
            torch.testing.assert_close(function(both, torch.cat([place, speed], dim=-1)), wanted)
        assert both.charges == velocities.charges

    def test_parts_have_actions_of_their_own(self):
        parts = {"pos": Points(3), "vel": Velocities(3), "stress": Tensors(3, 2)}
        tensors = [random(4, 5, 3), random(4, 5, 3, seed=1), random(4, 3, 3, seed=2)]
        whole, X = Parts(parts, tuple(tuple(one.shape) for one in tensors)), generator(3, boost_x=0.5)
        joined = whole.join(tensors)
        for function in (
            lambda kind, x: kind.tangents(x, [X], STENCIL)[0],
            lambda kind, x: kind.act(x, X, 0.3, STENCIL),
            lambda kind, x: kind.transform(x, content_map(X, torch.tensor([0.3], dtype=torch.float64))),
        ):
            for found, kind, one in zip(whole.split(function(whole, joined)), parts.values(), tensors, strict=True):
                torch.testing.assert_close(found, function(kind, one))
        assert whole.dimension == 3
        assert whole.charges == {"boost_x", "boost_y", "boost_z"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Boxes(2).transform(random(1, 4), torch.tensor([[[0.0, 1, 0], [-1, 0, 0]]])),
            "`maps` must keep the sides of boxes parallel",
        ),
        (lambda: Points(0), "`dimension` must be a positive integer"),
        (lambda: Points(True), "`dimension` must be a positive integer"),
        (lambda: Points(3, unit=0), "`unit` must be a positive length"),
        (lambda: Points(3, origin=(1, 2)), "`origin` must hold 3 numbers"),
        (lambda: Tensors(3, 5), "`rank` must be an integer from 0 to 4"),
        (lambda: Points(3).check(torch.zeros(4, 2), "inputs"), r"axes \(B, ..., 3\).*got shape \(4, 2\)"),
        (lambda: Vectors(3).check(torch.zeros(3), "output"), r"got shape \(3,\)"),
        (lambda: Tensors(3, 2).check(torch.zeros(4, 3), "output"), r"got shape \(4, 3\)"),
        (lambda: Linear({}), "`matrices` must hold square matrices"),
        (lambda: Linear({"rotation": [[1, 2, 3]]}), "`matrices` must hold square matrices"),
        (lambda: Flow({}), "`fields` must map"),
        (lambda: Flow({"time": torch.sin}, steps=0), "`steps` must be a positive integer"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_coefficients_tell_generators_of_one_dimension():
    assert coefficients([generator(3, boost_x=1.0), generator(3)]).shape == (2, 14)
