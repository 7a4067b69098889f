"""Solids, what is measured of networks on them, sentences of given numbers, and the job at reduced size."""

import csv
import math

import pytest
import torch

from lie_metric import functional as F
from lie_metric.representations import Points
from lie_metric.runs import Point, Run

for module in ("tensorboard", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture
def breaking(example):
    return example("symmetry_breaking")


class TestData:
    def test_points_lie_on_the_solids(self, breaking, monkeypatch):
        monkeypatch.setattr(breaking, "NOISE", 0.0)
        clouds, labels = breaking.solids(60, 200, 0)
        assert clouds.shape == (60, 200, 3)
        assert labels.tolist() == list(range(6)) * 10

        def sizes(kind):
            """Of one kind the clouds, stretched back to half-widths of one."""
            found = clouds[labels == breaking.SOLIDS.index(kind)]
            return found, found.abs().amax(1, keepdim=True)

        box, half = sizes("box")
        assert ((box / half).abs().amax(-1) > 0.99).all()  # on a face
        for kind, norm in (("ellipsoid", 2), ("octahedron", 1)):
            found, _ = sizes(kind)
            for cloud in found:
                # Σ |x_k / a_k|^norm = 1 for some half-widths a: linear in 1 / a^norm.
                rows = cloud.abs() ** norm
                fit = torch.linalg.lstsq(rows, torch.ones(len(rows), 1, dtype=torch.float64)).solution
                assert (rows @ fit - 1).abs().max() < 1e-9
        torus, _ = sizes("torus")
        assert (torus[..., :2].norm(dim=-1).amin(1) > 0.2).all()  # a hole
        cone, _ = sizes("cone")
        assert (cone[..., 2].amax(1) > 1.2 * -cone[..., 2].amin(1)).all()  # upright
        cylinder, half = sizes("cylinder")
        cap = (cylinder / half)[..., 2].abs() > 0.999
        assert 0.2 < cap.double().mean() < 0.5
        side = (cylinder / half)[..., :2].norm(dim=-1)[~cap]
        assert (side > 0.9).all()

    def test_noise_seeds_and_sizes(self, breaking):
        first, again, other = (breaking.solids(12, 20, seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert 0.5 < first.std() < 1.0
        assert first.dtype == torch.float64

    def test_turns_are_rotations_of_all_directions(self, breaking):
        axes = torch.eye(3, dtype=torch.float64).expand(4000, 3, 3)
        found = breaking.turned(axes, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found @ found.mT, axes, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.linalg.det(found), torch.ones(4000, dtype=torch.float64))
        # Uniform over rotations: entries have mean 0 and mean square 1/3, and the mean trace is 0.
        assert found.mean(0).abs().max() < 0.04
        assert (found.square().mean(0) - 1 / 3).abs().max() < 0.02
        assert abs(found.diagonal(dim1=1, dim2=2).sum(1).mean()) < 0.06

    def test_lengths(self, breaking):
        cloud = torch.tensor([[[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 2], [0, 0, -2]]]).double()
        found = breaking.lengths(cloud + 5)
        assert found["longest"].item() == pytest.approx(math.sqrt(3))
        assert found["height"].item() == pytest.approx(math.sqrt(4 / 3))
        turned = breaking.turned(cloud.expand(9, -1, -1))
        torch.testing.assert_close(breaking.lengths(turned)["longest"], found["longest"].expand(9, 1))

    def test_finite_turns(self, breaking):
        for name, parts in (("third", 3), ("quarter", 4), ("fifth", 5)):
            turn = breaking.TURNS[name]
            power = torch.linalg.matrix_power(turn, parts)
            torch.testing.assert_close(power, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
            assert not torch.allclose(turn, torch.eye(3, dtype=torch.float64))
        kept = {
            name: {kind for kind, turn in breaking.TURNS.items() if breaking.permutes(turn, grid)}
            for name, grid in breaking.GRIDS.items()
        }
        assert kept.pop("tetrahedron") == {"third"}
        for name in ("octahedron", "cube", "snub cube"):
            assert kept.pop(name) == {"third", "quarter"}
        assert set(kept) == {"icosahedron", "dodecahedron"}
        assert all(turns == {"third", "fifth"} for turns in kept.values())


class TestLearner:
    def learner(self, breaking, name):
        torch.manual_seed(0)
        clouds, labels = breaking.solids(24, 8, 0)
        variant = breaking.VARIANTS[name]
        return breaking.Learner(breaking.build(variant), variant, 1e-2, clouds).eval(), clouds, labels

    @pytest.mark.parametrize("name", ["positions", "cube", "lengths: differences"])
    def test_exactly_is_forward_in_double_precision(self, breaking, name):
        model, clouds, _ = self.learner(breaking, name)
        exact, rough = model.exactly(clouds), model(clouds.float())
        if name.startswith("lengths"):
            assert list(exact) == list(rough) == ["longest", "height"]
            exact, rough = (torch.cat(list(found.values()), 1) for found in (exact, rough))
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact, rough.double(), rtol=1e-4, atol=1e-5)
        assert (exact - rough).abs().max() > 1e-10

    def test_losses(self, breaking):
        model, clouds, labels = self.learner(breaking, "distances")
        assert model.loss(clouds, labels).item() == pytest.approx(math.log(6), abs=0.3)
        model, clouds, labels = self.learner(breaking, "lengths: distances")
        with torch.no_grad():
            model.network.read[-1][-1].weight.zero_()
            model.network.read[-1][-1].bias.zero_()
        assert model.loss(clouds, labels).item() == pytest.approx(23 / 24)  # as if all had the mean

    def test_only_what_is_to_be_turned_is(self, breaking, monkeypatch):
        seen = []
        monkeypatch.setattr(breaking, "turned", lambda clouds: seen.append(clouds) or clouds)
        for name in ("differences", "turned: differences"):
            model, clouds, labels = self.learner(breaking, name)
            model.log = lambda *_, **__: None
            model.training_step((clouds, labels), 0)
            assert len(seen) == (name != "differences")

    def test_scores(self, breaking):
        model, clouds, labels = self.learner(breaking, "distances")
        model.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 6)).eval()
        with torch.no_grad():
            model.network[1].weight.zero_()
            model.network[1].bias.copy_(torch.tensor([0.0, 0, 1, 0, 0, 0]))
        assert breaking.judged(model, clouds, clouds, labels) == {"upright": 1 / 6, "turned": 1 / 6}
        model, clouds, labels = self.learner(breaking, "lengths: distances")
        true = torch.cat(list(breaking.lengths(clouds).values()), 1)

        class Half(torch.nn.Module):
            def forward(self, part):
                both = torch.cat(list(breaking.lengths(part.double()).values()), 1)
                both[:, 1] = true[:, 1].mean()
                return (both - model.centre) / model.spread

        model.network = Half()
        found = breaking.judged(model, clouds, clouds, labels)
        assert found["longest"] == pytest.approx(1)
        assert found["height"] == pytest.approx(0)

    def test_the_truth_of_height(self, breaking):
        """By hand: the variance along z changes by -2 times its covariance with y where clouds turn about x."""
        clouds = breaking.turned(breaking.solids(12, 20, 0)[0], torch.Generator().manual_seed(0))
        found = F.relative(
            lambda points: breaking.lengths(points)["height"], clouds, "rotation_x", input_representation=Points(3)
        )
        centred = clouds - clouds.mean(1, keepdim=True)
        covariance = (centred[..., 1] * centred[..., 2]).mean(1)
        height = breaking.lengths(clouds)["height"][:, 0]
        expected = (covariance / height).square().mean().sqrt() / height.std()
        assert found["rotation_x"].item() == pytest.approx(expected.item())


def test_whole_job(breaking, tmp_path, capsys):
    arguments = ["--shapes", "36", "--test-shapes", "12", "--measured", "4", "--points", "8", "--epochs", "3"]
    names = ["distances", "distances + frame", "turned: differences", "octahedron", "few: distances"]
    arguments += ["--processes", "1", "--seeds", "2"]
    results = breaking.main([*arguments, "--networks", *names, "lengths: distances + frame", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    folder = tmp_path / "solids"
    assert "[12/12] lengths: distances + frame, seed 1: longest" in printed
    assert (folder / "symmetry_breaking.png").stat().st_size > 20_000
    rows = list(csv.reader((folder / "table.csv").open()))
    assert [row[0] for row in rows] == ["network", *names[:2], "  moved with its frame", *names[2:]]
    assert (folder / "summary.txt").read_text().strip() in printed
    assert len(list(folder.glob("*/events*"))) == 12
    for name in ("distances", "few: distances"):
        for one in results[name]:
            assert len(one.curve("rotation")) == 4
            assert max(one.curve("rotation") + one.curve("translation_x")) < 1e-12
    for one in results["distances + frame"]:
        assert min(one.curve("rotation")) > 1e-4
        assert max(one.curve("rotation", "together") + one.curve("translation_x", "together")) < 1e-12
    for one in results["octahedron"]:
        assert min(one.curve("rotation")) > 1e-5
        assert max(one.curve("quarter", "equivariance_turn") + one.curve("permutation", "equivariance_turn")) < 1e-12
        assert min(one.curve("fifth", "equivariance_turn")) > 1e-5
    for one in results["lengths: distances + frame"]:
        assert max(one.curve("rotation", "truth_longest")) < 1e-12
        assert min(one.curve("rotation", "truth_height")) > 0.1
        assert min(one.curve("rotation", "equivariance_height")) > 1e-4
    assert "in every epoch of every seed (at most 0): distances, few: distances." in printed
    assert "the symmetry is not lost but moved into the frame" in printed


def result(breaking, rotation, scores, translation=0.0):
    """A network of which everything is given; rotation before and after training."""
    run = Run("run", "records")

    def add(key, name, *values):
        run.points += [Point(key, name, 0, k, k, value, 0.0) for k, value in enumerate(values)]

    for name in breaking.ROTATIONS:
        for key in ("equivariance", "together", "equivariance_height", "equivariance_longest"):
            add(key, name, *rotation)
        add("truth_height", name, 0.8, 0.8)
        add("truth_longest", name, 0.0, 0.0)
    add("equivariance", "translation_x", translation, translation)
    for name, value in zip(breaking.TURNS, (1e-16, 1e-15, 0.2), strict=True):
        add("equivariance_turn", name, value, value)
    return breaking.Result(run, scores)


def pair(breaking, rotation, upright, turned, **more):
    """Two seeds, of which the second is a little better and as far broken."""
    return [result(breaking, rotation, {"upright": upright + k, "turned": turned + k}, **more) for k in (0.0, 0.01)]


class TestSentence:
    def test_what_helps_and_what_is_exact(self, breaking):
        told = breaking.sentence(
            {
                "distances": pair(breaking, (0.0, 0.0), 0.6, 0.6),
                "differences": pair(breaking, (0.5, 1.0), 0.8, 0.3),
                "positions": pair(breaking, (0.5, 0.25), 0.5, 0.6, translation=2.0),
            }
        )
        assert "95 % intervals over 2 seeds" in told
        assert "Exact under translation_x in every epoch of every seed (at most 0): distances, differences." in told
        assert "Exact under rotation in every epoch of every seed (at most 0): distances." in told
        assert "differences +0.200 (+0.200 to +0.200), positions -0.100 (-0.100 to -0.100)" in told
        assert "upright is confirmed for differences; contradicted for positions; not decided for none" in told
        assert "met is confirmed for differences; contradicted for none; not decided for positions" in told
        assert "differences 2 (2 to 2), positions 0.5 (0.5 to 0.5). It grew for differences; fell for positions" in told
        assert "Trained on random turns" not in told
        assert "number of directions" not in told
        assert "Lengths by" not in told

    def test_wide_intervals_decide_nothing(self, breaking):
        base = pair(breaking, (0.0, 0.0), 0.6, 0.6)
        other = [result(breaking, (0.5, 0.5), {"upright": value, "turned": 0.1}) for value in (0.9, 0.62)]
        told = breaking.sentence({"distances": base, "differences": other})
        assert "upright is confirmed for none; contradicted for none; not decided for differences" in told
        single = breaking.sentence({"distances": base[:1], "differences": other[:1]})
        assert "less that of distances: differences +0.300. That" in single
        assert "inf" not in single

    def test_turns_and_few(self, breaking):
        results = {
            "distances": pair(breaking, (0.0, 0.0), 0.6, 0.6),
            "differences": pair(breaking, (0.5, 1.0), 0.8, 0.3),
            "turned: differences": pair(breaking, (0.5, 0.2), 0.5, 0.5),
            "few: distances": pair(breaking, (0.0, 0.0), 0.5, 0.5),
            "few: differences": pair(breaking, (0.5, 0.5), 0.4, 0.2),
            "few: turned: differences": pair(breaking, (0.5, 0.2), 0.2, 0.45),
        }
        told = breaking.sentence(results)
        assert (
            "differences keeps 0.2 (0.2 to 0.2) of its rotation error, and in no epoch less than an error of 0.2"
            in told
        )
        assert "it stays broken. Its accuracy on turned solids, less that of distances: -0.100" in told
        assert "over differences on upright solids goes from -0.200 (-0.200 to -0.200) to +0.100" in told
        assert "by +0.300 (+0.300 to +0.300): that symmetry is worth more with less data is confirmed" in told
        assert "by -0.050 (-0.050 to -0.050): that symmetry is worth more with less data is contradicted" in told
        results["turned: differences"] = pair(breaking, (0.5, 1e-12), 0.5, 0.5)
        assert "it is mended" in breaking.sentence(results)

    def test_frames(self, breaking):
        told = breaking.sentence({"distances + frame": pair(breaking, (0.5, 0.4), 0.8, 0.3)})
        assert "With a frame the rotation error is 0.4; where the frame turns too it is at most 5e-01" in told
        assert "the symmetry is lost." in told

    def test_grids(self, breaking):
        told = breaking.sentence(
            {
                "octahedron": pair(breaking, (0.04, 0.4), 0.6, 0.6),
                "cube": pair(breaking, (0.04, 0.2), 0.6, 0.6),
                "icosahedron": pair(breaking, (0.01, 0.01), 0.6, 0.6),
            }
        )
        assert "Rotation error by number of directions, trained: 6 0.4, 8 0.2, 12 0.01." in told
        assert "of the same strength it is multiplied by: 6 to 8 0.5 (0.5 to 0.5); it falls for 6 to 8" in told
        assert "of a higher strength it is multiplied by: 8 to 12 0.05 (0.05 to 0.05); it falls for 8 to 12" in told
        assert "of the same strength it is multiplied by: 6 to 8 1 (1 to 1); it falls for none" in told
        assert (
            "Training multiplied these errors by: 6 10 (10 to 10), 8 5 (5 to 5), 12 1 (1 to 1); they grew for 6, 8"
            in told
        )

    def test_grids_that_become_frames(self, breaking):
        coarse, fine = pair(breaking, (0.1, 1.0), 0.8, 0.5), pair(breaking, (0.1, 0.1), 0.6, 0.6)
        told = breaking.sentence({"cube": coarse, "icosahedron": fine})
        assert "less that on turned ones: 8 +0.300 (+0.300 to +0.300), 12 +0.000" in told
        assert "networks with 8 directions have learned to use the grid as a frame" in told

    def test_lengths(self, breaking):
        def pair(rotation, longest, height):
            return [result(breaking, rotation, {"longest": longest, "height": height + k}) for k in (0.0, 0.01)]

        told = breaking.sentence(
            {"lengths: distances": pair((0.0, 0.0), 0.9, 0.1), "lengths: differences": pair((0.5, 0.4), 0.5, 0.7)}
        )
        assert "Lengths by distances: the error of height is 0, 0.8; that of longest, which should be 0, 0." in told
        assert "Lengths by differences: the error of height is 0.5 (0.5 to 0.5) of that of the truth, 0.8" in told
        assert "told of longest, less that by distances: differences -0.400 (-0.400 to -0.400). That giving up" in told
        assert "That giving up the symmetry helps is confirmed for differences" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--shapes", "35"], "--shapes must be at least 36, got 35"),
        (["--test-shapes", "5"], "--test-shapes must be at least 6"),
        (["--measured", "1"], "--measured must be at least 2"),
        (["--points", "3"], "--points must be at least 4"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (
            ["--measured", "30", "--test-shapes", "24"],
            "--measured must be at most --test-shapes and 5 batches, 24, got 30",
        ),
        (["--measured", "30", "--batch-size", "5"], "and 5 batches, 25, got 30"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
        (
            ["--batch-size", "1"],
            "--batch-size must leave no solid alone, whom norms over clouds cannot do with, got 1 for 360",
        ),
        (
            ["--shapes", "49"],
            "--batch-size must leave no solid alone, whom norms over clouds cannot do with, got 24 for 49",
        ),
        (
            ["--shapes", "50", "--batch-size", "47"],
            "--batch-size must leave no solid alone, whom norms over clouds cannot do with, got 47 for 48",
        ),
        (["--networks", "cube", "cube"], "--networks must name each network once, got cube cube"),
        (["--networks", "transformer"], "invalid choice"),
    ],
)
def test_bad_command_lines(breaking, arguments, message, capsys):
    with pytest.raises(SystemExit):
        breaking.main(arguments)
    assert message in capsys.readouterr().err
