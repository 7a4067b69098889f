"""Networks of molecules turn as they claim, exactly; those that are told directions do not."""

import math

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Invariant, Masked, Points, Vectors

PLACES = {"pos": Masked(Points(3), "mask")}
OUTPUTS = {"energy": Invariant(), "forces": Masked(Vectors(3), "mask")}
KINDS = ("GradientForces", "PairForces")


def molecules(count=6, atoms=5, seed=0):
    """Random places with 2 to all of the atoms there."""
    source = torch.Generator().manual_seed(seed)
    sizes = 2 + torch.arange(count) % (atoms - 1)
    mask = torch.arange(atoms) < sizes[:, None]
    pos = torch.randn(count, atoms, 3, dtype=torch.float64, generator=source) * mask[..., None]
    return {"pos": pos, "numbers": torch.randint(1, 9, (count, atoms), generator=source) * mask, "mask": mask}


def network(networks, kind, directions):
    torch.manual_seed(0)
    return getattr(networks, kind)(networks.AtomNetwork(directions, width=8), 3.0).double()


def turn(angle=1.0):
    """By hand: about z, then about x."""
    c, s = math.cos(angle), math.sin(angle)
    about_z = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
    return torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64) @ about_z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [False, True])
class TestBoth:
    def test_finite_motions_by_hand(self, networks, kind, directions):
        model, batch = network(networks, kind, directions), molecules()
        plain = model(batch)
        shift = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
        moved = model({**batch, "pos": batch["pos"] + shift})
        for part in OUTPUTS:
            torch.testing.assert_close(moved[part], plain[part], rtol=0, atol=1e-12)
        for matrix in (turn(), -torch.eye(3, dtype=torch.float64)):
            other = model({**batch, "pos": batch["pos"] @ matrix.T})
            apart = (
                (other["energy"] - plain["energy"]).abs().max(),
                (other["forces"] - plain["forces"] @ matrix.T).norm(),
            )
            assert (max(apart) < 1e-12) == (not directions)
            assert (min(apart) > 1e-3) == directions

    def test_the_meter_says_so(self, networks, kind, directions):
        model, batch = network(networks, kind, directions), molecules()
        options = {"input_representation": PLACES, "output_representation": OUTPUTS}
        found = F.relative(model, batch, "rigid", **options)
        for name, value in found.items():
            if directions and "rotation" in name:
                assert value > 1e-4
            else:
                assert value < 1e-14
        assert {name.split("/")[0] for name in found} == set(OUTPUTS)

    def test_order_of_atoms(self, networks, kind, directions):
        model, batch = network(networks, kind, directions), molecules()
        plain, other = model(batch), model({name: one.flip(1) for name, one in batch.items()})
        torch.testing.assert_close(other["energy"], plain["energy"], rtol=0, atol=1e-12)
        torch.testing.assert_close(other["forces"].flip(1), plain["forces"], rtol=0, atol=1e-12)

    def test_padding_is_not_there(self, networks, kind, directions):
        """One molecule alone, without padding, and with anything where no atom is."""
        model, batch = network(networks, kind, directions), molecules()
        plain = model(batch)
        size = int(batch["mask"][0].sum())
        alone = model({name: one[:1, :size] for name, one in batch.items()})
        torch.testing.assert_close(alone["energy"], plain["energy"][:1], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone["forces"], plain["forces"][:1, :size], rtol=0, atol=1e-12)
        filled = torch.where(batch["mask"][..., None], batch["pos"], 7.0)
        numbers = torch.where(batch["mask"], batch["numbers"], 8)
        other = model({**batch, "pos": filled, "numbers": numbers})
        for part in OUTPUTS:
            torch.testing.assert_close(other[part], plain[part], rtol=0, atol=1e-12)
        assert not plain["forces"][~batch["mask"]].any()

    def test_energy_alone(self, networks, kind, directions):
        model, batch = network(networks, kind, directions), molecules()
        torch.testing.assert_close(model.energy(batch), model(batch)["energy"], rtol=0, atol=1e-12)

    def test_can_be_trained(self, networks, kind, directions):
        model = network(networks, kind, directions)
        found = model(molecules())
        (found["forces"].square().sum() + found["energy"].square().sum()).backward()
        # Of an energy that is linear in the last bias forces know nothing, but the energy's own error does.
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())

    def test_jacobian_of_forces(self, networks, kind, directions):
        """Of a gradient it is symmetric; of sums over pairs it is not, also where they turn with the molecule."""
        model = network(networks, kind, directions)
        batch = {name: one[2:] for name, one in molecules(3, 4).items()}  # the one with all four atoms
        jacobian = torch.func.jacrev(lambda pos: model({**batch, "pos": pos})["forces"])(batch["pos"]).reshape(12, 12)
        apart = ((jacobian - jacobian.T).norm() / jacobian.norm()).item()
        assert (apart < 1e-12) == (kind == "GradientForces")
        assert (apart > 1e-2) == (kind == "PairForces")

    def test_net_force(self, networks, kind, directions):
        found = network(networks, kind, directions)(molecules())["forces"].sum(1).norm()
        assert (found < 1e-12) == (kind == "GradientForces")


@pytest.mark.parametrize("directions", [False, True])
class TestGradientForces:
    def test_against_differences(self, networks, directions):
        model, batch = network(networks, "GradientForces", directions), molecules(3)
        forces, step = model(batch)["forces"], 1e-5
        for atom in range(5):
            for axis in range(3):
                change = torch.zeros_like(batch["pos"])
                change[:, atom, axis] = step
                ends = [model.energy({**batch, "pos": batch["pos"] + sign * change}) for sign in (1, -1)]
                slope = (ends[0] - ends[1]) / (2 * step)
                torch.testing.assert_close(-slope, forces[:, atom, axis], rtol=1e-6, atol=1e-8)

    def test_torque_is_the_lie_derivative_against_the_rotation(self, networks, directions):
        model, batch = network(networks, "GradientForces", directions), molecules()
        names = ("rotation_x", "rotation_y", "rotation_z")
        changes = lm.lie_derivative(
            model, batch, names, function="energy", input_representation=PLACES, output_representation=Invariant()
        )
        torque = torch.linalg.cross(batch["pos"], model(batch)["forces"]).sum(1)
        assert (torque.abs().max() > 1e-3) == directions
        for axis, name in enumerate(names):
            torch.testing.assert_close(-changes[name], torque[:, axis], rtol=1e-9, atol=1e-12)


def test_features_against_loops(networks):
    torch.manual_seed(0)
    for directions in (False, True):
        model, batch = networks.AtomNetwork(directions, width=4, layers=1).double(), molecules(2, 4)
        found, seen, unit = model(batch)
        for b in range(2):
            there = int(batch["mask"][b].sum())
            features = model.embedding(batch["numbers"][b])
            for i in range(there):
                heard = torch.zeros(4, dtype=torch.float64)
                for j in range(there):
                    if i != j:
                        apart = batch["pos"][b, j] - batch["pos"][b, i]
                        gaussians = torch.exp(-0.5 * ((apart.norm() - model.centres) / 0.3).square())
                        wanted = torch.cat([gaussians, *[apart / apart.norm()] * directions])
                        torch.testing.assert_close(seen[b, i, j], wanted)
                        torch.testing.assert_close(unit[b, i, j], apart / apart.norm())
                        heard += model.filter[0](wanted) * model.mix[0](features[j]) / math.sqrt(8)
                torch.testing.assert_close(found[b, i], features[i] + model.update[0](heard))


def test_forces_of_pairs_against_loops(networks):
    for directions in (False, True):
        model, batch = network(networks, "PairForces", directions), molecules(2, 4)
        features, seen, unit = model.atoms(batch)
        forces = model(batch)["forces"]
        for b in range(2):
            for i in range(int(batch["mask"][b].sum())):
                total = torch.zeros(3, dtype=torch.float64)
                for j in range(int(batch["mask"][b].sum())):
                    if i != j:
                        pull = model.pull(torch.cat([features[b, i], features[b, j], seen[b, i, j]]))
                        total += pull if directions else pull * unit[b, i, j]
                torch.testing.assert_close(forces[b, i], 3 * total)


def test_a_planted_violation_is_seen(networks):
    """An invariant network whose forces are pushed along x by a hundredth."""
    model = network(networks, "GradientForces", False)

    def pushed(batch):
        found = model(batch)
        push = torch.tensor([0.01, 0, 0], dtype=torch.float64) * batch["mask"][..., None]
        return {**found, "forces": found["forces"] + push}

    batch = molecules()
    found = F.lee(pushed, batch, "rotation", input_representation=PLACES, output_representation=OUTPUTS)
    # |X · v| is 0.01 about y and z and nothing about x, in one of three components.
    for axis, size in (("x", 0.0), ("y", 1e-4 / 3), ("z", 1e-4 / 3)):
        assert found[f"forces/rotation_{axis}"].item() == pytest.approx(size, rel=1e-9, abs=1e-20)
        assert found[f"energy/rotation_{axis}"] < 1e-25
