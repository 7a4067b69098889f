"""The main job at reduced size."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lie_metric.functional.sums import Replicates
from lie_metric.records import Record
from lie_metric.runs import Point, Run

for module in ("sklearn", "timm", "tensorboard", "matplotlib", "torchvision"):
    pytest.importorskip(module)


@pytest.fixture
def compare(example):
    return example("compare_augmentations")


def tiny(compare, monkeypatch, count=96):
    train, val, channels, classes = compare.digits()
    subsets = [torch.utils.data.Subset(part, range(count)) for part in (train, val)]
    monkeypatch.setattr(compare, "digits", lambda: (*subsets, channels, classes))


def test_whole_job(compare, monkeypatch, tmp_path, capsys):
    tiny(compare, monkeypatch)
    arguments = ["--epochs", "2", "--num-images", "32", "--seeds", "2", "--processes", "1", "--out", str(tmp_path)]
    results = compare.main([*arguments, "--models", "cnn", "--regimes", "none", "translation", "rotation"])
    printed = capsys.readouterr().out
    folder = tmp_path / "digits"
    assert (folder / "comparison.png").stat().st_size > 30_000
    rows = list(csv.reader((folder / "table.csv").open()))
    assert [row[1] for row in rows[1:]] == ["none", "translation", "rotation"]
    curve = results["cnn"]["rotation"]["curves"]["equivariance"]["rotation"]
    assert list(curve.epochs) == [0, 1, 2]
    assert all(math.isfinite(v) and v > 0 for v in [*curve.values, *curve.errors])
    assert f"{curve.values[-1]:.3f} ± {curve.errors[-1]:.3f}" in printed
    assert "[6/6] cnn, augmentation rotation, seed 1: accuracy" in printed
    assert "rotation augmentation left" in printed
    assert "of the local (relative) errors it left" in printed
    assert "bspline, reflection, pixel areas" in printed
    assert f"tensorboard --logdir {folder}" in printed
    logged = [scalars(folder / f"cnn-rotation-s{seed}", "equivariance/rotation") for seed in range(2)]
    mean = [(a + b) / 2 for a, b in zip(*logged, strict=True)]
    assert mean == pytest.approx(list(curve.values), rel=1e-5)
    finite = results["cnn"]["rotation"]["curves"]["equivariance_finite"]["rotation"]
    assert scalars(folder / "mean" / "rotation", "cnn/rotation") == pytest.approx(list(finite.values), rel=1e-5)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def scalars(folder, tag):
    return [event.value for event in events(folder).Scalars(tag)]


def test_tensorboard_at_a_glance(compare, monkeypatch, tmp_path):
    """One run after another of the same name: the second replaces the first."""
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    tiny(compare, monkeypatch)
    options = compare.parse(["--models", "cnn", "--epochs", "1", "--num-images", "16", "--out", str(tmp_path)])
    compare.prepare(1)
    for _ in range(2):
        accuracy = compare.train(("cnn", "rotation", 4), options)
    folder = compare.folder_of(options, "cnn", "rotation", 4)
    found = events(folder)
    tags = found.Tags()["scalars"]
    shown = [tag for tag in tags if not tag.startswith("limits/")]
    assert len(found.Scalars("val_loss")) == len(found.Scalars("val_accuracy")) == 1
    assert len(shown) == 12
    assert not [tag for tag in tags if "_se/" in tag or "lee" in tag]
    value, lower, upper = (
        scalars(folder, tag)
        for tag in (
            "equivariance_finite/rotation",
            "limits/equivariance_finite/rotation/lower",
            "limits/equivariance_finite/rotation/upper",
        )
    )
    (run,) = compare.read(folder)
    errors = compare.curve_of(run, "equivariance_finite", "rotation").errors
    assert [(b - a) / 2 for a, b in zip(lower, upper, strict=True)] == pytest.approx(list(errors), rel=1e-4)
    assert [(a + b) / 2 for a, b in zip(lower, upper, strict=True)] == pytest.approx(value, rel=1e-5)

    # The last layout of a run is the one that TensorBoard shows.
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    margins = {one.value: (one.lower, one.upper) for c in layout.category for k in c.chart for one in k.margin.series}
    for generator in compare.GENERATORS:
        for key in (f"equivariance_finite/{generator}", f"equivariance/{generator}"):
            assert margins[key] == (f"limits/{key}/lower", f"limits/{key}/upper")
            assert {key, *margins[key]} <= set(tags)
    assert not any(chart.multiline.tag for category in layout.category for chart in category.chart)

    def declared(tag):
        return plugin_data_pb2.HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)

    experiment = declared("_hparams_/experiment").experiment
    assert {info.name for info in experiment.hparam_infos} == {"model", "regime", "seed", "epochs"}
    assert next(info.name.tag for info in experiment.metric_infos) == "val_accuracy"
    start = declared("_hparams_/session_start_info").session_start_info.hparams
    assert (start["model"].string_value, start["regime"].string_value) == ("cnn", "rotation")
    assert start["seed"].number_value == 4
    assert scalars(folder, "val_accuracy")[-1] == pytest.approx(accuracy)
    assert (run.regime, run.seed) == ("rotation", 4)


SCRIPT = Path(__file__).parents[2] / "examples" / "compare_augmentations.py"


def started(*arguments):
    """The script as a user starts it, in a session of its own, so that a signal reaches it as Ctrl-C would."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_of(group):
    """Processes of a group that still run; those that ended may take a moment to go."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_two_processes_do_what_one_does(compare, tmp_path):
    arguments = ["--models", "cnn", "--regimes", "none", "--seeds", "2", "--epochs", "1", "--num-images", "16"]
    process = started(*arguments, "--out", tmp_path / "two")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert not left_of(process.pid)
    assert "[2/2] cnn" in printed
    assert "it/s" not in printed
    compare.main([*arguments, "--processes", "1", "--out", str(tmp_path / "one")])
    for seed in range(2):
        one, two = (
            scalars(tmp_path / k / "digits" / f"cnn-none-s{seed}", "equivariance/scale") for k in ("one", "two")
        )
        assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_job_leaves_no_process(tmp_path, how):
    process = started("--models", "cnn", "--regimes", "none", "all", "--epochs", "30", "--out", tmp_path)
    for _ in range(1200):
        if list(tmp_path.glob("digits/cnn-*/events*")):
            break
        time.sleep(0.1)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    printed = process.communicate(timeout=60)[0]
    assert process.returncode
    assert not left_of(process.pid)
    if how == signal.SIGINT:
        assert "Stopped after 0 of 6 runs; no process is left." in printed
        assert "Traceback" not in printed


@pytest.mark.slow
def test_run_that_fails_in_a_process_ends_all(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "cnn-all-s0").write_text("no folder")
    process = started("--models", "cnn", "--regimes", "all", "none", "--epochs", "20", "--out", tmp_path)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "RuntimeError: Every run must finish, got " in printed
    assert "in that of cnn, augmentation all, seed 0" in printed
    assert not left_of(process.pid)


def test_run_that_fails_is_named(compare, monkeypatch, tmp_path):
    tiny(compare, monkeypatch)
    arguments = ["--models", "no_such_model", "--regimes", "scale", "--processes", "1", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match=r"in that of no_such_model, augmentation scale, seed 0 .*`--processes 1`"):
        compare.main(arguments)


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (2, 1), (3, 1), (6, 2), (7, 1), (15, 5), (16, 4)])
def test_last_epoch_is_measured(compare, epochs, every):
    assert compare.measured_every(epochs) == every
    assert epochs % every == 0


def test_regimes_of_a_seed_start_from_the_same_weights(compare):
    states = []
    for _ in range(2):
        compare.seed_everything(3, verbose=False)
        states.append(compare.build("cnn", 1, 10).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_folder_of_images_and_vision_transformer(compare, tmp_path, capsys):
    from torchvision.utils import save_image

    for part in ("train", "val"):
        for kind in ("left", "right"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for k in range(32):
                image = torch.rand(3, 40, 36) * 0.3
                image[:, :, :18] += 0.6 * (kind == "left")
                save_image(image, tmp_path / "data" / part / kind / f"{k}.png")
    arguments = ["--data", f"folder:{tmp_path / 'data'}", "--models", "vit", "--regimes", "none", "all"]
    arguments += [
        "--epochs",
        "1",
        "--num-images",
        "16",
        "--seeds",
        "2",
        "--processes",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    results = compare.main([*arguments, "--augmentation", "torchvision"])
    assert set(results["vit"]) == {"none", "all"}
    assert "over 2 seeds" in capsys.readouterr().out
    assert (tmp_path / "o" / "folder" / "vit-all-s1").is_dir()


@pytest.mark.parametrize(
    "generators", [("translation_x", "translation_y"), ("rotation",), ("scale",), ("perspective_x", "perspective_y")]
)
def test_both_backends_do_the_same(compare, generators):
    """Same parameters, same signs: torchvision's action and ours agree on a smooth image."""
    grid = torch.linspace(-1, 1, 32)
    image = torch.exp(-((grid[:, None] - 0.2) ** 2 + 2 * (grid + 0.1) ** 2) / 0.1).expand(4, 1, 32, 32).contiguous()
    ours, theirs = (compare.Augmentation(generators, 0, backend)(image) for backend in ("lie_metric", "torchvision"))
    assert (ours - image).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)


def test_regimes_move_what_they_say(compare):
    drawn = compare.Augmentation(("rotation",), 0).draw(100)
    assert drawn["rotation"].abs().max() > 0.3
    assert not drawn["translation_x"].any()
    assert not drawn["scale"].any()


def test_further_regimes_leave_the_default_as_it_is(compare):
    assert compare.parse([]).regimes == ["none", "translation", "rotation", "scale", "all"]
    assert compare.measured(compare.parse([]).regimes) == compare.GENERATORS
    usual, further = (compare.Augmentation(compare.REGIMES[name], 0).draw(5) for name in ("rotation", "perspective"))
    assert list(usual) == list(compare.GENERATORS)
    assert [name for name, t in further.items() if t.any()] == ["perspective_x", "perspective_y"]
    assert 0.1 < compare.Augmentation(compare.REGIMES["perspective"], 0).draw(99)["perspective_x"].max() <= 0.25


def test_regime_of_perspectives(compare, monkeypatch, tmp_path, capsys):
    tiny(compare, monkeypatch)
    arguments = ["--models", "cnn", "--epochs", "1", "--num-images", "16", "--seeds", "1", "--processes", "1"]
    results = compare.main([*arguments, "--regimes", "none", "perspective", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "perspective_x / inverse half side" in printed
    assert "perspective x ±0.25 (inverse half side), perspective y ±0.25" in printed
    found = results["cnn"]["perspective"]["curves"]
    for family in compare.FAMILIES:
        assert list(found[family]) == [*compare.GENERATORS, "perspective_x", "perspective_y"]
        assert all(curve.values[-1] > 0 for curve in found[family].values())
    (row,) = [row for row in csv.reader((tmp_path / "digits" / "table.csv").open()) if row[1] == "perspective"]
    assert len(row) == 3 + 3 * 6


def test_regime_of_colours(compare, tmp_path, capsys):
    """Of red and green squares the hue tells the class; colours have no displacement in pixels."""
    from torchvision.utils import save_image

    for part in ("train", "val"):
        for k, kind in enumerate(("red", "green")):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for index in range(32):
                image = torch.rand(3, 32, 32) * 0.3
                image[k] += 0.4
                save_image(image, tmp_path / "data" / part / kind / f"{index}.png")
    arguments = ["--data", f"folder:{tmp_path / 'data'}", "--models", "cnn", "--epochs", "1", "--num-images", "16"]
    arguments += ["--seeds", "1", "--processes", "1", "--out", str(tmp_path / "out")]
    results = compare.main([*arguments, "--regimes", "none", "colour"])
    found = results["cnn"]["colour"]["curves"]
    assert list(found["equivariance"]) == [*compare.GENERATORS, "brightness", "contrast", "chroma", "hue"]
    assert list(found["equivariance_finite"]) == list(compare.GENERATORS)
    printed = capsys.readouterr().out
    assert "hue / radian" in printed
    (row,) = [line for line in printed.splitlines() if "colour  at 2 px" in line]
    assert row.split()[-4:] == ["-"] * 4
    images = torch.randn(4, 3, 8, 8)
    assert 0.05 < (compare.Augmentation(("hue",), 0)(images) - images).abs().max() < 3


def run(rotation, translation, lee=(1.0, 2.0)):
    """A run whose errors at two pixels are given; the local ones are twice as large, LEE is that before and after."""
    names = ("translation_x", "translation_y", "rotation", "scale")
    found = Run("run", "records")
    for key, factor in (("equivariance_finite", 1.0), ("equivariance", 2.0)):
        value = factor * torch.tensor([translation, translation, rotation, 1.0], dtype=torch.float64)
        left_out = value * torch.linspace(0.99, 1.01, 8, dtype=torch.float64)[:, None]
        kept = Replicates(value, left_out, torch.ones(8, dtype=torch.float64))
        record = Record("LocalEquivarianceError", "relative", names, ("",) * 4, kept, {}, "", None, math.nan)
        found.records[key, 0] = [(1.0, record)]
        found.points += [Point(key, "rotation", 0, 1.0, 1.0, value[2].item(), 0.01)]
    found.points += [Point("equivariance_lee", "rotation", 0, k, k, lee[k], 0.1) for k in range(2)]
    return found


def regimes_of(rotations, translations):
    """By seed what rotation augmentation left of the errors of a network without augmentation."""
    none = [run(0.5 + seed, 0.8 + seed) for seed in range(len(rotations))]
    pairs = list(zip(none, rotations, translations, strict=True))
    moved = [
        run(
            a * base.records["equivariance_finite", 0][-1][1].replicates.value[2].item(),
            b * base.records["equivariance_finite", 0][-1][1].replicates.value[0].item(),
        )
        for base, a, b in pairs
    ]
    return {"none": none, "rotation": moved, "translation": none}


def test_the_sentence_follows_from_the_ratios_of_each_seed(compare):
    """Errors that differ threefold between seeds, and ratios that hardly do."""
    told = compare.sentence("cnn", regimes_of([0.4, 0.5, 0.625], [0.8, 1.0, 1.25]))
    assert "rotation augmentation left 0.50 (0.29 to 0.87; seeds 0.40, 0.50, 0.62) of the rotation error" in told
    assert "1.00 (0.57 to 1.74; seeds 0.80, 1.00, 1.25) of the translation error" in told
    assert "of the local (relative) errors it left 0.50 (0.29 to 0.87" in told
    assert "lowered the former more than the latter (quotient, paired by seed, 0.50 (0.50 to 0.50; seeds 0.50," in told
    assert "below 1 in 3 of 3)" in told
    assert "translation augmentation left 1.00 (1.00 to 1.00" in told
    assert "lowest for the untrained network, which has learned nothing, in 3" in told


@pytest.mark.parametrize(
    ("rotations", "translations", "verdict"),
    [
        ([0.4, 0.5, 0.6], [0.7, 0.8, 0.9], "the former more than the latter"),
        ([0.7, 0.8, 0.9], [0.4, 0.5, 0.6], "the former less than the latter"),
        ([0.4, 0.5, 0.9], [0.7, 0.8, 0.8], "the former not distinguishably more than the latter"),
    ],
)
def test_words_of_order_need_an_interval_over_seeds(compare, rotations, translations, verdict):
    told = compare.sentence("cnn", regimes_of(rotations, translations)).split(".\n")[0]
    assert verdict in told


def test_one_seed_orders_nothing(compare):
    told = compare.sentence("cnn", regimes_of([0.1], [0.9]))
    assert "rotation augmentation left 0.10 (0.10 to 0.10) of the rotation error" in told
    for word in ("more than", "less than", "seeds 0"):
        assert word not in told
    assert compare.sentence("cnn", {"none": [run(1, 1)]}) == "cnn: too few regimes to compare."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--batch-size", "-2"], "--batch-size must be at least 1, got -2"),
        (["--num-images", "-1"], "--num-images must be at least 1"),
        (["--data", "imagenet"], "--data must be digits, mnist, cifar10 or folder:PATH, got 'imagenet'"),
        (["--regimes", "mirror"], "invalid choice"),
        (["--regimes", "colour"], "needs images with colours, got --data digits, whose digits are grey"),
        (
            ["--regimes", "colour", "--data", "cifar10", "--augmentation", "torchvision"],
            "--regimes colour needs --augmentation lie_metric",
        ),
    ],
)
def test_bad_command_lines(compare, arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_data_that_cannot_be_had(compare, tmp_path, monkeypatch):
    from torchvision import datasets

    with pytest.raises(SystemExit, match=r"cannot be had.*use --data digits"):
        compare.torchvision_data(f"folder:{tmp_path / 'nothing'}", tmp_path)

    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images")

    monkeypatch.setattr(datasets, "MNIST", offline)
    with pytest.raises(SystemExit, match="--data mnist cannot be had: Error downloading"):
        compare.torchvision_data("mnist", tmp_path)


def test_models(compare):
    for name in ("cnn", "vit", "test_resnet"):
        model = compare.build(name, 1, 10)
        assert isinstance(model, nn.Module)
        assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
