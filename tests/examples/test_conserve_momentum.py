"""Springs that are simulated exactly, and the job at reduced size."""

import csv
import math

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.runs import Point, Run

for module in ("torchdiffeq", "tensorboard", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture
def momentum(example):
    return example("conserve_momentum")


class TestData:
    def test_energy_momentum_and_spin_are_kept_by_the_trajectories(self, momentum):
        path = momentum.trajectories(momentum.systems(20, 0), 250)
        assert path.shape == (20, 251, 6, 6)
        for name, quantity in momentum.QUANTITIES.items():
            values = quantity(path)
            assert ((values - values[:, :1]).abs() < 1e-9 * values.abs().max()).all(), name
            assert values[:, 0].std() > 0.1
            assert torch.equal(path[:, -1, :, 4:], path[:, 0, :, 4:])
        assert (path[:, -1, :, :2] - path[:, 0, :, :2]).abs().mean() > 0.1

    def test_against_an_integrator(self, momentum):
        z = momentum.systems(5, 1)
        times = torch.arange(6, dtype=torch.float64) * momentum.STEP
        found = momentum.rollout(momentum.true_rates, z, times, method="dopri5", rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(momentum.trajectories(z, 5).transpose(0, 1), found, rtol=1e-8, atol=1e-9)

    def test_rates_are_those_of_the_energy(self, momentum):
        z = momentum.systems(5, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(momentum.energy(z).sum(), z)
        wanted = torch.cat([gradient[..., 2:4], -gradient[..., :2], torch.zeros_like(z[..., 4:])], dim=-1)
        torch.testing.assert_close(momentum.true_rates(z), wanted)

    def test_two_bodies_by_hand(self, momentum):
        z = torch.tensor([[[0.0, 0, 1, 0, 2, 3], [1, 2, 0, 0, 1, 4]]], dtype=torch.float64)
        assert momentum.energy(z).item() == 1 / 4 + 12 * 5 / 2
        rates = [[0.5, 0, 12, 24, 0, 0], [0, 0, -12, -24, 0, 0]]
        assert momentum.true_rates(z)[0].tolist() == rates
        z[0, 1, 2:4] = torch.tensor([5.0, 7.0])
        assert momentum.spin(z).item() == 1 * 7 - 2 * 5
        assert [momentum.momentum(z, axis).item() for axis in (0, 1)] == [6, 7]

    def test_the_meter_says_so(self, momentum):
        """The instrument on the true springs: everything is kept, and H is invariant."""
        z = momentum.systems(30, 3)
        assert max(F.conservation_error(momentum.true_rates, z, momentum.QUANTITIES).values()) < 1e-13
        found = F.relative(momentum.energy, z, momentum.GENERATORS, input_representation=momentum.STATES)
        assert max(found.values()) < 1e-13

    def test_chunks_are_pieces_of_trajectories(self, momentum):
        z = momentum.systems(4, 0)
        pieces = momentum.chunks(z, 3, 2, 1.0, 5)
        assert pieces.shape == (12, 3, 6, 6)
        whole = momentum.trajectories(z, 50)
        for k, piece in enumerate(pieces):
            assert any(torch.equal(piece, whole[k // 3, start : start + 3]) for start in range(49))
        assert not torch.equal(pieces[0], pieces[1])
        assert momentum.chunks(z, 1, 3, 0.02, 0).shape == (4, 4, 6, 6)

    def test_ranges(self, momentum):
        z = momentum.systems(500, 0)
        for column, low, high in ((4, 0.1, 3.1), (5, 0.0, 5.0)):
            assert low <= z[..., column].min() < low + 0.05
            assert high - 0.05 < z[..., column].max() <= high


def test_loss_is_one_where_nothing_moves_and_zero_for_the_truth(momentum):
    pieces = momentum.chunks(momentum.systems(200, 0), 2, 2, 1.0, 0)
    scale = momentum.spread_of_changes(pieces)

    def loss(dynamics):
        return momentum.Learner(dynamics, scale, 1e-3).double().loss(pieces).item()

    class Still(torch.nn.Module):
        def forward(self, states):
            return 0 * states

    class Springs(torch.nn.Module):
        def forward(self, states):
            return momentum.true_rates(states)

    assert loss(Still()) == pytest.approx(1, rel=0.2)
    assert loss(Springs()) < 1e-5
    assert scale[0] == scale[1] != scale[2] == scale[3]


def test_noether(momentum):
    pieces = momentum.chunks(momentum.systems(20, 0), 1, 1, 1.0, 0)
    for name, worst in (("MLP", 1e-9), ("pairwise", None)):
        torch.manual_seed(0)
        model = momentum.Learner(momentum.build(name, pieces), momentum.spread_of_changes(pieces), 1e-3)
        found = momentum.noether(model, pieces[:, 0])
        assert math.isnan(found) if worst is None else found < worst


def test_whole_job(momentum, tmp_path, capsys):
    arguments = ["--systems", "20", "--test-systems", "12", "--chunks", "2", "--epochs", "2", "--batch-size", "20"]
    arguments += ["--horizon", "0.2", "--seeds", "2", "--processes", "1", "--models", "MLP", "pairwise", "neural ODE"]
    results = momentum.main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    folder = tmp_path / "springs"
    assert "neural ODE, seed 1: error of rates" in printed
    assert (folder / "conserve_momentum.png").stat().st_size > 20_000
    assert [row[0] for row in csv.reader((folder / "table.csv").open())] == ["model", "MLP", "pairwise", "neural ODE*"]
    assert (folder / "summary.txt").read_text().strip() in printed
    assert len(list(folder.glob("*/events*"))) == 6
    for one in results["pairwise"]:
        assert max(one.equivariance.values()) < 1e-12
        assert max(one.conservation[name] for name in momentum.PARTNER) < 1e-12
        assert max(one.drift["px"]) < 1e-12
        assert max(one.drift["spin"]) < 1e-4
        assert one.conservation["energy"] > 1e-3
    for one in (*results["MLP"], *results["neural ODE"]):
        assert min(one.equivariance.values()) > 1e-4
        assert min(one.conservation.values()) > 1e-4
        assert one.times == [0.02, 0.1, 0.2]
        # Over a step the drift is what the logged rate says.
        for name in momentum.PARTNER:
            assert one.drift[name][0] == pytest.approx(0.02 * one.conservation[name], rel=0.2)
    assert all(one.noether < 1e-9 for one in results["MLP"])
    epochs, values = momentum.series(results["MLP"][0].run, "equivariance", "rotation")
    assert list(epochs) == [0, 1, 2]
    assert all(math.isfinite(value) for value in values)
    assert "the energy of pairwise (translation_x" in printed
    assert "of no generator: MLP." in printed
    assert "promise, and no others, are constant along the learned flow: in every case" in printed


def result(momentum, symmetric, rates=(1.0, 2.0), ratio=1.0):
    """A network of which everything is given."""
    run = Run("run", "records")
    value = 1e-16 if symmetric else 0.1
    names = momentum.GENERATORS
    run.points = [Point("equivariance", name, 0, k, k, value, 0.0) for k in range(2) for name in names]
    momenta = [1e-15] * 3 if symmetric else [rates[0], rates[1], sum(rates)]
    conservation = dict(zip(("px", "py", "spin", "energy"), (*momenta, 1.0), strict=True))
    drift = {name: [one * 0.02 * ratio, one * 5 * ratio**2] for name, one in conservation.items()}
    return momentum.Result(run, drift, [0.02, 5.0], 0.1, 0.2, 0.0, 1e-15, dict.fromkeys(names, value), conservation)


def test_the_sentence_follows_from_the_numbers(momentum):
    results = {"MLP": [result(momentum, False, ratio=0.5)], "pairwise": [result(momentum, True)]}
    told = momentum.sentence(results)
    assert "the energy of pairwise (translation_x ≤ 1e-16, translation_y ≤ 1e-16, rotation ≤ 1e-16)" in told
    assert "of no generator: MLP" in told
    assert "in every case" in told
    assert "correlation of logarithms 1.000, slope 1.00, measured/predicted 0.50); with that after 5 s it has a" in told
    assert "what drifted is 0.25 of what a constant rate would give" in told
    assert "neural ODE" not in told
    broken = result(momentum, True)
    broken.conservation["spin"] = 0.5
    assert "not for pairwise, spin" in momentum.sentence({"pairwise": [broken]})
    assert "Where something drifts" not in momentum.sentence({"pairwise": [broken]})


def test_flows_that_run_away_are_said_to(momentum):
    gone = result(momentum, False)
    gone.drift["px"][-1] = math.nan
    assert momentum.cell([math.nan, 1.0]) == "diverged"
    assert len(momentum.predictions({"MLP": [gone]}, -1)) == 2

    class Explosion(torch.nn.Module):
        def forward(self, states):
            return torch.cat([states[..., :4] ** 3 * 1e3, 0 * states[..., 4:]], dim=-1)

    pieces = momentum.chunks(momentum.systems(4, 0), 1, 1, 1.0, 0)
    model = momentum.Learner(Explosion(), momentum.spread_of_changes(pieces), 1e-3)
    for key, names in (("equivariance", momentum.GENERATORS), ("equivariance_conservation", momentum.QUANTITIES)):
        gone.run.points += [Point(key, name, 0, 2, 2, 1.0, 0.0) for name in names]
    found = momentum.judged(model, gone.run, pieces[:, 0], 0.1)
    assert all(map(math.isnan, found.drift["px"]))
    assert found.rollout_error == pytest.approx(1)
    assert found.runaways == 1


def test_one_that_runs_away_is_left_out(momentum):
    z = momentum.systems(8, 0)
    one = result(momentum, False)
    for key, names in (("equivariance", momentum.GENERATORS), ("equivariance_conservation", momentum.QUANTITIES)):
        one.run.points += [Point(key, name, 0, 2, 2, 1.0, 0.0) for name in names]

    class Leaving(torch.nn.Module):
        def forward(self, states):
            rates = momentum.true_rates(states)
            rates[states[:, 0, 4] == z[0, 0, 4]] *= 0  # that of the first system alone
            rates[states[:, 0, 4] == z[0, 0, 4], :, :2] += 1e3
            return rates

    found = momentum.judged(momentum.Learner(Leaving(), torch.ones(4), 1e-3), one.run, z, 0.5)
    assert found.runaways == 1 / 8
    assert max(found.drift["spin"]) < 1e-4


def test_one_that_cannot_be_followed_takes_no_other_with_it(momentum):
    z = momentum.systems(7, 0)

    def rates(states):
        found = momentum.true_rates(states)
        gone = states[:, 0, 4] == z[2, 0, 4]
        found[gone, :, :4] = 1e6 * states[gone, :, :4] ** 3
        return found

    times = momentum.STEP * torch.arange(6, dtype=torch.float64)
    found = momentum.rollouts(rates, z, times)
    assert found[-1, 2].isnan().all()
    kept = torch.arange(7) != 2
    true = momentum.trajectories(z, 5).transpose(0, 1)
    torch.testing.assert_close(found[:, kept], true[:, kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "text"), [([0.5], "0.5"), ([1.0, 2.0, 3.0], "2 ± 0.6"), ([1e-15, 3e-15], "2e-15"), ([0.0, 0.0], "0")]
)
def test_cells(momentum, values, text):
    assert momentum.cell(values) == text


def test_tables_and_last_values(example):
    trainings = example("trainings")
    assert trainings.show([("a", "bcd"), ("efg", "h")]) == "a    bcd\nefg  h  "
    assert (trainings.listed([]), trainings.listed(["a", "b"])) == ("none", "a, b")
    run = Run("run", "records")
    run.points = [
        Point(key, "scale", 0, k, k, value + k, 0.0) for key, value in (("one", 1.0), ("two", 5.0)) for k in (0, 1)
    ]
    assert trainings.last(run, "one", ["scale"]) == {"scale": 2.0}
    assert trainings.series(run, "two", "scale") == ([0, 1], [5.0, 6.0])


def test_fits(momentum):
    assert momentum.fitted([(x, 3 * x**2) for x in (1.0, 2.0, 5.0)]) == pytest.approx((1, 2))
    assert all(map(math.isnan, momentum.fitted([(1.0, 1.0)] * 2)))


def test_scalar_channels_do_not_move(momentum):
    z = momentum.systems(3, 0)
    found = momentum.STATES.tangents(z, lm.generators("translation_x", "rotation"), lm.Resampling())
    assert not found[..., 4:].any()
    assert not found[0, ..., 2:].any()
    assert found[1, ..., :4].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--systems", "1"], "--systems must be at least 2, got 1"),
        (["--test-systems", "1"], "--test-systems must be at least 2"),
        (["--seeds", "-1"], "--seeds must be at least 1"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
        (["--horizon", "0.01"], "--horizon must be finite and hold a chunk"),
        (["--horizon", "inf"], "--horizon must be finite"),
        (["--horizon", "0.1", "--steps", "6"], "hold a chunk of 6 steps of 0.02 s, got 0.1"),
        (["--models", "MLP", "MLP"], "--models must name each network once"),
        (["--models", "transformer"], "invalid choice"),
    ],
)
def test_bad_command_lines(momentum, arguments, message, capsys):
    with pytest.raises(SystemExit):
        momentum.main(arguments)
    assert message in capsys.readouterr().err
