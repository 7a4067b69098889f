"""Turned digits as points and as images, and the job at reduced size."""

import csv
import math

import pytest
import torch

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import Invariant, Points
from lie_metric.runs import Point, Run

for module in ("sklearn", "tensorboard", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture
def convolution(example):
    return example("lie_convolution")


class TestData:
    def test_pixels_of_the_disc(self, convolution):
        assert convolution.DISC.sum() == len(convolution.PLACES) == 208
        assert convolution.PLACES.norm(dim=1).max() <= 1
        assert convolution.PLACES.norm(dim=1).min() > 0.08  # none is at the centre, where there is no angle
        # The first place is that of the first pixel of the disc: x to the right, y down, in half sides.
        row, column = convolution.DISC.nonzero()[0].tolist()
        assert convolution.PLACES[0].tolist() == [(column - 7.5) / 8, (row - 7.5) / 8]

    def test_quarter_turns_permute_pixels_and_centres(self, convolution):
        def sites(places):
            return {tuple(round(8 * x, 6) for x in one) for one in places.tolist()}

        centres = convolution.PLACES[convolution.CENTRES]
        assert len(centres) == 24
        for places in (convolution.PLACES, centres):
            assert sites(places) == sites(torch.stack([-places[:, 1], places[:, 0]], dim=1))

    def test_digits_are_turned_and_whole(self, convolution):
        known, unknown = convolution.digits(50, 30, 0)
        images, labels = known.tensors
        assert images.shape == (50, 1, 16, 16)
        assert len(unknown) == 30
        assert images.dtype == torch.float64
        assert labels.unique().numel() == 10
        assert not (images * ~convolution.DISC).any()
        # Nothing is lost beyond the disc: the sum of an image is that of the digit, enlarged.
        again, _ = convolution.digits(50, 30, 0)
        other, _ = convolution.digits(50, 30, 1)
        assert torch.equal(images, again.tensors[0])
        assert not torch.equal(images, other.tensors[0])

    def test_turns_keep_the_ink(self, convolution):
        from sklearn.datasets import load_digits

        images = convolution.digits(1000, 500, 0)[0].tensors[0]
        ink = images.sum((1, 2, 3)).mean().item() / (load_digits().images.sum((1, 2)).mean() / 16)
        assert ink == pytest.approx((10 / 8) ** 2, rel=0.03)

    def test_points_say_what_an_image_does(self, convolution):
        images = torch.arange(512.0).reshape(2, 1, 16, 16).double()
        places, values = convolution.points((images, None))
        assert places.shape == (2, 208, 2)
        columns, rows = (8 * places[1, 37] + 7.5).round().int().tolist()
        assert values[1, 37] == images[1, 0, rows, columns]


@pytest.mark.parametrize("name", ["T(2)", "SO(2)", "R*×SO(2)", "SE(2)", "CNN"])
def test_networks_of_images_and_of_points_are_the_same(convolution, name):
    torch.manual_seed(0)
    model = convolution.Classifier(convolution.build(name, 4), 1e-3).eval()
    images = convolution.digits(4, 2, 0)[0].tensors[0]
    scores = model.of_images(images)
    assert scores.shape == (4, 10)
    assert scores.dtype == torch.float64
    if name != "CNN":
        torch.testing.assert_close(scores, model(*convolution.points((images, None))))


def test_quarter_turns_of_images(convolution):
    """They permute pixels, and nothing is resampled: what is exact on points is exact on images."""
    torch.manual_seed(0)
    images = convolution.digits(6, 2, 0)[0].tensors[0]
    for name, kept in (("SO(2)", True), ("R*×SO(2)", True), ("SE(2)", True), ("T(2)", False)):
        model = convolution.Classifier(convolution.build(name, 4), 1e-3).eval()
        found = F.lattice_equivariance_error(model, images, "rotate_90", function="of_images")["rotate_90"]
        assert (found < 1e-10) == kept


class TestLifts:
    def found(self, convolution, way, count):
        torch.manual_seed(0)
        model = convolution.Classifier(convolution.build("SE(2)", 4), 1e-3).eval()
        inputs = convolution.points((convolution.digits(3, 2, 0)[0].tensors[0], None))
        return model(*inputs), convolution.lifted(model, *inputs, way=way, count=count)

    def test_its_own(self, convolution):
        torch.testing.assert_close(*self.found(convolution, "even", 4))

    def test_others(self, convolution):
        for way, count in (("even", 3), ("random", 4), ("random", 1)):
            own, other = self.found(convolution, way, count)
            assert not torch.allclose(own, other, rtol=1e-6)
            assert torch.equal(other, self.found(convolution, way, count)[1])


def test_whole_job(convolution, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convolution, "LIFTS", (1, 3))
    arguments = ["--train", "60", "--test", "20", "--epochs", "2", "--every", "2", "--seeds", "2", "--processes", "1"]
    arguments += [
        "--images",
        "4",
        "--clouds",
        "2",
        "--networks",
        "CNN",
        "SO(2)",
        "SE(2)",
        "--lifts",
        "2",
        "--out",
        str(tmp_path),
    ]
    results = convolution.main(arguments)
    printed = capsys.readouterr().out
    folder = tmp_path / "turned_digits"
    assert "[6/6] SE(2), seed 1:" in printed
    assert (folder / "lie_convolution.png").stat().st_size > 20_000
    assert [row[0] for row in csv.reader((folder / "table.csv").open())] == ["network", "CNN", "SO(2)", "SE(2)"]
    assert (folder / "summary.txt").read_text().strip() in printed
    assert len(list(folder.glob("*/events*"))) == 6
    for one in results["SO(2)"]:
        for key, name in (("points", "rotation"), ("points_turned", "any_turn"), ("points_turned", "quarter_turn")):
            epochs, values = convolution.series(one.run, key, name)
            assert list(epochs) == [0, 2]
            assert max(values) < 1e-11
        assert one.last("points", "translation_x") > 1e-2
        assert one.last("image_turned", "any_turn") > 1e-2
        assert one.last("image_lattice", "rotate_90") < 1e-11
    for one in results["SE(2)"]:
        assert one.last("points", "translation_x") < 1e-11 < one.last("points_turned", "quarter_turn")
        assert 1e-6 < one.last("lifts_even_3", "any_turn") < one.last("lifts_even_1", "any_turn")
        assert one.last("lifts_random_3", "any_turn") > one.last("lifts_even_3", "any_turn")
        assert one.seconds > 0
    for one in results["CNN"]:
        assert math.isnan(one.last("points", "rotation"))
        assert one.last("image", "rotation") > 1e-2
    assert "As points, exact before, during and after training: SO(2) (rotation" in printed


def result(convolution, error, any_turn, image, seconds=1.0, lifts=()):
    """A network of which everything is given."""
    run = Run("run", "records")
    given = {
        ("image_turned", "any_turn"): image,
        ("image", "rotation"): image,
        ("image_floor", "rotation"): image,
        ("image_lattice", "rotate_90"): image,
    }
    if any_turn is not None:
        small = 1e-15 if any_turn < 1e-9 else 0.5
        given |= {("points", name): small if name == "rotation" else 0.5 for name in convolution.GENERATORS}
        given |= {("points_turned", name): any_turn for name in ("any_turn", "quarter_turn")}
    given |= {(f"lifts_{way}_{count}", "any_turn"): value for way, count, value in lifts}
    for k in range(2):
        run.points += [Point(key, name, 0, k, k, value * (2 - k), 0.0) for (key, name), value in given.items()]
    return convolution.Result(run, error, 100, seconds)


def lifts(convolution, jitter=1.0):
    even = [("even", n, 0.1**n * jitter) for n in convolution.LIFTS]
    return [*even, *(("random", n, 0.5 / jitter) for n in convolution.LIFTS)]


def test_the_sentence_follows_from_the_numbers(convolution):
    """The paper's order where intervals over seeds say so, the other where they say that, or none."""

    def three(errors, any_turn, image, seconds=1.0, with_lifts=False):
        return [
            result(
                convolution, e, any_turn and any_turn * j, image * j, seconds * j, lifts(convolution, j) * with_lifts
            )
            for e, j in zip(errors, (0.99, 1.0, 1.01), strict=True)
        ]

    results = {
        "CNN": three((8, 9, 10), None, 0.3),
        "T(2)": three((20, 21, 22), 0.2, 0.3, 2.0),
        "SO(2)": three((6, 7.1, 8), 1e-15, 0.2, 2.0),
        "SE(2)": three((12, 13, 14.2), 0.05, 0.1, 4.0, True),
    }
    told = convolution.sentence(results)
    assert "exact before, during and after training: SO(2) (rotation ≤ 2e-15, any_turn ≤ 2e-15" in told
    assert "of what another image does: SO(2) 0.2 (0." in told
    assert "it is rounding for none" in told
    assert "CNN (image) 0.5 (0.5 to 0.5), less; T(2) 0.5 (0.5 to 0.5), less; SE(2) 0.5 (0.5 to 0.5), less" in told
    assert "SO(2) - T(2) -14.0 (-14.1 to -13.8) points (-0.05 in the paper: the same order)" in told
    assert "SE(2) - T(2) -7.9 (-8.2 to -7.6) points (-0.19 in the paper: the same order)" in told
    assert "SE(2) - SO(2) +6.0" in told
    assert "of the CNN's 0.67 (0.67 to 0.67)" in told
    assert "points (-0.14 in the paper: the other way round)" in told
    assert "The fewest are wrong for SO(2) on the mean, and in 3 of 3 seeds" in told
    assert "SE(2) 4 (4 to 4)" in told
    assert "times as much (more)" in told
    results["SE(2)"] = three((4, 7, 12), 0.05, 0.1, 4.0, True)
    assert "points (-0.14 in the paper: not told apart)" in convolution.sentence(results)
    alone = convolution.sentence({"CNN": three((8, 9, 10), None, 0.3)})
    assert "exact before, during and after training: none" in alone
    assert "paper" not in alone
    assert "SE(2)" not in alone


def test_tables(convolution):
    found = {"CNN": [result(convolution, 8, None, 0.3)] * 2, "SO(2)": [result(convolution, 5, 1e-15, 0.2)] * 2}
    rows = convolution.table(found)
    assert rows[1][:4] == ["CNN", "100", "1.00", "8 ± 0"]
    assert rows[1][4:9] == ["–"] * 5
    assert rows[2][7:] == ["1e-15", "1e-15", *["0.2 ± 0"] * 4]
    curve = convolution.lift_table([result(convolution, 5, 0.1, 0.2, lifts=lifts(convolution))] * 2)
    assert [row[0] for row in curve[1:]] == [str(n) for n in convolution.LIFTS]
    assert curve[1][1:] == ["0.2 ± 0", "0.1 ± 0", "1 ± 0", "0.5 ± 0"]


def test_intervals(convolution):
    assert convolution.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert convolution.told(convolution.interval([2.0])) == "2"
    assert convolution.ratio([2.0, 8.0], [1.0, 4.0]) == pytest.approx((2, 2, 2))
    words = [convolution.verdict((0, low, high), 0, "more", "less") for low, high in ((1, 2), (-2, -1), (-1, 1))]
    assert [*words, convolution.verdict((1, math.nan, math.nan), 0, "more", "less")] == [
        "more",
        "less",
        *["not told apart"] * 2,
    ]


def test_an_instrument_that_sees(convolution):
    """The monitor's layout on a network that looks at one coordinate: nothing is exact by accident."""

    def tilted(places, values):
        return ((places[..., :1] + 2) * values[..., None]).sum(1)

    inputs = convolution.points((convolution.digits(8, 2, 0)[0].tensors[0], None))
    found = F.relative(tilted, inputs, convolution.GENERATORS, input_representation={"0": Points(2), "1": Invariant()})
    assert min(found.values()) > 1e-2
    turned = lm.FiniteEquivarianceError(
        [convolution.ANY_TURN, convolution.QUARTER_TURN], input_representation={"0": Points(2), "1": Invariant()}
    )
    turned.update(tilted, inputs)
    assert {name: value > 1e-2 for name, value in turned.compute().items()} == {"any_turn": True, "quarter_turn": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--train", "1"], "--train must be at least 2, got 1"),
        (["--test", "1"], "--test must be at least 2, got 1"),
        (["--lifts", "0"], "--lifts must be at least 1, got 0"),
        (["--images", "1"], "--images must be at least 2, got 1"),
        (["--clouds", "1"], "--clouds must be at least 2, got 1"),
        (["--every", "0"], "--every must be at least 1, got 0"),
        (["--train", "1500"], "--train and --test must be 1797 digits together at most, got 2040"),
        (["--test", "50"], "--images and --clouds must be of the 50 of --test, got 64 and 10"),
        (["--every", "4"], "--every must divide --epochs, so that the last is measured, got 4, 30"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--learning-rate", "inf"], "--learning-rate must be positive, got inf"),
        (["--networks", "CNN", "CNN"], "--networks must name each network once, got CNN CNN"),
        (["--networks", "SO(3)"], "invalid choice"),
    ],
)
def test_bad_command_lines(convolution, arguments, message, capsys):
    with pytest.raises(SystemExit):
        convolution.main(arguments)
    assert message in capsys.readouterr().err
