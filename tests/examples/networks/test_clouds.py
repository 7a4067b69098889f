"""Networks of clouds have the symmetry that each choice claims, by finite motions, and no other."""

import math

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Points

SHIFT = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
ICOSAHEDRON = {"grid": "icosahedron"}
CHOICES = {
    "distances": ({}, {"shift", "rotation", "mirror"}),
    "differences": ({"pairs": "differences"}, {"shift"}),
    "positions": ({"pairs": "positions"}, set()),
    "scalars": ({"features": "scalars"}, set()),
    "frame": ({"features": "frame"}, {"shift"}),
    "grid": (ICOSAHEDRON, {"shift", "own", "mirror"}),
    "grid, vectors": ({**ICOSAHEDRON, "features": "vectors"}, {"own", "mirror"}),
    "grid, scalars": ({**ICOSAHEDRON, "features": "scalars"}, set()),
}


def clouds(count=4, points=7, seed=0):
    return torch.randn(count, points, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(seed=0):
    drawn = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = torch.linalg.qr(drawn)[0]
    return found * torch.linalg.det(found)


def trained(networks, **choices):
    """A network whose norms have seen clouds, in double precision, measured as it is evaluated."""
    torch.manual_seed(0)
    if "grid" in choices:
        choices["grid"] = networks.GRIDS[choices["grid"]]
    model = networks.CloudNetwork(5, **choices).double()
    with torch.no_grad():
        for seed in range(4):
            model(clouds(8, seed=seed + 1))
    return model.eval()


def change(model, points, moved):
    """How far outputs go, of their spread over clouds."""
    with torch.no_grad():
        before = model(points)
        return ((model(moved) - before).abs().max() / before.std(0).mean()).item()


@pytest.mark.parametrize("name", CHOICES)
class TestSymmetries:
    def test_finite_motions(self, networks, name):
        choices, kept = CHOICES[name]
        model, points = trained(networks, **choices), clouds()
        own = networks.symmetries(networks.GRIDS["icosahedron"])[37]
        moved = {"shift": points + SHIFT, "rotation": points @ rotation().T, "own": points @ own.T, "mirror": -points}
        if "rotation" in kept:
            kept = kept | {"own"}
        for motion, other in moved.items():
            assert (change(model, points, other) < 1e-12) == (motion in kept), motion

    def test_derivatives(self, networks, name):
        choices, kept = CHOICES[name]
        found = F.relative(
            trained(networks, **choices), clouds(), ("translation_x", "rotation_y"), input_representation=Points(3)
        )
        assert (found["translation_x"] < 1e-12) == ("shift" in kept)
        assert (found["rotation_y"] < 1e-12) == ("rotation" in kept)

    def test_order_of_points(self, networks, name):
        model, points = trained(networks, **CHOICES[name][0]), clouds()
        assert change(model, points, points.flip(1)) < 1e-12


@pytest.mark.parametrize("grid", ["tetrahedron", "octahedron", "cube", "icosahedron", "dodecahedron", "snub cube"])
def test_every_rotation_of_a_grid_and_no_other(networks, grid):
    model, points = trained(networks, grid=grid), clouds()
    own = networks.symmetries(networks.GRIDS[grid])
    assert max(change(model, points, points @ turn.T) for turn in own) < 1e-11
    assert change(model, points, points @ rotation().T) > 1e-5


def test_a_frame_that_turns_along(networks):
    model, points, turn = trained(networks, features="frame"), clouds(), rotation()
    frame = torch.eye(3, dtype=torch.float64).expand(len(points), 3, 3)
    torch.testing.assert_close(model(points), model(points, frame))
    moved = points @ turn.T
    torch.testing.assert_close(model(moved, frame @ turn.T), model(points, frame), rtol=0, atol=1e-12)
    assert (model(moved, frame) - model(points)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("grid", "size", "order"),
    [
        ("tetrahedron", 2e-3, 4),
        ("octahedron", 2e-3, 4),
        ("cube", 2e-3, 4),
        ("icosahedron", 2e-3, 6),
        ("dodecahedron", 2e-3, 6),
        ("snub cube", 1e-2, 8),  # below it nothing but rounding is left
    ],
)
def test_orders_of_grids(networks, grid, size, order):
    """The means over a grid are exact up to a degree: of small clouds the error is of the next even one.

    Odd degrees are none: in sums over all pairs differences of places cancel.
    """
    assert order == 2 * (networks.design_strength(networks.GRIDS[grid]) // 2 + 1)
    model, points, turn = trained(networks, grid=grid), clouds(), rotation()
    with torch.no_grad():
        large, small = ((model(s * points @ turn.T) - model(s * points)).abs().max() for s in (size, size / 2))
    assert (large / small).log2().item() == pytest.approx(order, abs=0.25 if order < 8 else 0.7)


def test_a_planted_violation_is_seen(networks):
    """A grid of which one direction is a little off has lost its rotations."""
    model, points = trained(networks, **ICOSAHEDRON), clouds()
    own = networks.symmetries(networks.GRIDS["icosahedron"])[5]
    orbits = lm.orbits.matrices({"own": own})

    def error():
        metric = lm.FiniteEquivarianceError(orbits, input_representation=Points(3))
        metric.update(model, points)
        return metric.compute()["own"].item()

    assert error() < 1e-12
    model.grid[0] += 1e-3 * model.grid[1]
    assert 1e-7 < error() < 1e-2


def test_convolution_against_loops(networks):
    torch.manual_seed(0)
    layer = networks.CloudConvolution(3, 4).double().eval()
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    features = torch.randn(2, 5, 6, 3).double()  # two clouds, five orientations, six points
    basis, fibre = torch.randn(2, 5, 6, 6, 4).double(), torch.randn(5, 5, 4).double()
    found = layer(features, basis, fibre)
    for b in range(2):
        for i in range(6):
            mixed = []
            for m in range(5):
                total = sum(torch.outer(features[b, m, j], basis[b, m, j, i]) for j in range(6))
                mixed.append(layer.mix(layer.norm(total.flatten()[None])))
            for n in range(5):
                spread = sum(layer.around(fibre[n, m]) * mixed[m] for m in range(5)) / 5
                torch.testing.assert_close(found[b, n, i], features[b, n, i] + layer.point(spread)[0])


def test_what_kernels_see(networks):
    points = clouds(1, 3)
    grid = networks.GRIDS["cube"]
    apart = points[0, 2] - points[0, 1]  # of a convolution at 1, from 2
    for choices, wanted in (
        ({}, [math.sqrt(apart.square().sum() + 0.01)]),
        ({"pairs": "differences"}, apart.tolist()),
        ({"pairs": "positions"}, [*points[0, 1].tolist(), *points[0, 2].tolist()]),
    ):
        seen = networks.CloudNetwork(1, **choices).seen(points)
        assert seen[0, 0, 2, 1].tolist() == pytest.approx(wanted)
    seen = networks.CloudNetwork(1, grid=grid).seen(points)[0, :, 2, 1]
    along = grid @ apart
    across = (apart - along[:, None] * grid).norm(dim=1)
    torch.testing.assert_close(seen, torch.stack([along, (across.square() + 0.01).sqrt()], -1))


def test_grids(networks):
    counts = {"tetrahedron": (4, 12), "octahedron": (6, 24), "cube": (8, 24)}
    counts |= {"icosahedron": (12, 60), "dodecahedron": (20, 60), "snub cube": (24, 24)}
    assert set(networks.GRIDS) == set(counts)
    for name, (directions, turns) in counts.items():
        grid = networks.GRIDS[name]
        assert grid.shape == (directions, 3)
        torch.testing.assert_close(grid.norm(dim=1), torch.ones(directions, dtype=torch.float64))
        assert torch.pdist(grid).min() > 0.5
        own = networks.symmetries(grid)
        assert len(own) == turns
        torch.testing.assert_close(own[0], torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(torch.linalg.det(own), torch.ones(turns, dtype=torch.float64))
        apart = ((own @ grid.T).mT[:, :, None] - grid).norm(dim=-1)
        assert apart.amin(-1).max() < 1e-12
        assert all(networks.permutes(turn, grid) for turn in own)
        assert not networks.permutes(rotation(), grid)
        assert torch.pdist(own.flatten(1)).min() > 0.5


def test_strength_against_moments(networks):
    """The means of all monomials up to the degree are those over the sphere, and not of the next one."""

    def sphere(powers):
        if any(power % 2 for power in powers):
            return 0.0
        gamma = [math.gamma((power + 1) / 2) for power in powers]
        return math.prod(gamma) / (2 * math.pi * math.gamma((sum(powers) + 3) / 2))

    for grid in networks.GRIDS.values():
        turned = grid @ rotation().T  # no axis of the grid is one of the monomials
        wrong = []
        for degree in range(9):
            powers = [(a, b, degree - a - b) for a in range(degree + 1) for b in range(degree + 1 - a)]
            means = [turned.pow(torch.tensor(each)).prod(1).mean().item() for each in powers]
            wrong.append(max(abs(mean - sphere(each)) for mean, each in zip(means, powers, strict=True)))
        strength = networks.design_strength(grid)
        assert max(wrong[: strength + 1]) < 1e-12 < 1e-3 < wrong[strength + 1]
    assert networks.design_strength(networks.GRIDS["icosahedron"], most=4) == 4


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"pairs": "angles"}, "`pairs` and `features` must be of .* got 'angles'"),
        ({"features": "normals"}, "and 'normals'"),
        ({"features": "vectors"}, "for vectors, got pairs 'distances' and features 'vectors' without a grid"),
        (
            {"pairs": "differences", "grid": "cube"},
            "with invariant pairs alone, .* got pairs 'differences' .* with a grid",
        ),
    ],
)
def test_what_makes_no_network(networks, choices, message):
    if "grid" in choices:
        choices = {**choices, "grid": networks.GRIDS[choices["grid"]]}
    with pytest.raises(ValueError, match=message):
        networks.CloudNetwork(2, **choices)
