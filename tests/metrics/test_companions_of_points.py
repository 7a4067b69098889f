"""Finite motions, reflections and permutations of point clouds, not all of which Lie derivatives see."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric import orbits
from lie_metric.representations import Invariant, Irreps, Masked, Packed, Points, Tensors, Vectors, Velocities

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

    def test_one_vector_for_each_sample_stays(self):
        found = error(lambda x: x.sum(1), random(8, 5, 3), orbits.permutations(), output_representation=Vectors(3))
        assert found["permutation"] < 1e-14

        def sites(x):  # two places for each sample, which are no points of the input
            return torch.stack([x.sum(1), x.sin().sum(1)], dim=1)

        found = error(sites, random(8, 5, 3), orbits.permutations(), output_representation=Points(3))
        assert found["permutation"] < 1e-14

    def test_every_draw_is_another_order(self):
        first, second = orbits.permutations(samples=2).draw([0, 1, 2], (), 0, lm.Resampling())
        points = random(3, 9, 3)
        assert not torch.equal(first.on(Points(3), points), second.on(Points(3), points))

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
        for kind in (Tensors(3, 0), Invariant()):
            metric = lm.FiniteEquivarianceError(
                orbits.permutations(along=("0", "1")), input_representation={"0": Points(3), "1": kind}
            )
            metric.update(energy, inputs)
            assert metric.compute()["permutation"].item() < 1e-14

    def test_a_cell_has_no_points(self):
        def energy(pos, cell):
            return (pos @ cell[:, 0, :, None]).sin().square().sum((1, 2))

        inputs = random(8, 3, 3), random(8, 3, 3, seed=1)  # as many atoms as vectors of the cell
        layout = {"0": Points(3), "1": Vectors(3)}
        metric = lm.FiniteEquivarianceError(orbits.permutations(along=("0",)), input_representation=layout)
        metric.update(energy, inputs)
        assert metric.compute()["permutation"].item() < 1e-14
        metric = lm.FiniteEquivarianceError(orbits.permutations(along=("0", "1")), input_representation=layout)
        metric.update(energy, inputs)
        assert metric.compute()["permutation"].item() > 0.1


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
        (
            lambda: lm.FiniteEquivarianceError(
                orbits.matrices({"flip": -torch.eye(2)}), input_representation=Points(3)
            ),
            ValueError, "maps of 3 dimensions, got 'flip' with 2 rows",
        ),
        (lambda: orbits.permutations(along="pos"), TypeError, "`along` must be a sequence"),
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
    metric = lm.FiniteEquivarianceError(orbits.matrices({"mirror": [[-1, 0], [0, 1]]}))
    with pytest.raises(TypeError, match="got maps of points"):
        metric.update(lambda x: x.mean((1, 2, 3)), random(2, 1, 8, 8))
    metric = lm.FiniteEquivarianceError(
        orbits.permutations(), input_representation=Points(3), output_representation={"energy": Invariant()}
    )
    with pytest.raises(TypeError, match="one representation for this measure, got the parts"):
        metric.update(deep_sets, random(2, 5, 3))
    metric = lm.FiniteEquivarianceError(orbits.permutations(), input_representation={"pos": Points(3)})
    atoms = {"pos": random(2, 5, 3), "z": torch.arange(10).reshape(2, 5), "temperature": torch.ones(2)}
    with pytest.raises(TypeError, match=r"which parts stand at the points.*got \['z'\] beside \['pos'\]"):
        metric.update(lambda b: (b["pos"].sum(2) * b["z"]).sum(1), atoms)
    two = {"pos": Points(3), "z": Invariant()}
    metric = lm.FiniteEquivarianceError(orbits.permutations(), input_representation=two)
    with pytest.raises(TypeError, match=r"got the parts \['pos', 'z'\]"):
        metric.update(lambda b: b["pos"].sum((1, 2)), {"pos": random(2, 5, 3), "z": random(2, 5)})
    metric = lm.FiniteEquivarianceError(orbits.permutations(), input_representation=Points(3))
    with pytest.raises(TypeError, match="not known where its points are"):
        metric.update(lambda p: p.sum((1, 2, 3)), random(2, 4, 5, 3))
    consistency = lm.PredictionConsistency(orbits.permutations(samples=2), input_representation=Points(3))
    consistency.update(Perceptron(), random(4, 5, 3))
    assert 0 <= consistency.compute()["permutation"] <= 1


class TestPadding:
    """What only fills up a batch has no part in any number."""

    MASK = torch.arange(5)[None] < torch.tensor([3, 5, 2, 4])[:, None]
    BY_NAME: ClassVar = {"input_representation": {"pos": Masked(Points(3), "mask")}}

    def batch(self, filling):
        return {
            "pos": torch.where(self.MASK[..., None], random(4, 5, 3), torch.tensor(filling).double()),
            "mask": self.MASK,
        }

    @staticmethod
    def model(batch):
        there = batch["mask"][..., None]
        centre = (batch["pos"] * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        return (batch["pos"] - centre) * torch.tensor([1.0, 1.5, 2.0], dtype=batch["pos"].dtype)

    @pytest.mark.parametrize(
        "orbit",
        [
            orbits.matrices({"turn": [[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]}),
            orbits.listed("rotation_x", (0.5,), dimension=3),
            orbits.uniform("rotation", 0.5, samples=2, dimension=3),
        ],
        ids=["matrices", "listed", "uniform"],
    )
    @pytest.mark.parametrize("measure", [lm.FiniteEquivarianceError, lm.RelaxedEquivarianceError])
    def test_companions(self, orbit, measure):
        values = []
        for filling in (0.0, 100.0):
            metric = measure(orbit, output_representation=Masked(Vectors(3), "mask"), **self.BY_NAME)
            metric.update(self.model, self.batch(filling))
            values.append(next(iter(metric.compute().values())))
        assert values[0] > 0.05
        torch.testing.assert_close(values[1], values[0])

    def test_each_sample_has_its_own_turn_and_mask(self):
        (element,) = orbits.uniform("rotation", 0.5, samples=1, dimension=3).draw(range(4), (), 0, lm.Resampling())
        x = random(4, 5, 3)
        wanted = torch.where(self.MASK[..., None], element.on(Points(3), x), x)
        torch.testing.assert_close(element.on(Masked(Points(3), self.MASK), x), wanted)

    def test_finite_error_by_hand(self):
        turn = orbits.listed("rotation_x", (0.5,), dimension=3)
        metric = lm.FiniteEquivarianceError(turn, output_representation=Masked(Vectors(3), "mask"), **self.BY_NAME)
        batch = self.batch(7.0)
        metric.update(self.model, batch)
        (X,) = lm.generators("rotation_x", dimension=3)
        f = self.model(batch)
        moved = self.model({**batch, "pos": Points(3).act(batch["pos"], X, 0.5, None)})
        off = (Vectors(3).act(moved, X, -0.5, None) - f).square().sum(-1)[self.MASK].sum()
        spread = f.square().sum(-1)[self.MASK].sum()
        assert metric.compute()["rotation_x_0.5"].item() == pytest.approx((off / (2 * spread)).sqrt().item())

    def test_penalty_and_derivatives(self):
        options = {**self.BY_NAME, "output_representation": {"": Masked(Vectors(3), "mask")}}
        options["output_representation"] = Masked(Vectors(3), "mask")
        derivative = lm.lie_derivative(self.model, self.batch(9.0), "rotation_x", **options)
        assert not next(iter(derivative.values()))[~self.MASK].any()
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        penalty = lm.equivariance_penalty(lambda b: weight * self.model(b), self.batch(9.0), "rotation", **options)
        wanted = lm.functional.relative(self.model, self.batch(9.0), "rotation", **options)
        mean = torch.stack(list(wanted.values())).square().mean()
        torch.testing.assert_close(penalty.detach(), mean)

    def test_assertions(self):
        def same(batch):
            return torch.where(batch["mask"][..., None], batch["pos"], batch["pos"][:, :1, :1])

        lm.testing.assert_equivariant(
            same, self.batch(9.0), "rigid", **self.BY_NAME, output_representation=Masked(Points(3), "mask")
        )

    @pytest.mark.parametrize("kind", [Tensors(3, 0), Invariant()])
    def test_numbers_at_nodes_of_graphs(self, kind):
        sizes = torch.tensor([3, 4, 5])
        batch = {"pos": random(12, 3), "batch": torch.repeat_interleave(torch.arange(3), sizes)}
        found = lm.functional.relative(
            lambda b: b["pos"][:, 0] ** 2, batch, "rotation_z",
            input_representation={"pos": Packed(Points(3), "batch")},
            output_representation=Packed(kind, "batch"),
        )["rotation_z"]  # fmt: skip
        f, change = batch["pos"][:, 0] ** 2, 2 * batch["pos"][:, 0] * batch["pos"][:, 1]
        about = f.square().sum() - f.sum() ** 2 / 12
        torch.testing.assert_close(found, (change.square().sum() / (about * 3 / 2)).sqrt())


def test_parts_have_sizes_of_their_own():
    def model(batch):
        return {"energy": batch["pos"][:, 0, :1] * 1e-6, "forces": batch["pos"]}

    options = {
        "input_representation": {"pos": Points(3)},
        "output_representation": {"energy": Invariant(), "forces": Vectors(3)},
    }
    found = lm.testing.equivariance_violation(model, {"pos": random(4, 5, 3)}, "rotation", **options)
    assert found["energy/rotation_y"].max() > 0.1
    assert found["forces/rotation_y"].max() < 1e-14
    with pytest.raises(AssertionError, match="energy/rotation"):
        lm.testing.assert_equivariant(model, {"pos": random(4, 5, 3)}, "rotation", **options)
