"""Chains: constraints are kept, projections are the paper's, and angles and Cartesian coordinates agree."""

import math

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Covectors, DirectSum, Flow, Points, Vectors

LENGTHS, MASSES = [1.0, 0.7, 1.3], [1.5, 0.4, 0.9]
BOBS = len(LENGTHS)
ROTATION = {2: ("rotation",), 3: ("rotation_z",)}


def phase_space(dimension):
    return DirectSum((Points(dimension), Covectors(dimension))), DirectSum((Vectors(dimension), Covectors(dimension)))


def states(dimension, count=12, seed=0):
    """On the constraints: rods of their lengths, velocities across them."""
    source = torch.Generator().manual_seed(seed)
    rods, speeds = torch.randn(2, count, BOBS, dimension, dtype=torch.float64, generator=source)
    rods = rods / rods.norm(dim=-1, keepdim=True) * torch.tensor(LENGTHS, dtype=torch.float64)[:, None]
    speeds = speeds - (speeds * rods).sum(-1, keepdim=True) * rods / rods.square().sum(-1, keepdim=True)
    momenta = torch.tensor(MASSES, dtype=torch.float64)[:, None] * speeds.cumsum(1)
    return torch.cat([rods.cumsum(1), momenta], dim=-1)


def anywhere(dimension, count=12):
    return torch.randn(count, BOBS, 2 * dimension, dtype=torch.float64)


def constrained(networks, dimension, kind="PlacePotential"):
    torch.manual_seed(0)
    return networks.ConstrainedHamiltonian(getattr(networks, kind)(BOBS, dimension), LENGTHS, MASSES).double()


def turned(vectors, angle):
    """By hand, about the last axis but one: the first two coordinates."""
    turn = torch.eye(vectors.shape[-1], dtype=torch.float64)
    rows = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    turn[:2, :2] = torch.tensor(rows, dtype=torch.float64)
    return vectors @ turn.T


def integrate(rates, start, times, **options):
    return pytest.importorskip("torchdiffeq").odeint(lambda _, z: rates(z), start, times, **options)


@pytest.mark.parametrize("dimension", [2, 3])
class TestConstraints:
    def test_differences_and_their_transpose(self, networks, dimension):
        a, b = torch.randn(2, BOBS, dimension, dtype=torch.float64)
        matrix = torch.eye(BOBS, dtype=torch.float64)
        for i in range(1, BOBS):
            matrix[i, i - 1] = -1
        torch.testing.assert_close(networks.Rods.along(a), matrix @ a)
        torch.testing.assert_close(networks.Rods.along_transposed(b), matrix.T @ b)

    def test_values_by_hand(self, networks, dimension):
        model, z = constrained(networks, dimension), anywhere(dimension)
        found, before = model.constraints(z), torch.zeros(12, 2 * dimension, dtype=torch.float64)
        for i in range(BOBS):
            here = torch.cat([z[:, i, :dimension], z[:, i, dimension:] / MASSES[i]], dim=-1)
            rod, speed = (here - before).chunk(2, dim=-1)
            torch.testing.assert_close(found[:, i].detach(), (rod.square().sum(1) - LENGTHS[i] ** 2) / 2)
            torch.testing.assert_close(found[:, BOBS + i].detach(), (rod * speed).sum(1))
            before = here
        assert model.constraints(states(dimension)).abs().max() < 1e-14
        assert torch.equal(model.rods.stretch(z), found[:, :BOBS].detach())

    def test_the_projection_is_the_formula_of_the_paper(self, networks, dimension):
        """P = I - J dΦᵀ (dΦ J dΦᵀ)⁻¹ dΦ with Jacobians by autograd, off the constraints too."""
        model, z = constrained(networks, dimension), anywhere(dimension)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model.constraints(one[None])[0]))(z)
        gradient = torch.func.grad(lambda one: model.hamiltonian(one).sum())(z)

        def turn(rows):
            a, b = rows.chunk(2, dim=-1)
            return torch.cat([b, -a], dim=-1)

        rows, free = jacobian.flatten(2), turn(gradient).flatten(1)[..., None]
        across = turn(jacobian).flatten(2)
        wanted = free - across.mT @ torch.linalg.solve(rows @ across.mT, rows @ free)
        torch.testing.assert_close(model(z), wanted[..., 0].reshape(z.shape), rtol=1e-11, atol=1e-11)
        assert (rows @ model(z).flatten(1)[..., None]).abs().max() < 1e-12

    def test_projecting_twice_is_projecting_once(self, networks, dimension):
        model, z, rates = constrained(networks, dimension), anywhere(dimension), anywhere(dimension)
        once = model.rods.project(z, rates, model.inverse)
        torch.testing.assert_close(model.rods.project(z, once, model.inverse), once, rtol=1e-11, atol=1e-11)
        assert (once - rates).abs().max() > 0.1

    def test_flow_keeps_constraints_and_its_energy(self, networks, dimension):
        model, z = constrained(networks, dimension), anywhere(dimension)
        quantities = {f"{k}": lambda s, k=k: model.constraints(s)[:, k] for k in range(2 * BOBS)}
        found = F.conservation_error(model, z, {**quantities, "H": model.hamiltonian})
        assert max(found.values()) < 1e-13

    def test_rollouts_keep_them_to_the_tolerance(self, networks, dimension):
        model, z = constrained(networks, dimension), states(dimension, 4)
        times = torch.linspace(0, 0.2, 3, dtype=torch.float64)
        with torch.no_grad():
            path = integrate(model, z, times, method="dopri5", rtol=1e-12, atol=1e-13)
            drift = [model.constraints(one).abs().max() for one in path]
            energy = model.hamiltonian(path[-1]) - model.hamiltonian(z)
        assert (path[-1] - z).abs().max() > 0.05
        assert max(drift) < 1e-10
        assert energy.abs().max() < 1e-10

    def test_what_is_zero_on_the_constraints_changes_no_flow(self, networks, dimension):
        """Off the constraints the energy is not determined: a rotation's error is, a translation's is not."""
        model, z = constrained(networks, dimension), states(dimension)
        other = constrained(networks, dimension)
        inner = other.potential

        class More(torch.nn.Module):
            def forward(self, places):
                stretch = other.rods.stretch(torch.cat([places, places], dim=-1))
                return inner(places) + (stretch * (3 + places[..., 0])).sum(-1)

        other.potential = More()
        torch.testing.assert_close(other(z), model(z), rtol=1e-12, atol=1e-12)
        assert (other(anywhere(dimension)) - model(anywhere(dimension))).abs().max() > 0.1
        inside = phase_space(dimension)[0]
        for generator, same in ((ROTATION[dimension][0], True), ("translation_x", False)):
            one, two = (
                lm.lie_derivative(m, z, generator, function="hamiltonian", input_representation=inside)[generator]
                for m in (model, other)
            )
            assert ((one - two).abs().max() < 1e-12) == same

    def test_masses_can_be_trained(self, networks, dimension):
        model = constrained(networks, dimension)
        model(states(dimension)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert model.log_masses.grad.abs().min() > 0
        fresh = networks.ConstrainedHamiltonian(networks.PlacePotential(BOBS, dimension), LENGTHS)
        assert fresh.inverse.flatten().tolist() == [1.0] * BOBS

    def test_symmetries_of_potentials(self, networks, dimension):
        z, (inside, outside) = states(dimension), phase_space(dimension)
        plain, level = (constrained(networks, dimension, kind) for kind in ("PlacePotential", "HeightPotential"))
        kept = ("translation_x", *(ROTATION[3] if dimension == 3 else ()))
        for model, exact in ((level, True), (plain, False)):
            found = lm.testing.equivariance_violation(
                model, z, kept, function="hamiltonian", input_representation=inside
            )
            assert all((one.max() < 1e-13) == exact and (exact or one.max() > 1e-3) for one in found.values())
        if dimension == 3:
            # The flow turns as the state does, rods and multipliers and all; and by a large turn, by hand.
            lm.testing.assert_equivariant(
                level, z, ROTATION[3], input_representation=inside, output_representation=outside
            )
            for model, exact in ((level, True), (plain, False)):
                apart = model(turned(z.unflatten(-1, (2, 3)), 1.0).flatten(-2)).unflatten(-1, (2, 3))
                apart = (apart - turned(model(z).unflatten(-1, (2, 3)), 1.0)).abs().max()
                assert (apart < 1e-12) == exact

    def test_spin_changes_as_the_energy_is_asymmetric(self, networks, dimension):
        model, z = constrained(networks, dimension), states(dimension)
        generator = ROTATION[dimension][0]

        def spin(states):
            q, p = states.chunk(2, dim=-1)
            return (q[..., 0] * p[..., 1] - q[..., 1] * p[..., 0]).sum(-1)

        asymmetry = lm.lie_derivative(
            model, z, generator, function="hamiltonian", input_representation=phase_space(dimension)[0]
        )[generator]
        change = torch.func.jvp(spin, (z,), (model(z).detach(),))[1]
        torch.testing.assert_close(change, -asymmetry.detach(), rtol=1e-11, atol=1e-13)
        assert asymmetry.abs().max() > 1e-3


def angular(networks, field=False):
    torch.manual_seed(0)
    inner = networks.AngularField(BOBS) if field else networks.AngularHamiltonian(BOBS)
    return networks.InAngles(inner, LENGTHS, MASSES).double()


class TestAngles:
    def test_there_and_back(self, networks):
        model, z = angular(networks), states(2)
        state = model.enter(z)
        torch.testing.assert_close(model.leave(state), z, rtol=1e-12, atol=1e-12)
        shifted = state.clone()
        shifted[:, :BOBS] += 2 * math.pi
        torch.testing.assert_close(model.leave(shifted), z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.inner(shifted), model.inner(state))

    def test_straight_down_and_level_by_hand(self, networks):
        model = angular(networks)
        level = torch.tensor([[math.pi / 2] * BOBS + [0.0] * BOBS], dtype=torch.float64)
        places = model.leave(level)[0, :, :2]
        torch.testing.assert_close(places[:, 0], torch.tensor(LENGTHS, dtype=torch.float64).cumsum(0))
        down = torch.zeros(1, BOBS, 4, dtype=torch.float64)
        down[0, :, 1] = -torch.tensor(LENGTHS, dtype=torch.float64).cumsum(0)
        down[0, :, 2] = 1.0  # of all bobs, so that a rod carries those below it
        assert model.enter(down)[0, :BOBS].tolist() == [0] * BOBS
        wanted = [length * (BOBS - k) for k, length in enumerate(LENGTHS)]
        assert model.enter(down)[0, BOBS:].tolist() == pytest.approx(wanted)

    def test_momenta_are_canonical(self, networks):
        """p · dq = p_θ · dθ along the constraints, for any motion of the angles."""
        model, z = angular(networks), states(2)
        state = model.enter(z)
        angles, momenta = state.chunk(2, dim=-1)
        for _ in range(3):
            step = torch.randn_like(angles)
            moved = torch.func.jvp(model.leave, (state,), (torch.cat([step, 0 * step], dim=-1),))[1]
            torch.testing.assert_close((z[..., 2:] * moved[..., :2]).sum((1, 2)), (momenta * step).sum(1))

    def test_the_true_energy_has_the_same_flow_in_both(self, networks):
        """Angle equations, by canonical momenta, against Cartesian ones with constraints."""
        model, z = angular(networks), states(2)

        class Gravity(torch.nn.Module):
            def forward(self, places):
                return (places[..., 1] * torch.tensor(MASSES, dtype=torch.float64)).sum(-1)

        cartesian = networks.ConstrainedHamiltonian(Gravity(), LENGTHS, MASSES).double()

        class Inner(torch.nn.Module):
            def forward(self, state):
                gradient = torch.func.grad(lambda s: cartesian.hamiltonian(model.leave(s)).sum())(state)
                a, b = gradient.chunk(2, dim=-1)
                return torch.cat([b, -a], dim=-1)

        other = networks.InAngles(Inner(), LENGTHS, MASSES).double()
        torch.testing.assert_close(other(z), cartesian(z), rtol=1e-10, atol=1e-10)

    def test_mass_matrix(self, networks):
        model = angular(networks).inner
        angles = torch.randn(20, BOBS, dtype=torch.float64)
        lower = model.lower(angles)
        assert torch.equal(lower, lower.tril())
        assert torch.linalg.eigvalsh(lower @ lower.mT).min() > 1e-3
        state = torch.cat([angles, torch.randn_like(angles)], dim=-1)
        inverse, momenta = lower @ lower.mT, state[:, BOBS:, None]
        kinetic = model.hamiltonian(state) - model.hamiltonian(torch.cat([angles, 0 * angles], dim=-1))
        torch.testing.assert_close(kinetic, (momenta.mT @ inverse @ momenta)[:, 0, 0] / 2)
        torch.testing.assert_close(model(state)[:, :BOBS], (inverse @ momenta)[..., 0])

    def test_hamiltons_equations(self, networks):
        model, state, step = angular(networks).inner, torch.randn(3, 2 * BOBS, dtype=torch.float64), 1e-5
        for k in range(2 * BOBS):
            direction = torch.zeros_like(state)
            direction[:, k] = step
            slope = (model.hamiltonian(state + direction) - model.hamiltonian(state - direction)) / (2 * step)
            found = model(state)[:, (k + BOBS) % (2 * BOBS)]
            torch.testing.assert_close(found, slope if k >= BOBS else -slope, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("field", [False, True])
    def test_rods_keep_their_lengths(self, networks, field):
        model, z = angular(networks, field), states(2, 4)
        with torch.no_grad():
            rates = model(z)
            assert torch.func.jvp(model.rods.stretch, (z,), (rates,))[1].abs().max() < 1e-13
            times = torch.linspace(0, 0.2, 3, dtype=torch.float64)
            path = integrate(model.inner, model.enter(z), times, method="dopri5", rtol=1e-9, atol=1e-9)
            assert model.rods.stretch(model.leave(path)).abs().max() < 1e-13
            # Rollouts in angles are those of the rates in Cartesian coordinates.
            other = integrate(model, z, times, method="dopri5", rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.leave(path), other, rtol=1e-6, atol=1e-6)

    def test_energy(self, networks):
        model, z = angular(networks), states(2)
        assert F.conservation_error(model, z, {"H": model.hamiltonian})["H"] < 1e-13
        assert not hasattr(angular(networks, field=True).inner, "hamiltonian")

    def test_turning_all_angles_is_turning_the_chain(self, networks):
        """The same number by a flow in angles and by a rotation in Cartesian coordinates."""
        model, z = angular(networks), states(2)
        turning = Flow({"rotation": lambda s: torch.cat([torch.ones(1, BOBS), torch.zeros(1, BOBS)], 1).to(s) + 0 * s},
                       dimension=2)  # fmt: skip
        inner = F.relative(
            model.inner, model.enter(z), "rotation", function="hamiltonian", input_representation=turning
        )
        outer = F.relative(model, z, "rotation", function="hamiltonian", input_representation=phase_space(2)[0])
        assert inner["rotation"].item() == pytest.approx(outer["rotation"].item(), rel=1e-10)
        assert inner["rotation"] > 1e-2


def test_a_free_field_keeps_nothing(networks):
    torch.manual_seed(0)
    model, z = networks.FreeField(BOBS, 3).double(), states(3)
    assert model(z).shape == z.shape
    change = torch.func.jvp(networks.Rods(LENGTHS).stretch, (z,), (model(z).detach(),))[1]
    assert change.abs().min() > 1e-4
    inside, outside = phase_space(3)
    found = F.relative(model, z, "rotation_z", input_representation=inside, output_representation=outside)
    assert found["rotation_z"] > 0.1
