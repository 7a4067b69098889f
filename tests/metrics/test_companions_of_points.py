"""Finite motions, reflections and permutations of point clouds, not all of which Lie derivatives see."""

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric import orbits
from lie_metric.representations import Invariant, Irreps, Packed, Points, Tensors, Vectors, Velocities

INVERSION = {"inversion": -torch.eye(3)}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distances(points):
    return (points[:, :, None] - points[:, None]).square().sum(-1)


def deep_sets(points):
    return points.sin().sum(1) @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=points.dtype)


def chirality(points):
    a, b, c = (points[:, k] - points[:, 3] for k in range(3))
    return (torch.linalg.cross(a, b) * c).sum(-1)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(15, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, points):
        return self.net(points)


def error(model, points, transforms, **options):
    metric = lm.FiniteEquivarianceError(transforms, input_representation=Points(3), **options)
    metric.update(model, points)
    return {name: value.item() for name, value in metric.compute().items()}


class TestFinite:
    def test_against_a_loop(self):
        model, points = Perceptron(), random(8, 5, 3)
        f = model(points).detach()
        found = error(model, points, orbits.listed("rotation", (0.5,), dimension=3))
        for X in lm.generators("rotation", dimension=3):
            turned = torch.stack([model(Points(3).act(one[None], X, 0.5, None))[0] for one in points]).detach()
            wanted = ((turned - f).square().sum() / (2 * 8 * f.var(0).sum())).sqrt()
            assert found[f"{X.name}_0.5"] == pytest.approx(wanted.item())

    def test_small_motions_tend_to_the_lie_derivative(self):
        model, points, t = Perceptron(), random(8, 5, 3), 1e-4
        local = lm.functional.relative(model, points, "rotation", input_representation=Points(3))
        found = error(model, points, orbits.listed("rotation", (t,), dimension=3))
        for name, value in local.items():
            assert found[f"{name}_{t:g}"] / t == pytest.approx(value.item() / 2**0.5, rel=1e-3)

    def test_vectors_are_brought_back(self):
        def field(points):  # from each point to the centre
            return points.mean(1, keepdim=True) - points

        far = orbits.listed("rigid", (0.3, 2.0), dimension=3)
        assert max(error(field, random(6, 5, 3), far, output_representation=Vectors(3)).values()) < 1e-14
        assert max(error(field, random(6, 5, 3), far, output_representation=Invariant()).values()) > 0.1

    def test_each_sample_its_own_turn(self):
        orbit = orbits.uniform("rotation", 1.0, samples=3, dimension=3)
        assert max(error(lambda p: distances(p).flatten(1), random(6, 5, 3), orbit).values()) < 1e-14
        assert max(error(Perceptron(), random(6, 5, 3), orbit).values()) > 0.1

    def test_named_parts_move_together(self):
        def energy(pos, vel):
            return (pos * vel).sum((1, 2))  # invariant to rotations of both

        far = orbits.listed("rotation_x", (1.0,), dimension=3)
        inputs = random(6, 5, 3), random(6, 5, 3, seed=1)
        for layout, small in (({"0": Points(3), "1": Velocities(3)}, True), ({"0": Points(3)}, False)):
            metric = lm.FiniteEquivarianceError(far, input_representation=layout)
            metric.update(energy, inputs)
            assert (metric.compute()["rotation_x_1"].item() < 1e-14) is small


class TestReflections:
    def test_a_pseudoscalar_is_told_by_the_inversion_alone(self):
        points = random(64, 4, 3)
        local = lm.functional.relative(chirality, points, "rigid", input_representation=Points(3))
        assert max(value.item() for value in local.values()) < 1e-14
        f = chirality(points)
        wanted = (4 * f.square().sum() / (2 * 64 * f.var())).sqrt().item()
        assert error(chirality, points, orbits.matrices(INVERSION))["inversion"] == pytest.approx(wanted)
        assert wanted > 1

    def test_representations_know_their_parity(self):
        pytest.importorskip("e3nn")
        points, mirrored = random(16, 4, 3), orbits.matrices(INVERSION)

        def axial(p):
            return torch.linalg.cross(p[:, 0] - p[:, 3], p[:, 1] - p[:, 3])

        assert error(axial, points, mirrored, output_representation=Irreps("1x1e"))["inversion"] < 1e-14
        assert error(axial, points, mirrored, output_representation=Vectors(3))["inversion"] > 1
        inertia = lambda p: torch.einsum("bni,bnj->bij", p, p)  # noqa: E731
        assert error(inertia, points, mirrored, output_representation=Tensors(3, 2))["inversion"] < 1e-14

    def test_maps_with_a_step_are_brought_back(self):
        glide = orbits.matrices({"glide": [[1, 0, 0, 0.5], [0, -1, 0, 0], [0, 0, 1, -2]]})
        assert error(lambda p: p * 1.0, random(6, 5, 3), glide, output_representation=Points(3))["glide"] < 1e-14
        assert error(lambda p: p * 2.0, random(6, 5, 3), glide, output_representation=Points(3))["glide"] > 0.1


class TestPermutations:
    def test_sums_do_not_see_them(self):
        assert error(deep_sets, random(6, 5, 3), orbits.permutations())["permutation"] < 1e-14
        assert error(Perceptron(), random(6, 5, 3), orbits.permutations())["permutation"] > 0.1

    def test_outputs_at_points_are_brought_back(self):
        def at_points(p):
            return distances(p).exp().sum(2)

        assert (
            error(at_points, random(6, 5, 3), orbits.permutations(), output_representation=Tensors(3, 0))["permutation"]
            < 1e-14
        )
        assert (
            error(at_points, random(6, 5, 3), orbits.permutations(), output_representation=Invariant())["permutation"]
            > 0.1
        )

    def test_the_same_order_whatever_the_batch(self):
        whole = lm.FiniteEquivarianceError(orbits.permutations(), input_representation=Points(3))
        parts = lm.FiniteEquivarianceError(orbits.permutations(), input_representation=Points(3))
        model, points = Perceptron(), random(7, 5, 3)
        whole.update(model, points)
        for part in points.split(3):
            parts.update(model, part)
        assert parts.compute()["permutation"].item() == pytest.approx(whole.compute()["permutation"].item(), rel=1e-12)

    def test_all_parts_at_points_go_along(self):
        def energy(pos, charge):
            return (pos.sin().sum(-1) * charge).sum(1)

        inputs = random(6, 5, 3), random(6, 5, seed=1)
        metric = lm.FiniteEquivarianceError(
            orbits.permutations(), input_representation={"0": Points(3), "1": Tensors(3, 0)}
        )
        metric.update(energy, inputs)
        assert metric.compute()["permutation"].item() < 1e-14


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.FiniteEquivarianceError(input_representation=Points(3)), ValueError, "which moves pixels"),
        (lambda: lm.FiniteEquivarianceError("D4", input_representation=Points(3)), ValueError, "which moves pixels"),
        (
            lambda: lm.FiniteEquivarianceError(orbits.listed("rotation", (1,)), input_representation=Points(3)),
            ValueError, "dimension 3, got 'rotation'",
        ),
        (lambda: orbits.matrices({}), ValueError, "at least one matrix"),
        (lambda: orbits.matrices({"flat": torch.zeros(3, 3)}), ValueError, "must have an inverse"),
        (lambda: orbits.matrices({"wide": torch.zeros(3, 5)}), ValueError, r"d×d or d×\(d \+ 1\)"),
        (lambda: orbits.permutations(0), ValueError, "`samples` must be a positive integer"),
    ],
)  # fmt: skip
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_what_cannot_be_measured_says_so():
    packed = {"pos": Packed(Points(3), "batch")}
    batch = {"pos": random(4, 3), "batch": torch.tensor([0, 0, 1, 1])}
    metric = lm.FiniteEquivarianceError(orbits.matrices(INVERSION), input_representation=packed)
    with pytest.raises(TypeError, match="must have a batch axis"):
        metric.update(lambda b: b["pos"].sum(1), batch)
    metric = lm.FiniteEquivarianceError(orbits.matrices(INVERSION))
    with pytest.raises(TypeError, match="got maps of points"):
        metric.update(lambda x: x.mean((1, 2, 3)), random(2, 1, 8, 8))
    metric = lm.FiniteEquivarianceError(
        orbits.permutations(), input_representation=Points(3), output_representation={"energy": Invariant()}
    )
    with pytest.raises(TypeError, match="one representation for this measure, got the parts"):
        metric.update(deep_sets, random(2, 5, 3))
    metric = lm.FiniteEquivarianceError(orbits.permutations(), input_representation={"pos": Points(3)})
    atoms = {"pos": random(2, 5, 3), "z": torch.arange(10).reshape(2, 5), "temperature": torch.ones(2)}
    with pytest.raises(TypeError, match=r"also moves what stands at points, got \['z'\] beside \['pos'\]"):
        metric.update(lambda b: (b["pos"].sum(2) * b["z"]).sum(1), atoms)
    consistency = lm.PredictionConsistency(orbits.permutations(samples=2), input_representation=Points(3))
    consistency.update(Perceptron(), random(4, 5, 3))
    assert 0 <= consistency.compute()["permutation"] <= 1
