"""Molecules and their forces, what the program makes of numbers, and the job at reduced size."""

import csv
import importlib.util
import math

import numpy as np
import pytest
import torch

from lie_metric import functional as F
from lie_metric.runs import Point, Run

for module in ("ase", "tblite", "tensorboard", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture
def forces(example):
    return example("molecule_forces")


def turn(angle=0.7):
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


class TestData:
    def test_molecules_are_closed_shells_of_four_elements(self, forces):
        found = forces.molecules()
        assert len(found) > 30
        assert {"CH4", "CH3CH2OH", "HCOOH", "NH3"} <= set(found)
        assert not {"CH3", "O2", "CH2_s3B1d", "C6H6", "SH2", "NO2"} & set(found)
        assert max(map(len, found.values())) == forces.ATOMS

    def test_energies_turn_and_forces_turn_with_them(self, forces):
        source = np.random.default_rng(0)
        for name in ("CH3CH2OH", "HCOOH"):
            one = forces.molecules()[name]
            places = one.positions + 0.07 * source.standard_normal(one.positions.shape)
            energy, found = forces.computed(one.numbers, places)
            again, other = forces.computed(one.numbers, places @ turn().T + 0.3)
            assert abs(again - energy) < 1e-10
            assert np.abs(other - found @ turn().T).max() < 1e-10
            assert np.abs(np.cross(places, found).sum(0)).max() < 1e-5
            assert np.abs(found.sum(0)).max() < 1e-10

    def test_forces_are_gradients_in_their_units(self, forces):
        one = forces.molecules()["H2O"]
        places = one.positions + 0.05
        found, step = forces.computed(one.numbers, places)[1], 1e-4
        for atom, axis in ((0, 2), (1, 1)):
            ends = []
            for sign in (1, -1):
                moved = places.copy()
                moved[atom, axis] += sign * step
                ends.append(forces.computed(one.numbers, moved)[0])
            assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(found[atom, axis], abs=1e-4)

    def test_configurations(self, forces):
        found = forces.configurations(["CH4", "H2O"], 3, 0.05, 0)
        assert found["mask"].sum(1).tolist() == [5, 5, 5, 3, 3, 3]
        assert found["numbers"][0, :5].tolist() == forces.molecules()["CH4"].numbers.tolist()
        for name in ("pos", "numbers", "forces"):
            assert not found[name][~found["mask"]].any()
        assert found["pos"].sum(1).abs().max() < 1e-12
        assert not torch.equal(found["pos"][0], found["pos"][1])
        rest = torch.tensor(forces.molecules()["CH4"].positions)
        apart = (found["pos"][:3, :5] - (rest - rest.mean(0))).std()
        assert 0.02 < apart < 0.08
        assert torch.equal(found["energy"], forces.configurations(["CH4", "H2O"], 3, 0.05, 0)["energy"])

    def test_molecules_that_are_held_out_are_not_seen(self, forces):
        known, unseen = forces.data(1, 1, 10, 0.05, 0)
        assert len(unseen["pos"]) == 10
        assert len(known["pos"]) + 10 == len(forces.molecules())
        # What composition leaves: no linear function of it is left in the training energies.
        counts = forces.counts(known)
        assert (counts.T @ known["energy"]).abs().max() < 1e-6
        assert known["energy"].std() < 5
        assert not torch.equal(unseen["numbers"], forces.data(1, 1, 10, 0.05, 1)[1]["numbers"])


class TestTurns:
    def test_random_rotations(self, forces):
        found = forces.random_rotations(4000, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found @ found.mT, torch.eye(3).double().expand_as(found))
        torch.testing.assert_close(torch.linalg.det(found), torch.ones(4000).double())
        assert found.mean(0).abs().max() < 0.03  # of a uniform rotation every entry has mean 0
        assert (found.square().mean(0) - 1 / 3).abs().max() < 0.03

    def test_forces_turn_with_places(self, forces):
        batch = forces.configurations(["CH4", "H2O"], 1, 0.05, 0)
        found = forces.turned(batch, torch.Generator().manual_seed(0))
        torch.testing.assert_close((found["pos"] * found["forces"]).sum(-1), (batch["pos"] * batch["forces"]).sum(-1))
        torch.testing.assert_close(forces.torques(found, found["forces"]).norm(dim=1), torch.zeros(2).double(),
                                   atol=1e-4, rtol=0)  # fmt: skip
        assert (found["pos"] - batch["pos"]).abs().max() > 0.1
        for name in ("energy", "numbers", "mask"):
            assert found[name] is batch[name]

    def test_random_generators_stand_for_all_rotations(self, forces):
        torch.manual_seed(0)
        matrices = torch.tensor([forces.random_rotation_generator().matrix for _ in range(2000)])
        square = matrices[:, :, :3]
        torch.testing.assert_close(square, -square.mT)
        assert not matrices[:, :, 3].any()
        torch.testing.assert_close(square.square().sum((1, 2)), torch.full((2000,), 2.0))
        assert (square.square().mean(0) - (1 - torch.eye(3)) / 3).abs().max() < 0.03


def learner(forces, name="free", penalty=0.0):
    setting = forces.MODELS[name]
    torch.manual_seed(0)
    network = setting.forces(forces.AtomNetwork(setting.directions, width=8), 1.0).double()
    return forces.Learner(network, (1.0, 1.0), 1e-3, setting.turned, penalty).double()


class TestPieces:
    def test_loss_of_the_truth_and_of_nothing(self, forces):
        batch = forces.configurations(["CH4", "H2O"], 2, 0.05, 0)
        energy, force = batch["energy"].std().item(), batch["forces"][batch["mask"]].square().mean().sqrt().item()

        class Known(torch.nn.Module):
            def __init__(self, size):
                super().__init__()
                self.size = size

            def forward(self, batch):
                return {name: self.size * batch[name] for name in ("energy", "forces")}

        def loss(size):
            return forces.Learner(Known(size), (energy, force), 1e-3).loss(batch).item()

        assert loss(1.0) == 0
        wanted = 1 + forces.ENERGY_WEIGHT * (batch["energy"] / energy).square().mean().item()
        assert loss(0.0) == pytest.approx(wanted)

    def test_curl(self, forces):
        batch = {"pos": torch.randn(500, 4, 3).double(), "mask": torch.ones(500, 4).bool()}
        swirl = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 0]]).double()
        assert forces.curl(lambda b: {"forces": -(b["pos"] ** 3)}, batch) < 1e-12
        assert forces.curl(lambda b: {"forces": b["pos"] @ swirl}, batch) == pytest.approx(1)
        shear = torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]]).double()
        assert forces.curl(lambda b: {"forces": b["pos"] @ shear}, batch) == pytest.approx(math.sqrt(0.5), abs=0.1)

    def test_penalty_is_lowered_by_its_gradient(self, forces):
        batch = forces.configurations(["CH4", "H2O", "HCN"], 2, 0.05, 0)
        model = learner(forces, penalty=1.0)
        model.log = lambda *arguments, **options: None
        options = {"input_representation": forces.PLACES, "output_representation": forces.OUTPUTS}

        def measured():
            return torch.stack(list(F.relative(model, batch, "rotation", **options).values())).square().mean()

        before, optimizer = measured(), torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(8):
            optimizer.zero_grad()
            (model.training_step(batch, 0) - model.loss(batch)).backward()
            optimizer.step()
        assert measured() < before / 2

    def test_turning_is_of_training_alone(self, forces):
        batch = forces.configurations(["CH4"], 2, 0.05, 0)
        plain, other = learner(forces), learner(forces, "free + turns")
        for model in (plain, other):
            model.log = lambda *arguments, **options: None
        assert plain.training_step(batch, 0) == plain.loss(batch)
        assert other.loss(batch) == plain.loss(batch)
        assert other.training_step(batch, 0) != plain.loss(batch)

    def test_fresh_energies_are_of_composition(self, forces):
        """Why the relative error of an untrained network is small: its spread has nothing to do with places."""
        _, unseen = forces.data(1, 5, 10, 0.07, 0)
        torch.manual_seed(0)
        energies = forces.GradientForces(forces.AtomNetwork(True), 4.0).double().energy(unseen).detach()
        counts = torch.cat([forces.counts(unseen), torch.ones(len(energies), 1)], dim=1)
        left = energies - counts @ torch.linalg.lstsq(counts, energies[:, None], driver="gelsd").solution[:, 0]
        assert left.var() < 1e-3 * energies.var()

    @pytest.mark.parametrize(("epochs", "every"), [(1, 1), (6, 1), (30, 5), (31, 31), (20, 4)])
    def test_the_last_epoch_is_measured(self, forces, epochs, every):
        assert forces.measured_every(epochs) == every
        assert epochs % every == 0

    def test_the_meter_finds_no_error_in_what_turns(self, forces):
        """A force field that is known: springs between all atoms."""
        batch = forces.configurations(["CH4", "H2O", "HCN"], 2, 0.05, 0)

        def springs(batch):
            pair = (batch["mask"][:, :, None] & batch["mask"][:, None])[..., None]
            apart = (batch["pos"][:, None] - batch["pos"][:, :, None]) * pair
            return {"energy": apart.square().sum((1, 2, 3)) / 4, "forces": apart.sum(2)}

        options = {"input_representation": forces.PLACES, "output_representation": forces.OUTPUTS}
        assert max(F.relative(springs, batch, "rigid", **options).values()) < 1e-14


def result(forces, energy=(0.1, 0.2), turning=(0.3, 0.4), accuracy=1.0, noether=math.nan, **others):
    """A network of which everything is given: errors of energy and forces before and after training."""
    run = Run("run", "records")
    for part, ends in (("energy", energy), ("forces", turning)):
        key = f"equivariance_{part}"
        for epoch, value in enumerate(ends):
            run.points += [Point(key, name, 0, epoch, epoch, value, 0.0) for name in forces.ROTATIONS]
            run.points += [Point(key, name, 0, epoch, epoch, 0.0, 0.0) for name in forces.TRANSLATIONS]
            run.points += [Point(f"{key}_lee", name, 0, epoch, epoch, 4 * value**2, 0.0) for name in forces.ROTATIONS]
            run.points += [Point(f"{key}_moved", name, 0, epoch, epoch, value, 0.0) for name in forces.MOVES]
    given = {"net_force": 0.0, "net_torque": 0.5, "curl": 0.25, "seconds": 10.0, "nothing": (3.0, 2.0)} | others
    return forces.Result(run, accuracy, accuracy, accuracy, given.pop("again", accuracy), noether=noether, **given)


def several(forces, factor=1.0, **options):
    """Three seeds that differ by a tenth; the factor is of what training left."""
    return [
        result(forces, (0.1 * s, 0.2 * s * factor), (0.3 * s, 0.03 * s * factor), **options) for s in (1.0, 1.1, 1.2)
    ]


class TestSentence:
    def test_follows_from_the_numbers(self, forces):
        none = {"energy": (0.0, 0.0), "turning": (1e-16, 1e-17)}
        results = {
            "invariant": [result(forces, **none) for _ in range(3)],
            "free": several(forces, accuracy=2.0, noether=1e-15),
            "free + turns": several(forces, 0.25, accuracy=0.5, again=0.6, seconds=11.0),
            "free + penalty": several(forces, 0.5, seconds=30.0),
            "equivariant direct": [result(forces, **none, net_torque=1.5) for _ in range(3)],
        }
        told = forces.sentence(results).split(".\n")
        start = "energies and forces are exact before, during and after training for"
        assert told[0] == f"By translation {start} all"
        assert told[1] == f"By rotation {start} invariant, equivariant direct (at most 1e-16)"
        assert told[2] == (
            "As free is trained, the rotation error of energies grows, to 2.00 (2.00 to 2.00) of what it was, the "
            "rotation error of forces falls, to 0.10 (0.10 to 0.10) of what it was"
        )
        assert told[3] == (
            "free + turns is left with less rotation error than free: 0.25 (0.25 to 0.25) of that of energies, 0.25 "
            "(0.25 to 0.25) of forces, for 1.10 (1.10 to 1.10) times the CPU time of training"
        )
        assert told[4].startswith("free + penalty is left with less rotation error than free: 0.50 (0.50 to 0.50)")
        assert told[5].endswith("molecules is less for free + turns; more for free; not told apart for free + penalty")
        assert told[7].endswith("is more for free + turns; not told apart for free, free + penalty")
        assert told[8].endswith(
            "is less for invariant, free + turns, free + penalty, equivariant direct; not told apart for free"
        )
        assert told[9] == (
            "Of the rotation error of free + turns, free + penalty has 2.00 (2.00 to 2.00) of energies, 2.00 (2.00 to "
            "2.00) of forces"
        )
        assert told[10].endswith("against the rotation, to 1e-15 of its size")
        assert told[11].endswith("equivariant direct 1.5 eV and 0.25 (though exact by rotation).")

    def test_of_few_networks(self, forces):
        one = forces.sentence({"free + turns": several(forces)})
        assert "By rotation energies and forces are exact before, during and after training for none." in one
        assert "left alone" not in one
        assert "built in" not in one
        assert "gradient" not in one

    def test_one_seed_tells_nothing_apart(self, forces):
        found = forces.sentence({"free": several(forces)[:1], "free + turns": several(forces, 0.1)[:1]})
        assert "is not told to change, to 2.00 of what it was" in found
        assert "free + turns is left with not clearly less rotation error than free: 0.10 of that" in found
        assert "less for" not in found
        assert "more for" not in found

    def test_tables(self, forces):
        results = {"invariant": several(forces, 0.0), "free": several(forces), "free + turns": several(forces, 0.5)}
        accuracy, symmetry = forces.table(results)
        assert [row[0] for row in accuracy] == [row[0] for row in symmetry] == ["network", *results]
        assert {len(row) for row in accuracy} == {6}
        assert {len(row) for row in symmetry} == {12}
        assert symmetry[2][1:3] == ["0.22 ± 0.01", "0.44 ± 0.02"]
        assert symmetry[1][1] == "0"
        rows = forces.ratio_table(results)
        assert [row[0] for row in rows] == ["network", "free", "free + turns"]
        assert rows[1][1:4] == ["", "", ""]
        assert rows[2][1] == "0.50 (0.50 to 0.50)"

    def test_ratios(self, forces):
        value, low, high = forces.ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
        # Logarithms 1, 2, 3 of 2: mean 2, standard error 1/√3, Student's t of 2 degrees of freedom 4.3027.
        assert value == pytest.approx(4)
        assert math.log2(high) == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-4)
        assert math.log2(low) == pytest.approx(2 - 4.30265 / math.sqrt(3), rel=1e-4)
        assert all(map(math.isnan, forces.ratio([0.0, 1.0], [1.0, 1.0])))
        assert forces.told((0.5, 0.011, 200.0)) == "0.50 (0.011 to 200)"
        assert forces.told((0.5, math.nan, math.nan)) == "0.50"


def test_whole_job(forces, tmp_path, capsys):
    arguments = ["--configurations", "2", "--test-configurations", "1", "--epochs", "1", "--seeds", "2"]
    arguments += ["--test-molecules", "6", "--models", "invariant", "free + penalty", "equivariant direct"]
    results = forces.main([*arguments, "--processes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    folder = tmp_path / "molecules"
    assert "[6/6] equivariant direct, seed 1: error of forces" in printed
    assert (folder / "molecule_forces.png").stat().st_size > 20_000
    assert [row[0] for row in csv.reader((folder / "table.csv").open())] == ["network", *results]
    assert (folder / "summary.txt").read_text().strip() in printed
    assert len(list(folder.glob("*/events*"))) == 6
    for name in ("invariant", "equivariant direct"):
        for one in results[name]:
            assert max(forces.error(one, part) for part in forces.OUTPUTS) < 1e-14
            assert one.turned_force_error == pytest.approx(one.force_error, rel=1e-9)
    for one in results["free + penalty"]:
        assert min(forces.error(one, part) for part in forces.OUTPUTS) > 1e-4
        assert one.noether < 1e-9
        assert one.curl < 1e-9
        assert one.net_force < 1e-9 < one.net_torque
    assert all(one.curl > 1e-2 and one.net_torque > 1e-3 for one in results["equivariant direct"])
    assert all(one.seconds > 0 for found in results.values() for one in found)
    assert {point.key for point in results["free + penalty"][0].run.points} >= {
        "equivariance_energy", "equivariance_forces_lee", "equivariance_energy_moved", "equivariance_forces_moved"
    }  # fmt: skip
    # The untrained network, and that after the epoch.
    assert len(forces.series(results["free + penalty"][0].run, "equivariance_energy", "rotation_x")[1]) == 2
    assert "training for invariant, equivariant direct (at most" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--configurations", "0"], "--configurations must be at least 1, got 0"),
        (["--test-molecules", "1"], "--test-molecules must be at least 2, got 1"),
        (["--test-molecules", "30"], "--test-molecules must be at most half of the"),
        (["--test-configurations", "0"], "--test-configurations must be at least 1"),
        (["--displacement", "0"], "--displacement must be positive and finite, got 0.0"),
        (["--displacement", "nan"], "--displacement must be positive and finite, got nan"),
        (["--penalty", "-1"], "--penalty must be positive and finite, got -1.0"),
        (["--learning-rate", "inf"], "--learning-rate must be positive and finite, got inf"),
        (["--models", "free", "free"], "--models must name each network once"),
        (["--models", "SchNet"], "invalid choice"),
    ],
)
def test_bad_command_lines(forces, arguments, message, capsys):
    with pytest.raises(SystemExit):
        forces.main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(forces, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tblite" else found(name))
    with pytest.raises(SystemExit):
        forces.main([])
    assert "tblite must be installed, for molecules and their forces: pip install ase tblite" in capsys.readouterr().err
