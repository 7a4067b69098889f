"""Each network of the examples has the symmetry that it claims, exactly, and no other."""

import math

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Covectors, DirectSum, Points, Tensors, Vectors

CONSTANT = Tensors(2, 0)
STATES = DirectSum((Points(2), Covectors(2), CONSTANT, CONSTANT))
RATES = DirectSum((Vectors(2), Covectors(2), CONSTANT, CONSTANT))
GENERATORS = ("translation_x", "translation_y", "rotation")
KEPT = {
    "PlainPotential": set(),
    "CentredPotential": {"translation_x", "translation_y"},
    "ConvolutionalPotential": {"translation_x", "translation_y"},
    "PairwisePotential": set(GENERATORS),
}
BODIES = 5


def states(count=16, seed=0):
    source = torch.Generator().manual_seed(seed)
    moving = torch.randn(count, BODIES, 4, dtype=torch.float64, generator=source)
    return torch.cat([moving, 0.2 + torch.rand(count, BODIES, 2, dtype=torch.float64, generator=source)], dim=-1)


def dynamics(networks, name, unit=3.0):
    torch.manual_seed(0)
    return networks.Hamiltonian(getattr(networks, name)(BODIES), unit).double()


@pytest.mark.parametrize("name", KEPT)
class TestPotentials:
    def test_energies_keep_what_they_claim_and_nothing_else(self, networks, name):
        found = lm.testing.equivariance_violation(
            dynamics(networks, name), states(), GENERATORS, function="hamiltonian", input_representation=STATES
        )
        for generator, violation in found.items():
            if generator in KEPT[name]:
                assert violation.max() < 1e-13
            else:
                assert violation.max() > 1e-4

    def test_flows_do_too(self, networks, name):
        if KEPT[name]:
            lm.testing.assert_equivariant(
                dynamics(networks, name),
                states(),
                tuple(KEPT[name]),
                input_representation=STATES,
                output_representation=RATES,
            )

    def test_far_away(self, networks, name):
        """Finite transforms, by hand: the derivative at one place says nothing of others."""
        model, z = dynamics(networks, name), states()
        moved, turned = z.clone(), z.clone()
        moved[..., :2] += torch.tensor([3.0, -2.0], dtype=torch.float64)
        turn = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=torch.float64)
        turned[..., :2], turned[..., 2:4] = z[..., :2] @ turn.T, z[..., 2:4] @ turn.T
        for other, generator in ((moved, "translation_x"), (turned, "rotation")):
            apart = (model.hamiltonian(other) - model.hamiltonian(z)).abs().max()
            assert (apart < 1e-11) == (generator in KEPT[name])

    def test_hamiltons_equations(self, networks, name):
        model, z = dynamics(networks, name), states(3)
        step, rates = 1e-5, torch.zeros_like(z)
        for body in range(BODIES):
            for channel in range(4):
                direction = torch.zeros_like(z)
                direction[:, body, channel] = step
                slope = (model.hamiltonian(z + direction) - model.hamiltonian(z - direction)) / (2 * step)
                rates[:, body, (channel + 2) % 4] = slope if channel >= 2 else -slope
        torch.testing.assert_close(model(z).detach(), rates, rtol=1e-6, atol=1e-7)

    def test_its_own_energy_is_conserved(self, networks, name):
        model = dynamics(networks, name)
        assert F.conservation_error(model, states(), {"H": model.hamiltonian})["H"] < 1e-13

    def test_forces_can_be_trained(self, networks, name):
        model = dynamics(networks, name)
        model(states()).square().sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n[-6:] == "weight"
        )

    def test_order_of_bodies(self, networks, name):
        model, z = dynamics(networks, name), states()
        apart = (model.hamiltonian(z.flip(1)) - model.hamiltonian(z)).abs().max()
        assert (apart < 1e-12) == (name in {"PairwisePotential", "ConvolutionalPotential"})


def test_any_number_of_bodies(networks):
    for name in ("PairwisePotential", "ConvolutionalPotential"):
        assert dynamics(networks, name).hamiltonian(states()[:, :3]).shape == (16,)


def test_pairs_are_counted_once(networks):
    pairs = networks.PairwisePotential(2)
    pairs.network = torch.nn.Sequential()
    found = pairs(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 2.0], [10.0, 20.0]]]))
    # Of the one pair the five inputs are added up, in both orders, and halved.
    assert found.tolist() == [25 + 1 + 2 + 10 + 20]


def test_convolution_against_a_loop(networks):
    torch.manual_seed(0)
    layer = networks.ContinuousConvolution(3, 4, kernels=5).double()
    places, features = torch.randn(2, 6, 2).double(), torch.randn(2, 6, 3).double()
    for b in range(2):
        for i in range(6):
            total = sum(torch.outer(layer.kernel(places[b, i] - places[b, j]), features[b, j]) for j in range(6)) / 6
            torch.testing.assert_close(layer(places, features)[b, i], layer.mix(total.flatten()))


def test_a_vector_field_keeps_nothing(networks):
    torch.manual_seed(0)
    model = networks.VectorField(BODIES, (2.0, 30.0)).double()
    z = states()
    rates = model(z)
    assert rates.shape == z.shape
    assert not rates[..., 4:].any()
    assert (rates[..., 2:4].std() / rates[..., :2].std()).item() == pytest.approx(15, rel=0.5)
    found = F.relative(model, z, GENERATORS, input_representation=STATES, output_representation=RATES)
    assert min(found.values()) > 1e-2
    assert F.conservation_error(model, z, {"px": lambda z: z[..., 2].sum(1)})["px"] > 1e-2


def test_perceptron(networks):
    network = networks.perceptron((3, 8, 2))
    assert [type(layer).__name__ for layer in network] == ["Linear", "SiLU", "Linear"]
    assert network(torch.zeros(4, 7, 3)).shape == (4, 7, 2)


class TestGraphsAndVolumes:
    def test_egnn_is_equivariant(self, networks):
        torch.manual_seed(0)
        model, points = networks.EGNN().double(), torch.randn(4, 6, 3, dtype=torch.float64)
        lm.testing.assert_equivariant(
            model, points, "rigid", tolerance=1e-13, input_representation=Points(3), output_representation=Points(3)
        )
        energy = lm.testing.equivariance_violation(
            model, points, ("rigid", "scale"), output=lambda returned: returned[1], input_representation=Points(3)
        )
        assert max(energy[name].max() for name in energy if name != "scale") < 1e-13 < 1e-3 < energy["scale"].max()

    def test_egnn_keeps_mirror_images_and_orders(self, networks):
        torch.manual_seed(0)
        mirrors = lm.orbits.matrices({"inversion": -torch.eye(3)})
        metric = lm.FiniteEquivarianceError(
            [*mirrors, lm.orbits.permutations()], input_representation=Points(3), output_representation=Points(3)
        )
        metric.update(networks.EGNN().double(), torch.randn(4, 6, 3, dtype=torch.float64))
        assert max(metric.compute().values()) < 1e-13

    def test_volumes_keep_their_size_and_no_symmetry(self, networks):
        torch.manual_seed(0)
        model, volume = networks.UNet3d().double().eval(), torch.randn(2, 1, 8, 12, 8, dtype=torch.float64)
        assert model(volume).shape == (2, 2, 8, 12, 8)
        field = lm.representations.Field(3)
        found = F.relative(
            model, volume, ("translation", "rotation"), input_representation=field, output_representation=field
        )
        assert min(found.values()) > 0.1
