"""Drift of momenta and energy along learned dynamics: against analytic rates, and against Noether's theorem."""

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Covectors, DirectSum, Flow, Points

SPRINGS = 5


def states(count=32, seed=0):
    return torch.randn(count, SPRINGS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def momentum(axis):
    return lambda z: z[..., 2 + axis].sum(1)


def spin(z):
    return (z[..., 0] * z[..., 3] - z[..., 1] * z[..., 2]).sum(1)


QUANTITIES = {"px": momentum(0), "py": momentum(1), "spin": spin}


class Hamiltonian(nn.Module):
    """Bodies (B, n, (x, y, px, py)): kinetic energy, pairwise springs, and a learned potential if asked for."""

    def __init__(self, learned=True):
        super().__init__()
        torch.manual_seed(0)
        self.potential = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double() if learned else None

    def energy(self, z):
        q, p = z[..., :2], z[..., 2:]
        apart = (q[:, :, None] - q[:, None]).square().sum((1, 2, 3))
        learned = 0 if self.potential is None else self.potential(q).sum((1, 2))
        return p.square().sum((1, 2)) / 2 + apart / 4 + learned

    def forward(self, z):
        gradient = torch.func.grad(lambda state: self.energy(state).sum())(z)
        return torch.cat([gradient[..., 2:], -gradient[..., :2]], dim=-1)


PHASE_SPACE = DirectSum((Points(2), Covectors(2)))


class TestNoether:
    @pytest.mark.parametrize("learned", [False, True])
    def test_momenta_drift_as_the_hamiltonian_is_not_symmetric(self, learned):
        model, z = Hamiltonian(learned), states()
        along = F.conservation_error(model, z, QUANTITIES)
        asymmetry = lm.lie_derivative(
            model, z, ("translation", "rotation"), function="energy", input_representation=PHASE_SPACE
        )
        for (name, quantity), generator in zip(QUANTITIES.items(), asymmetry, strict=True):
            # {H, J} = L_X H, and dJ/dt along the flow of H is its opposite.
            wanted = asymmetry[generator].detach().square().mean().sqrt() / quantity(z).std()
            assert along[name].item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
            assert (along[name] > 1e-2) == learned

    def test_energy_is_conserved_by_any_hamiltonian(self):
        model = Hamiltonian()
        assert F.conservation_error(model, states(), {"energy": model.energy})["energy"] < 1e-13

    def test_an_ode_may_be_equivariant_and_conserve_nothing(self):
        def decaying(z):  # towards the centre of mass: commutes with all rotations
            return z.mean(1, keepdim=True) - z

        found = lm.functional.relative(
            decaying, states(), "rotation", input_representation=PHASE_SPACE, output_representation=PHASE_SPACE
        )
        assert found["rotation"] < 1e-14
        assert F.conservation_error(decaying, states(), {"spin": spin})["spin"] > 0.1

    def test_scale_of_phase_space(self):
        (scale,) = lm.generators("scale")
        z = states()
        moved = PHASE_SPACE.act(z, scale, 0.3, lm.Resampling())
        stretch = torch.tensor([0.3, 0.3, -0.3, -0.3], dtype=torch.float64).exp()
        torch.testing.assert_close(moved, z * stretch)


class TestMetric:
    def test_against_finite_times(self):
        model, z, h = Hamiltonian(), states(), 1e-4
        flow = Flow({"time": model})
        metric = lm.ConservationError(QUANTITIES)
        for part in z.split(10):
            metric.update(model, part)
        ahead, behind = (flow.act(z, flow.generators[0], step, lm.Resampling()) for step in (h, -h))
        for name, quantity in QUANTITIES.items():
            rate = (quantity(ahead) - quantity(behind)) / (2 * h)
            wanted = (rate.square().mean().sqrt() / quantity(z).std()).item()
            assert metric.compute()[name].item() == pytest.approx(wanted, rel=1e-6)
        assert metric.check.status == "agrees"

    def test_scale_and_zero_of_a_quantity_do_not_matter(self):
        model = Hamiltonian()
        found = F.conservation_error(model, states(), {"one": spin, "other": lambda z: 7 - 3 * spin(z)})
        assert found["one"].item() == pytest.approx(found["other"].item(), rel=1e-9)

    def test_errors_are_those_over_states(self):
        metric = lm.ConservationError(QUANTITIES)
        metric.update(Hamiltonian(), states(64))
        values = torch.tensor(
            [F.conservation_error(Hamiltonian(), states(64, k), QUANTITIES)["spin"] for k in range(40)]
        )
        assert metric.standard_error()["spin"].item() == pytest.approx(values.std().item(), rel=0.5)

    def test_the_model_is_in_evaluation_mode_and_untouched(self):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.drop = nn.BatchNorm1d(SPRINGS * 4).double(), nn.Dropout(0.5)

            def forward(self, z):
                return self.drop(self.norm(z.flatten(1))).reshape(z.shape)

        model = Noisy()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        F.conservation_error(model, states(), QUANTITIES)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        wanted = F.conservation_error(lambda z: z / (1 + 1e-5) ** 0.5, states(), QUANTITIES)
        for name, value in F.conservation_error(model, states(), QUANTITIES).items():
            assert value.item() == pytest.approx(wanted[name].item())

    def test_states_of_one_trajectory_count_as_one(self):
        once, twice = (lm.ConservationError(QUANTITIES) for _ in range(2))
        once.update(Hamiltonian(), states(30))
        twice.update(Hamiltonian(), states(30).repeat(2, 1, 1), groups=[*range(30)] * 2)
        error = once.standard_error()["spin"].item()
        assert twice.standard_error()["spin"].item() == pytest.approx(error, rel=0.05)

    def test_quantities_of_the_model_are_those_of_evaluation_mode(self):
        class Dropping(Hamiltonian):
            def __init__(self):
                super().__init__()
                self.drop = nn.Dropout(0.5)

            def energy(self, z):
                return super().energy(self.drop(z))

        model = Dropping()
        assert F.conservation_error(model, states(), {"energy": lambda z: model.energy(z)})["energy"] < 1e-12
        assert model.training

    def test_dynamics_that_write_into_their_input(self):
        def decaying(z):
            z[..., :2] = 0
            return z.neg_()

        z = states()
        found = F.conservation_error(decaying, z, {"px": momentum(0)})
        assert torch.equal(z, states())
        wanted = momentum(0)(z).square().mean().sqrt() / momentum(0)(z).std()
        assert found["px"].item() == pytest.approx(wanted.item())

    def test_differences_where_they_are_asked_for(self):
        quantities = {"angle": lambda z: spin(z).sin()}
        exact = F.conservation_error(Hamiltonian(), states(), quantities, method="forward")["angle"].item()
        metric = lm.ConservationError(quantities, method="difference")
        metric.update(Hamiltonian(), states())
        for near in (
            F.conservation_error(Hamiltonian(), states(), quantities, method="difference"),
            metric.compute(),
        ):
            assert near["angle"].item() != exact
            assert near["angle"].item() == pytest.approx(exact, rel=1e-4)

    def test_half_precision_dynamics(self):
        model = nn.Linear(4, 4, bias=False)
        wanted = F.conservation_error(model, states().float(), QUANTITIES)
        found = F.conservation_error(nn.Linear(4, 4, bias=False).requires_grad_(False), states().float(), QUANTITIES)
        assert found.keys() == wanted.keys()
        half = nn.Linear(4, 4, bias=False)
        half.load_state_dict(model.state_dict())
        half = half.to(torch.bfloat16)
        for name, value in F.conservation_error(half, states().float(), QUANTITIES).items():
            assert value.item() == pytest.approx(wanted[name].item(), rel=2e-2)

    def test_functions_and_outputs_are_chosen(self):
        class Model(nn.Module):
            def rates(self, z):
                return {"rate": -z}

        found = F.conservation_error(
            Model(), states(), {"spin": spin}, function="rates", output=lambda returned: returned["rate"]
        )
        wanted = (2 * spin(states())).square().mean().sqrt() / spin(states()).std()
        assert found["spin"].item() == pytest.approx(wanted.item())


def drift(model, quantities=QUANTITIES, **options):
    return F.conservation_error(model, states(), quantities, **options)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.ConservationError({}), TypeError, "`quantities` must map names"),
        (lambda: lm.ConservationError({"p": 3}), TypeError, "`quantities` must map names"),
        (lambda: lm.ConservationError({"p/x": spin}), ValueError, "names without '/'"),
        (lambda: drift(lambda z: z[:, :1]), ValueError, "rate of change of the state"),
        (lambda: drift(lambda z: z, {"p": lambda z: z[..., 2]}), ValueError, "one number for each"),
        (lambda: F.conservation_error(lambda z: z, {"q": states()}, QUANTITIES), TypeError, "one tensor"),
        (lambda: drift(lambda z: z, seed=1), TypeError, "must be among"),
    ],
)  # fmt: skip
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_quantity_that_does_not_vary_is_nan():
    with pytest.warns(UserWarning, match=r"NaN for \['one'\]"):
        found = F.conservation_error(lambda z: z, states(), {"one": lambda z: 0 * z.sum((1, 2)) + 1, "spin": spin})
    assert found["one"].isnan()
    assert found["spin"] > 0

    # Sums of a constant that is no binary fraction leave rounding, which is no spread.
    def constant(value):
        return lambda z: value + 1e-13 * spin(z)

    with pytest.warns(UserWarning, match="NaN for"):
        found = F.conservation_error(lambda z: z, states(), {str(k): constant(k / 10) for k in range(1, 10)})
    assert all(value.isnan() for value in found.values())
