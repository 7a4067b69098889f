"""Chains that are simulated exactly, and the job at reduced size."""

import csv
import math
import pickle

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Flow
from lie_metric.runs import Point, Run

for module in ("torchdiffeq", "tensorboard", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture
def pendulum(example):
    return example("pendulum_constraints")


SYSTEMS = pytest.mark.parametrize("system", ["plane", "space"])


class TestData:
    @SYSTEMS
    def test_trajectories_keep_what_they_must(self, pendulum, system):
        path, exact = pendulum.trajectories(system, 3, 10, 1.0, 0), pendulum.truth(3)
        assert path.shape == (21, 10, 3, 2 * pendulum.DIMENSIONS[system])
        flat = path.flatten(0, 1)
        assert exact.constraints(flat).abs().max() < 1e-13
        energy = exact.hamiltonian(flat).unflatten(0, path.shape[:2])
        assert (energy - energy[0]).abs().max() < 1e-6 < 0.1 < energy[0].std()
        turning = pendulum.spin(flat).unflatten(0, path.shape[:2])
        change = (turning - turning[0]).abs().max()
        assert change < 1e-6 if system == "space" else change > 0.1
        assert (path[-1] - path[0]).abs().mean() > 0.1
        assert pendulum.trajectories(system, 3, 10, 1.0, 0) is path  # made once

    def test_against_the_equations_of_angles(self, pendulum):
        """d/dt ∂L/∂ω = ∂L/∂θ of the Lagrangian in angles, which knows no constraint: an independent formulation."""
        heavy = torch.tensor(pendulum.masses(2), dtype=torch.float64)

        def places(angles):
            return torch.stack([angles.sin(), -angles.cos()], dim=-1).cumsum(0)

        def lagrangian(angles, speeds):
            velocities = torch.func.jvp(places, (angles,), (speeds,))[1]
            return (heavy[:, None] * velocities.square()).sum() / 2 - (heavy * places(angles)[:, 1]).sum()

        by_angle, by_speed = (torch.func.grad(lagrangian, argnums=k) for k in (0, 1))

        def rates(state):
            angles, speeds = state.chunk(2)
            mass = torch.func.jacrev(by_speed, argnums=1)(angles, speeds)
            turned = torch.func.jacrev(by_speed, argnums=0)(angles, speeds) @ speeds
            return torch.cat([speeds, torch.linalg.solve(mass, by_angle(angles, speeds) - turned)])

        z = pendulum.starts("plane", 2, 2, 0)
        times = torch.linspace(0, 1, 3, dtype=torch.float64)
        found = pendulum.true_rollout(z, times)
        for row in range(2):
            rods, speeds = (pendulum.Rods.along(part) for part in (z[row, :, :2], z[row, :, 2:] / heavy[:, None]))
            angles = torch.atan2(rods[:, 0], -rods[:, 1])
            level = torch.stack([angles.cos(), angles.sin()], dim=-1)
            start = torch.cat([angles, (speeds * level).sum(-1)])
            path = pendulum.rollout(rates, start, times, method="dopri5", rtol=1e-9, atol=1e-9)
            for state, wanted in zip(path, found[:, row], strict=True):
                torch.testing.assert_close(places(state[:2]), wanted[:, :2], rtol=1e-6, atol=1e-6)

    def test_space_against_accelerations(self, pendulum):
        """m a = -m g + Σ λ ∂φ/∂q with λ from d²φ/dt² = 0, in velocities: an independent formulation."""
        heavy = torch.tensor(pendulum.masses(2), dtype=torch.float64)[:, None]
        z = pendulum.starts("space", 2, 4, 1)
        for state in z:
            q, v = state[:, :3], state[:, 3:] / heavy

            def phi(q):
                return torch.stack([q[0].square().sum(), (q[1] - q[0]).square().sum()])

            jacobian = torch.func.jacrev(phi)(q).flatten(1)
            bent = torch.func.jvp(lambda q, v=v: torch.func.jvp(phi, (q,), (v,))[1], (q,), (v,))[1]
            down = torch.tensor([0.0, 0, -1], dtype=torch.float64).expand(2, 3)
            inverse = (1 / heavy).expand(2, 3).flatten()
            pulls = torch.linalg.solve(jacobian * inverse @ jacobian.T, -bent - jacobian @ down.flatten())
            acceleration = down + (inverse * (jacobian.T @ pulls)).unflatten(0, (2, 3))
            rates = pendulum.truth(2)(state[None])[0]
            torch.testing.assert_close(rates[:, :3], v)
            torch.testing.assert_close(rates[:, 3:], heavy * acceleration)

    def test_a_chain_in_a_plane_is_one_in_space(self, pendulum):
        z = pendulum.starts("plane", 3, 4, 0)
        lifted = torch.zeros(4, 3, 6, dtype=torch.float64)
        lifted[..., [0, 2, 3, 5]] = z
        torch.testing.assert_close(pendulum.truth(3)(lifted)[..., [0, 2, 3, 5]], pendulum.truth(3)(z))

    @SYSTEMS
    def test_the_meter_on_the_truth(self, pendulum, system):
        """By hand: rotations move V = Σ m z by Σ m x, translations up by Σ m, and level ones not at all."""
        z = pendulum.chunks(pendulum.trajectories(system, 2, 40, 0.5, 0), 1, 1, 0)[:, 0]
        exact, heavy = pendulum.truth(2), torch.tensor(pendulum.masses(2), dtype=torch.float64)
        found, d = pendulum.true_values(system, z), pendulum.DIMENSIONS[system]
        size = exact.hamiltonian(z).std()
        level = (heavy * z[..., 1 if d == 3 else 0]).sum(1)
        turn, up = ("rotation_x", "translation_z") if d == 3 else ("rotation", "translation_y")
        assert found["energy"][turn] == pytest.approx((level.square().mean().sqrt() / size).item())
        assert found["energy"][up] == pytest.approx((heavy.sum() / size).item())
        assert found["energy"]["translation_x"] < 1e-12
        assert found["conservation"]["energy"] < 1e-12
        assert all(value > 0.1 for value in found["tangent"].values())
        if d == 3:
            assert max(found[kind]["rotation_z"] for kind in ("energy", "field")) < 1e-12
            assert found["conservation"]["spin"] < 1e-12

    @SYSTEMS
    def test_allowed_translations_stretch_no_rod(self, pendulum, system):
        z = pendulum.starts(system, 3, 5, 0)
        flow = pendulum.tangents(system, 3)
        assert [one.name for one in flow.generators] == list(pendulum.SHIFTS[system])
        for step in flow.tangents(z, flow.generators, lm.Resampling()):
            change = torch.func.jvp(pendulum.truth(3).constraints, (z,), (step,))[1]
            assert change.abs().max() < 1e-12
            assert step.abs().max() > 0.1

    def test_chunks_are_pieces_of_trajectories(self, pendulum):
        path = pendulum.trajectories("plane", 2, 4, 1.0, 0)
        pieces = pendulum.chunks(path, 3, 2, 5)
        assert pieces.shape == (12, 3, 2, 4)
        for k, piece in enumerate(pieces):
            assert any(torch.equal(piece, path[start : start + 3, k // 3]) for start in range(19))

    def test_starts_have_no_preferred_direction_about_the_vertical(self, pendulum):
        z = pendulum.starts("space", 1, 4000, 0)
        assert z[..., :2].mean((0, 1)).abs().max() < 0.03
        assert (z[..., 0].std() / z[..., 1].std()).item() == pytest.approx(1, abs=0.05)
        assert pendulum.starts("plane", 2, 3, 0).equal(pendulum.starts("plane", 2, 3, 0))


def learner(pendulum, system, model, bobs=2):
    torch.manual_seed(0)
    pieces = pendulum.chunks(pendulum.trajectories(system, bobs, 8, 0.5, 0), 2, 2, 0)
    dynamics = pendulum.build(system, model, bobs)
    return pendulum.Learner(dynamics, pendulum.spread_of_changes(pieces), 1e-3).double(), pieces


@SYSTEMS
def test_loss_is_zero_for_the_truth_and_one_where_nothing_moves(pendulum, system):
    model, pieces = learner(pendulum, system, "CHNN")

    class Still(torch.nn.Module):
        def forward(self, states):
            return 0 * states

    for dynamics, wanted in ((pendulum.truth(2), 0), (Still(), 1)):
        model.dynamics = dynamics
        assert model.loss(pieces).item() == pytest.approx(wanted, abs=1e-6 if not wanted else 0.3)
    scale, d = model.scale, pendulum.DIMENSIONS[system]
    assert scale.shape == (2, 2 * d)
    assert torch.equal(scale[:, :1].expand(-1, d), scale[:, :d])


@pytest.mark.parametrize(("system", "model"), [("plane", "CHNN"), ("plane", "HNN in angles"), ("space", "CHNN")])
def test_noether(pendulum, system, model):
    model, pieces = learner(pendulum, system, model)
    assert pendulum.noether(model, system, pieces[:, 0]) < 1e-10


def test_noether_says_nothing_of_rounding(pendulum):
    model, pieces = learner(pendulum, "space", "CHNN of heights")
    assert math.isnan(pendulum.noether(model, "space", pieces[:, 0]))


def test_which_have_an_energy(pendulum):
    found = {
        (system, name): learner(pendulum, system, name)[0].energetic
        for name, systems in pendulum.MODELS.items()
        for system in systems
    }
    assert [key for key, energetic in found.items() if not energetic] == [
        ("plane", "neural ODE"),
        ("space", "neural ODE"),
    ]


def test_rods_along_the_flow_are_what_the_second_monitor_reads(pendulum):
    """A planted drift: the rate of change of φ, by hand."""
    model, pieces = learner(pendulum, "space", "neural ODE")
    z = pieces[:, 0]
    flow = Flow({"flow": lambda z: model(z).detach()})
    found = F.lee(
        model, z, flow.generators, function="stretch", input_representation=flow,
        output_representation=lm.representations.Invariant(),
    )  # fmt: skip
    rods, speeds = (model.rods.along(part) for part in (z[..., :3], model(z).detach()[..., :3]))
    assert found["flow"].item() == pytest.approx((rods * speeds).sum(-1).square().mean().item())
    assert found["flow"] > 1e-4


def test_whole_job(pendulum, tmp_path, capsys):
    arguments = ["--systems", "20", "--test-systems", "12", "--chunks", "2", "--epochs", "2", "--batch-size", "20"]
    arguments += ["--horizon", "0.2", "--seeds", "1", "--models", "CHNN", "CHNN of heights", "neural ODE"]
    results = pendulum.main([*arguments, "--processes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    folder = tmp_path / "pendulum"
    assert "[5/5] space: neural ODE, seed 0: error of rates" in printed
    assert (folder / "pendulum_constraints.png").stat().st_size > 20_000
    names = [row[0] for row in csv.reader((folder / "table.csv").open())]
    assert names == [
        *("in the plane", "truth", "truth*", "CHNN", "neural ODE*"),
        *("in space", "truth", "truth*", "CHNN", "CHNN of heights", "neural ODE*"),
    ]
    assert (folder / "summary.txt").read_text().strip() in printed
    assert len(list(folder.glob("*/events*"))) == 5
    for system, networks in results.items():
        for name, found in networks.items():
            for one in found:
                values = pendulum.curve(one, pendulum.VERTICAL[system])
                assert len(values) == 3
                assert all(map(math.isfinite, values))
                assert one.times == pytest.approx([0.05, 0.1, 0.15, 0.2])
                assert (one.rods < 1e-12) == ((system, name) != ("space", "neural ODE"))
                assert math.isfinite(one.rollout_error)
                assert pickle.loads(pickle.dumps(one)).equivariance == one.equivariance  # processes send it
                if name != "neural ODE":
                    assert one.conservation["own energy"] < 1e-12
                    assert one.conservation["energy"] > 1e-3
    for one in results["space"]["CHNN of heights"]:
        assert max(pendulum.curve(one, "rotation_z")) < 1e-12
        assert one.conservation["spin"] < 1e-12
        assert one.equivariance["rotation_x"] > 1e-3
    for one in results["space"]["CHNN"]:
        assert one.conservation["spin"] > 1e-4
        assert one.noether < 1e-9
        assert one.masses != [1.0, 1.0]
    assert "CHNN of heights at most" in printed
    assert "They change in neural ODE in space by" in printed


GIVEN = {"rotation": 1.0, "translation_x": 0.0, "translation_y": 2.0}


def result(pendulum, energetic=True, rotation=1.0, rollout=0.01, rods=1e-16, system="plane"):
    """A network of which everything is given."""
    names = pendulum.GENERATORS[system]
    values = {name: GIVEN.get(name, 0.5) for name in names} | {pendulum.VERTICAL[system]: rotation}
    run = Run("run", "records")
    run.points = [Point("equivariance", name, 0, k, k, values[name] * (k + 1), 0.0) for k in range(2) for name in names]
    own = {"own energy": 1e-15} if energetic else {}
    return pendulum.Result(
        run,
        [rollout, rollout],
        [0.05, 0.1],
        0.1,
        {name: 0.02 for name in names} if energetic else {},
        1e-14 if energetic else math.nan,
        [1.5, 0.45] if energetic else [],
        values,
        dict.fromkeys(pendulum.SHIFTS[system], 1.5) if energetic else {},
        {"spin": 1.0, "energy": 0.1, **own},
        rods,
    )


def true(pendulum, system="plane"):
    values = {name: GIVEN.get(name, 0.5) for name in pendulum.GENERATORS[system]}
    shifts = dict.fromkeys(pendulum.SHIFTS[system], 1.5)
    if system == "space":
        values["rotation_z"] = 1e-17
    return {"energy": values, "field": values, "tangent": shifts, "conservation": {"spin": 1.0, "energy": 1e-16}}


class TestSentence:
    def test_the_paper_confirmed_and_sizes_found(self, pendulum):
        networks = {
            "CHNN": [result(pendulum, rotation=1 + e, rollout=0.001 * (1 + e)) for e in (-0.01, 0.0, 0.01)],
            "HNN in angles": [result(pendulum, rotation=1.2 + e, rollout=0.01) for e in (-0.01, 0.0, 0.01)],
            "neural ODE": [result(pendulum, False, rollout=r) for r in (0.0009, 0.0101, 0.2)],
        }
        told = pendulum.sentence({"plane": networks}, {"plane": true(pendulum)}, 2)
        assert "CHNN 1.0000 (0.9754 to 1.0251), not told from the truth, state by state 2 % off" in told
        assert "HNN in angles 1.2000 (1.175" in told
        assert "too large, state by state 2 % off" in told
        assert "translation_x 1.0000 (1.0000 to 1.0000), not told from the truth" in told
        assert "whole translation_x 0 where 0 is true" in told
        assert "at most 1e-15 of their standard deviation; d(spin)/dt is -L H" in told
        assert "in 9 of 9 trainings" in told
        assert "Masses of CHNN in the plane are wrong by at most 10 % in any seed" in told
        assert "HNN in angles to CHNN 10 (9.8 to 10), more; 16 in the paper" in told
        assert "confirmed: CHNN before HNN in angles; contradicted: none" in told
        assert "not told: CHNN before neural ODE, HNN in angles before neural ODE." in told
        assert "They change" not in told

    def test_the_paper_contradicted(self, pendulum):
        networks = {
            "CHNN": [result(pendulum, rollout=0.1 + e) for e in (0.0, 0.001)],
            "HNN in angles": [result(pendulum, rollout=0.01 + e) for e in (0.0, 0.0001)],
        }
        told = pendulum.sentence({"plane": networks}, {"plane": true(pendulum)}, 2)
        assert "confirmed: none; contradicted: CHNN before HNN in angles; not told: none." in told
        assert "in the paper" not in pendulum.sentence({"plane": networks}, {"plane": true(pendulum)}, 3)

    def test_what_is_left(self, pendulum):
        networks = {
            "CHNN": [result(pendulum, rotation=r, system="space") for r in (0.01, 0.011)],
            "CHNN of heights": [result(pendulum, rotation=1e-17, system="space")] * 2,
            "neural ODE": [result(pendulum, False, rods=0.03, system="space")] * 2,
        }
        told = pendulum.sentence({"space": networks}, {"space": true(pendulum, "space")}, 2)
        assert "CHNN of heights at most 2e-17 in every epoch of every seed, as it is built" in told
        # The curve of a given network doubles from the first epoch to the last.
        assert (
            "which is 2 (2 to 2) of the untrained network's (more), and 1 (1 to 1) of the largest in training" in told
        )
        assert "They change in neural ODE in space by 0.03" in told
        assert "Of the paper's order" not in told

    def test_one_seed_tells_nothing(self, pendulum):
        networks = {"CHNN": [result(pendulum)], "neural ODE": [result(pendulum, False)]}
        told = pendulum.sentence({"plane": networks}, {"plane": true(pendulum)}, 2)
        assert "CHNN 1.0000, one seed does not tell" in told
        assert "confirmed: none; contradicted: none; not told: CHNN before neural ODE" in told

    def test_a_network_that_diverged(self, pendulum):
        networks = {"CHNN": [result(pendulum)] * 2, "neural ODE": [result(pendulum, False, rollout=math.nan)] * 2}
        told = pendulum.sentence({"plane": networks}, {"plane": true(pendulum)}, 2)
        assert "neural ODE to CHNN nan, one seed does not tell" not in told
        assert "neural ODE to CHNN diverged" in told
        assert "not told: CHNN before neural ODE" in told


def test_table(pendulum):
    rows = pendulum.table(
        "plane", {"CHNN": [result(pendulum)] * 2, "neural ODE": [result(pendulum, False)] * 2}, true(pendulum)
    )
    assert [row[0] for row in rows] == ["in the plane", "truth", "truth*", "CHNN", "neural ODE*"]
    assert len({len(row) for row in rows}) == 1
    assert rows[1][:6] == ["truth", "1", "0", "2", "1.5", "1.5"]
    assert rows[2][4:6] == rows[4][4:6] == ["-", "-"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0912, 1.0918, 1.0921], "1.0917 ± 0.0003"),
        ([0.04, 0.06], "0.05 ± 0.01"),
        ([30.0, 50.0], "40 ± 1e+01"),
        ([0.5], "0.5"),
        ([1e-16, 3e-16], "2e-16"),
        ([0.0, 0.0], "0"),
        ([math.nan, 1.0], "diverged"),
    ],
)
def test_cells(pendulum, values, text):
    assert pendulum.cell(values) == text


def test_ratios(pendulum):
    mean, low, high = pendulum.ratio([2.0, 8.0], [1.0, 1.0])
    assert mean == pytest.approx(4)
    assert low * high == pytest.approx(16)
    assert math.log(high / mean) == pytest.approx(12.7062 * math.log(2), rel=1e-4)  # t of one degree of freedom
    assert all(map(math.isnan, pendulum.ratio([0.0, 1.0], [1.0, 1.0])))
    assert pendulum.judged_ratio((1.0, 0.5, 2.0), "less", "alike", "more")[1] == "alike"
    assert pendulum.judged_ratio((1.0, 1.5, 2.0), "less", "alike", "more")[1] == "more"
    assert pendulum.judged_ratio((0.1, 0.05, 0.2), "less", "alike", "more") == ("0.1 (0.05 to 0.2)", "less")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--bobs", "0"], "--bobs must be at least 1, got 0"),
        (["--systems", "1"], "--systems must be at least 2, got 1"),
        (["--test-systems", "1"], "--test-systems must be at least 2"),
        (["--chunks", "0"], "--chunks must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seeds", "-1"], "--seeds must be at least 1"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
        (["--horizon", "0.01"], "--horizon must be finite and hold a chunk"),
        (["--horizon", "inf"], "--horizon must be finite"),
        (["--horizon", "0.1", "--steps", "6"], "hold a chunk of 6 steps of 0.05, got 0.1"),
        (["--models", "CHNN", "CHNN"], "--models must name each once, got CHNN CHNN"),
        (["--where", "plane", "plane"], "--where must name each once"),
        (["--models", "transformer"], "invalid choice"),
        (["--models", "HNN in angles"], "--models must have one for chains in space, got HNN in angles"),
        (["--models", "CHNN of heights"], "--models must have one for chains in the plane, got CHNN of heights"),
    ],
)
def test_bad_command_lines(pendulum, arguments, message, capsys):
    with pytest.raises(SystemExit):
        pendulum.main(arguments)
    assert message in capsys.readouterr().err
