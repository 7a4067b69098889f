"""Convolutions over a group keep what it moves, to rounding, and nothing else."""

import math

import pytest
import torch

import lie_metric as lm
from lie_metric.algebra import matrix_exponential
from lie_metric.representations import Invariant, Points

LAYOUT = {"0": Points(2), "1": Invariant()}
KEPT = {
    "Shifts": {"shift"},
    "Rotations": {"turn", "quarter", "third"},
    "ScaledRotations": {"turn", "quarter", "third", "scale"},
    "Motions": {"shift", "quarter"},
}
GENERATORS = {"shift": ("translation_x", "translation_y"), "turn": ("rotation",), "scale": ("scale",)}
CENTRES = torch.arange(0, 30, 3)


def rotation(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


MOVES = {
    "shift": lambda p: p + torch.tensor([0.7, -0.4], dtype=torch.float64),
    "turn": lambda p: p @ rotation(1.0).T,
    "quarter": lambda p: p @ rotation(math.pi / 2).T,
    "third": lambda p: p @ rotation(2 * math.pi / 3).T,
    "scale": lambda p: 1.3 * p,
}


def cloud(count=30, samples=4, seed=0):
    source = torch.Generator().manual_seed(seed)
    places = 0.4 * torch.randn(samples, count, 2, dtype=torch.float64, generator=source)
    return places, torch.rand(samples, count, dtype=torch.float64, generator=source)


def classifier(networks, name, **options):
    torch.manual_seed(0)
    return networks.LieClassifier(getattr(networks, name)(), CENTRES, channels=16, **options).double().eval()


def matrix(name, element):
    """An element of a group as a matrix that acts on the plane, (3, 3)."""
    one = torch.eye(3, dtype=torch.float64)
    if name in {"Shifts", "Motions"}:
        one[:2, 2] = element[:2]
    if name == "Motions":
        one[:2, :2] = rotation(element[2].item())
    if name in {"Rotations", "ScaledRotations"}:
        one[:2, :2] = rotation(element[0].item())
    if name == "ScaledRotations":
        one[:2, :2] *= element[1].exp()
    return one


def algebra(name, numbers):
    """An element of the algebra as a matrix, (3, 3)."""
    one = torch.zeros(3, 3, dtype=torch.float64)
    if name in {"Shifts", "Motions"}:
        one[:2, 2] = numbers[:2]
    turn = {"Shifts": torch.zeros(()), "Motions": numbers[-1]}.get(name, numbers[0])
    one[1, 0], one[0, 1] = turn, -turn
    if name == "ScaledRotations":
        one[0, 0] = one[1, 1] = numbers[1]
    return one


@pytest.mark.parametrize("name", KEPT)
class TestGroups:
    def test_exp_of_what_is_between_takes_one_to_the_other(self, networks, name):
        group = getattr(networks, name)()
        elements = group.lift(cloud(8, 1)[0], networks.even_turns(3, 0.3))[0]
        for v in elements:
            for u in elements:
                between = algebra(name, group.relative(v, u))
                wanted = torch.linalg.inv(matrix(name, v)) @ matrix(name, u)
                torch.testing.assert_close(matrix_exponential(between), wanted, rtol=1e-11, atol=1e-12)

    def test_lifts_take_the_base_of_an_orbit_to_the_point(self, networks, name):
        group, places = getattr(networks, name)(), cloud(8, 1)[0]
        elements = group.lift(places, networks.even_turns(3))[0].unflatten(0, (8, -1))
        assert elements.shape[1] == (3 if group.several else 1)
        for place, lifts in zip(places[0], elements, strict=True):
            for one in lifts:
                base = {"Rotations": [one[-1].item(), 0, 1], "ScaledRotations": [1, 0, 1]}.get(name, [0, 0, 1])
                found = matrix(name, one) @ torch.tensor(base, dtype=torch.float64)
                torch.testing.assert_close(found[:2], place)

    def test_convolution_against_a_loop(self, networks, name):
        torch.manual_seed(0)
        group = getattr(networks, name)()
        layer = networks.LieConvolution(group, 3, 5, 1.5, kernels=2).double()
        elements = group.lift(cloud(9, 2)[0], networks.even_turns(2, 0.2))
        features = torch.randn(2, elements.shape[1], 3, dtype=torch.float64)
        at = elements[:, ::4]
        found, a = layer(at, elements, features), group.algebra
        left_out = 0
        for b in range(2):
            for v, wanted in zip(at[b], found[b], strict=True):
                total, weight = torch.zeros(2, 3, dtype=torch.float64), 0.0
                for u, f in zip(elements[b], features[b], strict=True):
                    step = [x.item() for x in u - v]
                    for k, limit in enumerate(group.limits):
                        step[k] = math.remainder(step[k], 2 * math.pi) if limit == math.pi else step[k]
                    units = [min(1.5 * w, limit) for w, limit in zip(group.widths, group.limits, strict=True)]
                    d = sum((x / w) ** 2 for x, w in zip(step, units, strict=True))
                    left_out += d >= 1
                    if d < 1:
                        seen = torch.cat([group.relative(v, u), v[a:], u[a:]])
                        seen = 8 * seen / torch.tensor(units + units[a:], dtype=torch.float64)
                        total += (1 - d) ** 2 * torch.outer(layer.kernel(seen), f)
                        weight += (1 - d) ** 2
                torch.testing.assert_close(layer.mix((total / weight).flatten()), wanted)
        assert left_out > 5

    def test_far_away(self, networks, name):
        """Finite moves, by hand."""
        model, (places, values) = classifier(networks, name), cloud()
        scores = model(places, values)
        for move, moved in MOVES.items():
            apart = (model(moved(places), values) - scores).abs().max() / scores.std(0).mean()
            assert (apart < 1e-11) == (move in KEPT[name]), move
            assert apart < 1e-11 or apart > 1e-4

    def test_derivatives(self, networks, name):
        found = lm.testing.equivariance_violation(
            classifier(networks, name), cloud(), sum(GENERATORS.values(), ()), input_representation=LAYOUT
        )
        for move, generators in GENERATORS.items():
            for generator in generators:
                violation = found[generator].max()
                assert violation < 1e-13 if move in KEPT[name] else violation > 1e-4, generator

    def test_shared_places(self, networks, name):
        """Of samples at the same places the kernel is evaluated once."""
        model, (places, values) = classifier(networks, name), cloud()
        shared = places[:1]
        torch.testing.assert_close(model(shared, values), model(shared.expand_as(places), values))

    def test_continuous_where_the_logarithm_is_cut(self, networks, name):
        """Points of a lattice stand just opposite; a step by 1e-9 takes some across the cut."""
        axis = torch.arange(-2.5, 3, dtype=torch.float64) / 3
        places = torch.cartesian_prod(axis, axis)[None]
        values = torch.rand(1, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        model = classifier(networks, name)
        step = torch.tensor([1e-9, 2e-9], dtype=torch.float64)
        scores = model(places, values)
        assert (model(places + step, values) - model(places - step, values)).abs().max() < 1e-6 * scores.abs().max()

    def test_all_of_it_learns(self, networks, name):
        model, (places, values) = classifier(networks, name).train(), cloud()
        model(places, values).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_planted_violation_is_seen(networks):
    class Absolute(networks.Shifts):
        def relative(self, at, other):
            return other - 0.999 * at

    torch.manual_seed(0)
    model = networks.LieClassifier(Absolute(), CENTRES).double().eval()
    found = lm.testing.equivariance_violation(model, cloud(), "translation", input_representation=LAYOUT)
    assert min(one.max() for one in found.values()) > 1e-5


class TestLifts:
    def apart(self, networks, lifts, angle=1.0):
        model, (places, values) = classifier(networks, "Motions", lifts=lifts), cloud()
        scores = model(places, values)
        return (
            (model(places @ rotation(angle).T, values) - scores).square().mean().sqrt() / scores.std(0).mean()
        ).item()

    def test_turns_between_lifts_are_exact(self, networks):
        for lifts in (1, 2, 3, 5):
            assert self.apart(networks, lifts, 2 * math.pi / lifts) < 1e-11
            assert self.apart(networks, lifts, math.pi / lifts) > 1e-7

    def test_other_turns_by_how_many_there_are(self, networks):
        """A sum over evenly spread angles of a smooth function of the circle converges faster than any power."""
        error = {lifts: self.apart(networks, lifts) for lifts in (1, 3, 6, 12)}
        assert error[1] > 3 * error[3] > 30 * error[6] > 300 * error[12], error

    def test_given_angles(self, networks):
        model, (places, values) = classifier(networks, "Motions", lifts=3), cloud()
        torch.testing.assert_close(model(places, values), model(places, values, networks.even_turns(3)))
        of_each = networks.even_turns(3).expand(30, 3)
        torch.testing.assert_close(model(places, values), model(places, values, of_each))
        turned = networks.even_turns(3, 0.7)
        torch.testing.assert_close(
            model(places @ rotation(0.7).T, values, turned), model(places, values), rtol=1e-10, atol=1e-12
        )
        assert not torch.allclose(model(places, values, turned), model(places, values), rtol=1e-9)

    def test_random_ones_in_training(self, networks):
        places, values = cloud()
        for name, several in (("Motions", True), ("Shifts", False)):
            model = classifier(networks, name).train()
            for norm in model.norms:
                norm.eval()
            torch.manual_seed(1)
            assert torch.allclose(model(places, values), model(places, values), rtol=1e-9) == (not several)
            model.eval()
            assert torch.equal(model(places, values), model(places, values))

    def test_even_turns(self, networks):
        assert networks.even_turns(4, 1.0).tolist() == pytest.approx([1 + k * math.pi / 2 for k in range(4)])


def test_plain_convolutions_claim_nothing(networks):
    torch.manual_seed(0)
    model = networks.PlainConvolutions().double().eval()
    images = torch.rand(8, 1, 16, 16, dtype=torch.float64)
    assert model(images).shape == (8, 10)
    assert min(lm.functional.relative(model, images, ("translation", "rotation")).values()) > 0.05
    assert lm.testing.lattice_violation(model, images, "rotate_90")["rotate_90"].max() > 1e-4
