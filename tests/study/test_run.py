"""Studies: interrupted, split, refused, failing."""

import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import lie_metric as lm
from lie_metric.study import Settings, StudyError, read_layers, read_rows, run_study
from lie_metric.study import run as study_run
from lie_metric.study.__main__ import main
from lie_metric.study.data import load_data
from lie_metric.study.measure import measure_model

NINE = [one.name for one in lm.generators("affine")]
TIMES = {"seconds_measurement", "seconds_evaluation", "finished"}


def values(folder):
    """Rows by model and generator, without what time it took."""
    return {
        (row["model"], row["generator"]): {name: value for name, value in row.items() if name not in TIMES}
        for row in read_rows(folder)
    }


def study(*arguments):
    return main(["study", *map(str, arguments)])


def test_rows_are_those_of_the_metric(tmp_path, named, small):
    assert study(*named("a"), *small, "--out", tmp_path, "--batch-size", 5, "--layerwise", 2) == 0
    rows = read_rows(tmp_path)
    assert [row["generator"] for row in rows] == NINE
    import study_models

    model = study_models.a().eval()
    images = load_data("digits", 12, 0)
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(model))
    batch = torch.stack([transform(images.read(number)) for number in range(12)])
    assert batch.shape == (12, 1, 16, 16)
    metric = lm.LocalEquivarianceError(with_noise=True)
    metric.update(model, batch[:6])
    wanted = metric.measures()
    for row in rows:
        for measure in ("relative", "lee", "sensitivity"):
            name = row["generator"]
            assert row[measure] == pytest.approx(wanted[measure][name].item(), rel=1e-4)
            assert row[f"{measure}_se"] == pytest.approx(wanted[f"{measure}_standard_error"][name].item(), rel=1e-3)
        right = (model(batch).argmax(1) == torch.tensor(images.labels)).double().mean().item()
        assert row["accuracy"] == pytest.approx(right)
        assert row["accuracy_se"] == pytest.approx(math.sqrt(right * (1 - right) / 12))
        assert 0 <= row["consistency"] <= 1
        assert row["parameters"] == sum(one.numel() for one in model.parameters())
        # 7x7 positions of 9·4 products, 3x3 of 9·4·4, and the last layer.
        assert row["macs"] == 49 * 36 + 9 * 144 + 160
        assert (row["family"], row["tag"], row["status"], row["input_size"]) == ("net0", "own", "ok", "1x16x16")
        assert (row["images"], row["evaluation_images"]) == (6, 12)
        assert row["torch"] == torch.__version__.split("+")[0] or row["torch"] == torch.__version__
        assert row["seconds_measurement"] > 0
        assert row["seconds_evaluation"] > 0
    layers = read_layers(tmp_path)
    for name in NINE:
        assert sum(row["share"] for row in layers if row["generator"] == name) == pytest.approx(1, abs=1e-3)


def test_macs_of_a_model_that_projects_a_parameter():
    class Latent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.latent = torch.nn.Parameter(torch.ones(1, 4))
            self.inner = torch.nn.Linear(4, 1024)

        def forward(self, x):
            return x.flatten(1) @ self.inner(self.latent).T.expand(-1, 2)

    settings = Settings("digits", 2, 2, generators=("rotation",))
    rows, _, _, remarks = measure_model(
        Latent(), load_data("digits", 2, 0), settings, device=torch.device("cpu"), batch_size=2
    )
    assert rows[0]["macs"] == 4 * 1024 + 2 * 1024
    assert not any("MACs" in one for one in remarks)


def test_consistency():
    class Left(torch.nn.Module):
        def forward(self, x):
            half = x.shape[-1] // 2
            return torch.stack([x[..., :half].sum((1, 2, 3)), x[..., half:].sum((1, 2, 3))], 1)

    class Sum(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)

    images = load_data("digits", 64, 0)
    settings = Settings("digits", 2, 64, measures=("consistency",), max_shift=0.2)
    found = []
    for model in (Sum(), Left()):
        rows = measure_model(model, images, settings, device=torch.device("cpu"), batch_size=10).rows
        again = measure_model(model, images, settings, device=torch.device("cpu"), batch_size=64).rows
        assert len(rows) == 1
        assert rows[0]["consistency"] == again[0]["consistency"]
        found.append(rows[0]["consistency"])
    assert found[0] == 1
    assert 0.3 < found[1] < 1


def test_killed_in_the_middle(tmp_path, named, small, process):
    """A process that is killed with signal 9 leaves every finished row, and the next one goes on."""
    wait, out = tmp_path / "wait", tmp_path / "out"
    wait.touch()
    names = [*named("ab"), *named(["slow"]), *named("c")]
    running = process("study", *names, *small, "--out", out, STUDY_WAIT=str(wait))
    table = out / "rows-1-of-1.csv"
    deadline = time.monotonic() + 300  # the machine may be busy
    while not (table.exists() and table.read_text().count("\nb,") == 9):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = read_rows(out)
    assert [row["model"] for row in kept] == ["a"] * 9 + ["b"] * 9
    # As if the kill had come while the third model was written.
    with table.open("a") as file:
        file.write("slow,rotation,ok,,net1,own,0.12")
    wait.unlink()
    assert study(*names, *small, "--out", out) == 0
    rows = read_rows(out)
    assert rows[:18] == kept
    assert [row["model"] for row in rows] == [name for name in ("a", "b", "slow", "c") for _ in NINE]
    # Nothing is left to do.
    before = table.read_bytes()
    assert study(*names, *small, "--out", out) == 0
    assert table.read_bytes() == before


def test_shards_merge_to_one_run(tmp_path, named, small, monkeypatch):
    names = named("abcde")
    assert study(*names, *small, "--out", tmp_path / "one") == 0
    for part in ("1/2", "2/2"):
        assert study(*names, *small, "--out", tmp_path / "two", "--shard", part) == 0
    # Four processes, as torchrun starts them on any number of machines.
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in "0123":
        monkeypatch.setenv("RANK", rank)
        assert study(*names, *small, "--out", tmp_path / "four") == 0
    assert sorted(path.name for path in (tmp_path / "four").glob("rows*")) == [
        f"rows-{i}-of-4.csv" for i in range(1, 5)
    ]
    whole = values(tmp_path / "one")
    assert len(whole) == 45
    assert values(tmp_path / "two") == whole
    assert values(tmp_path / "four") == whole
    assert len(read_rows(tmp_path / "two")) == len(read_rows(tmp_path / "four")) == 45


def test_failing_models_are_rows(tmp_path, named, small, capsys, monkeypatch):
    names = named(["breaks", "a", "no_model", "out_of_memory", "three_classes"])
    assert study(*names, *small, "--out", tmp_path) == 3
    assert "2 measured, 3 failed, 0 skipped" in capsys.readouterr().out
    rows = read_rows(tmp_path)
    reasons = {row["model"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert set(reasons) == {"breaks", "no_model", "out_of_memory"}
    assert reasons["breaks"].startswith("RuntimeError: no such weights (study_models.py:")
    assert "must return a model, got int" in reasons["no_model"]
    assert "1 TiB" in reasons["out_of_memory"]
    other = next(row for row in rows if row["model"] == "three_classes")
    assert other["accuracy"] is None
    assert "3 outputs, the set 10 classes" in other["reason"]
    # Failures are not repeated unless asked for.
    assert study(*names, *small, "--out", tmp_path) == 0
    assert study(*names, *small, "--out", tmp_path, "--retry-failed") == 3
    assert len(read_rows(tmp_path)) == len(rows)
    # torchrun ends all processes when one ends otherwise.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert study(*names, *small, "--out", tmp_path, "--retry-failed") == 0
    assert len(read_rows(tmp_path)) == len(rows)


def test_other_settings_are_refused(tmp_path, named, small, capsys):
    assert study(*named("a"), *small, "--out", tmp_path) == 0
    before = read_rows(tmp_path)
    for change in (
        ["--seed", "1"],
        ["--interpolation", "bilinear"],
        ["--generators", "rotation"],
        ["--layerwise"],
        ["--input-size", "16"],
        ["--output", "probabilities"],
    ):
        assert study(*named("ab"), *small, "--out", tmp_path, *change) == 1
        assert "must hold a study with the same settings" in capsys.readouterr().err
    assert read_rows(tmp_path) == before
    assert study(*named("ab"), *small, "--out", tmp_path, "--batch-size", "3") == 0


def test_corrupt_image_keeps_what_was_done(tmp_path, named, capsys):
    from PIL import Image

    data, out, random = tmp_path / "data", tmp_path / "out", np.random.default_rng(0)
    for label in "01":
        (data / label).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random.integers(0, 255, (16, 16), np.uint8)).save(data / label / f"{number}.png")
    options = ["--data", f"folder:{data}", "--num-images", "6", "--out", out, "--quiet"]
    assert study(*named(["bare"]), *options) == 0
    before = read_rows(out)
    (data / "1" / "2.png").write_bytes(b"\x89PNG broken")
    assert study(*named(["bare", "a"]), *options) == 1
    assert "`data` must hold readable images, got " in (error := capsys.readouterr().err)
    assert "2.png" in error
    assert read_rows(out) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_change_or_differ(tmp_path, named, capsys, monkeypatch, workers):
    from PIL import Image

    data, random = tmp_path / "data", np.random.default_rng(0)
    for label, size in (("0", 16), ("1", 20)):
        (data / label).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(random.integers(0, 255, (size, size), np.uint8)).save(data / label / f"{number}.png")
    options = ["--data", f"folder:{data}", "--num-images", "4", "--quiet", "--workers", workers]
    # Sizes that differ need a model that says what it takes.
    assert study(*named(["bare", "a"]), *options, "--out", tmp_path / "sizes") == 3
    rows = read_rows(tmp_path / "sizes")
    assert [row["model"] for row in rows] == ["bare", *["a"] * 9]
    assert rows[0]["reason"].startswith("ValueError: `data` must hold images of one size for a model without")
    # An image that breaks during the study stops it, and is no fault of the model.
    load = study_run.load_data

    def then_break(*arguments):
        images = load(*arguments)
        (data / "1" / "1.png").write_bytes(b"no image")
        return images

    monkeypatch.setattr(study_run, "load_data", then_break)
    capsys.readouterr()
    assert study(*named(["a"]), *options, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith("error: `data` must hold readable images, got ")
    assert read_rows(tmp_path / "out") == []


def test_full_disk(tmp_path, named, small):
    """A limit on the size of files stands for the disk: the fourth model does not fit, three are kept."""
    out = tmp_path / "out"
    assert study(*named("abc"), *small, "--out", out) == 0
    room = (out / "replicates-1-of-1.jsonl").stat().st_size + 100
    program = tmp_path / "limited.py"
    program.write_text(
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "from lie_metric.study.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), "study", *named("abcd"), *small, "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "`out` must be writable, got File too large" in done.stderr
    assert "What was finished is kept" in done.stderr
    assert [row["model"] for row in read_rows(out)] == [name for name in "abc" for _ in NINE]
    assert study(*named("abcd"), *small, "--out", out) == 0
    assert len(read_rows(out)) == 36


def test_measures_are_chosen(tmp_path, named, small):
    study(*named("a"), *small, "--out", tmp_path / "1", "--measures", "relative", "--generators", "rotation", "scale")
    rows = read_rows(tmp_path / "1")
    assert [row["generator"] for row in rows] == ["rotation", "scale"]
    assert rows[0]["relative"] > 0
    assert rows[0]["lee"] is rows[0]["sensitivity"] is rows[0]["accuracy"] is rows[0]["consistency"] is None
    study(*named("a"), *small, "--out", tmp_path / "2", "--measures", "accuracy")
    rows = read_rows(tmp_path / "2")
    assert [row["generator"] for row in rows] == [""]
    assert rows[0]["accuracy"] is not None


def test_accuracy_of_what_is_no_bare_tensor(tmp_path, named, small):
    """Models that return logits in something have the values of the model alone."""
    wrapped = ["with_logits", "with_dict", "with_tuple", "half"]
    options = [*small, "--generators", "rotation"]
    assert study(*named(["a", *wrapped, "with_pred"]), *options, "--out", tmp_path / "found") == 3
    rows = {row["model"]: row for row in read_rows(tmp_path / "found")}
    for name in wrapped:
        for value in ("accuracy", "consistency", "relative", "macs"):
            assert rows[name][value] == pytest.approx(rows["a"][value], rel=0.05 if name == "half" else 1e-5)
    assert rows["half"]["reason"] == "weights in half precision, measured and timed in float32"
    assert "`output` must say which tensor" in rows["with_pred"]["reason"]
    assert study(*named(["with_pred"]), *options, "--out", tmp_path / "pred", "--output", "pred") == 0
    assert read_rows(tmp_path / "pred")[0]["accuracy"] == rows["a"]["accuracy"]
    source = named("a")[0].partition("=")[2].replace(":a", ":three")
    assert study(*named("a"), *options, "--out", tmp_path / "three", "--output", source) == 0
    three = read_rows(tmp_path / "three")[0]
    assert three["relative"] != pytest.approx(rows["a"]["relative"], rel=1e-3)
    assert "3 outputs, the set 10 classes" in three["reason"]
    assert study(*named("a"), *options, "--out", tmp_path / "softmax", "--output", "probabilities") == 0
    assert read_rows(tmp_path / "softmax")[0]["relative"] != pytest.approx(rows["a"]["relative"], rel=1e-3)


def test_mixed_folders_and_frames(tmp_path, named):
    from PIL import Image

    data, random = tmp_path / "data", np.random.default_rng(0)
    for label in "01":
        (data / label).mkdir(parents=True)
        for number, shape in enumerate([(20, 24), (20, 24, 3), (20, 24)]):
            Image.fromarray(random.integers(0, 255, shape, np.uint8)).save(data / label / f"{number}.png")
    options = ["--data", f"folder:{data}", "--num-images", "6", "--generators", "rotation", "--quiet"]
    # Grey images become RGB ones where there are both, and a model of one channel hears of it.
    assert study(*named(["rgb", "bare"]), *options, "--out", tmp_path / "rgb") == 3
    found = {row["model"]: row for row in read_rows(tmp_path / "rgb")}
    assert found["rgb"]["input_size"] == "3x20x24"
    assert "must take images of 3x20x24" in found["bare"]["reason"]
    assert "--channels" in found["bare"]["reason"]
    frame = ["--input-size", "16", "18", "--channels", "1", "--mean", "0.5", "--std", "0.25"]
    assert study(*named(["bare"]), *options, "--out", tmp_path / "grey", *frame) == 0
    assert read_rows(tmp_path / "grey")[0]["input_size"] == "1x16x18"
    assert study(*named(["bare"]), *options, "--out", tmp_path / "grey", *frame[:-1], "0.5") == 1


def test_families_and_tags(tmp_path, named, small):
    names = [*named("ab"), "--family", "a=plain", "--tag", "*=mine"]
    assert study(*names, *small, "--generators", "rotation", "--out", tmp_path) == 0
    assert [(row["family"], row["tag"]) for row in read_rows(tmp_path)] == [("plain", "mine"), ("net1", "mine")]


def test_warnings_are_remarks(tmp_path, named, small):
    """What a measurement warns of stands in the row: no zero is read as symmetry."""
    source = tmp_path / "still.py"
    source.write_text("import torch\ndef build(): return lambda x: torch.ones(len(x), 10) + 0 * x.sum()\n")
    assert study(f"still={source}:build", *small, "--generators", "rotation", "--out", tmp_path / "out") == 0
    reason = read_rows(tmp_path / "out")[0]["reason"]
    assert "`relative` is NaN for ['rotation']" in reason
    assert "does not move" in reason


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["resnet81"], "got 'resnet81'"),
        (["math:sqrt", "--shard", "3/2"], "`shard` must be i/n"),
        (["math:sqrt", "--num-images", "1"], "`num_images` must be an integer of at least 2, got 1"),
        (["math:sqrt", "--batch-size", "0"], "`batch_size` must be an integer of at least 1, got 0"),
        (["math:sqrt", "--layerwise", "99"], "`layerwise` must be at most"),
        (["math:sqrt", "--generators", "twist"], "twist"),
        (["math:sqrt", "--interpolation", "nearest"], "nearest"),
        (["math:sqrt", "--device", "abacus"], "`device` must be one that torch can use here, got 'abacus'"),
        (["math:sqrt", "--data", "nothing"], "`data` must be digits"),
        (["math:sqrt", "--input-size", "0"], "`input_size` must be a positive height and width, got (0, 0)"),
        (["math:sqrt", "--mean", "0.1", "0.2"], "`mean` must be one number or one for each channel, got 2 numbers"),
        (["math:sqrt", "--mean", "1", "2", "3", "--channels", "1"], "got 3 numbers for 1 channels"),
        (["math:sqrt", "--std", "0"], "`std` must be positive, of values in [0, 1], got [0.0]"),
        (["math:sqrt", "--output", "nowhere:x"], "`output` must name a callable as module:callable"),
        (["math:sqrt", "--family", "cnn"], "`--family` must be MODELS=FAMILY, got 'cnn'"),
        (["math:sqrt", "--tag", "cnn=x"], "`tags` must match the name of a model, got 'cnn'. Names are e.g. math:sqrt"),
    ],
)
def test_refused_before_any_work(tmp_path, small, capsys, options, match):
    assert study(*small, "--out", tmp_path / "out", *options) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings():
    for change, match in (
        ({"measures": ("size",)}, "`measures` must be among"),
        ({"max_shift": 0.0}, "`max_shift` must be in"),
        ({"seed": -1}, "`seed` must be a non-negative integer"),
        ({"eval_images": 3}, "`eval_images` must be an integer of at least 256, got 3"),
    ):
        with pytest.raises(ValueError, match=match):
            Settings("digits", **change)


def test_too_few_images(tmp_path, named):
    with pytest.raises(StudyError, match="`data` must hold at least 400 images, got 360"):
        run_study(named("a"), tmp_path, Settings("digits", 400, layerwise=400))


def test_extras_are_named_where_they_are_missing(tmp_path):
    code = f"""
import sys, torch, torchmetrics, lightning.pytorch
for name in ("timm", "torchvision", "matplotlib", "sklearn", "pandas", "PIL", "tqdm"):
    for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
        del sys.modules[loaded]
    sys.modules[name] = None
from lie_metric.study.__main__ import main
own = "math:sqrt"
for model, data in (("resnet18", "digits"), (own, "digits"), (own, "cifar10"), (own, "synthetic")):
    assert main(["study", model, "--data", data, "--out", {str(tmp_path / "out")!r}]) == 2
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for need in ("timm", "scikit-learn", "torchvision", "Pillow"):
        assert f"need {need}: pip install 'lie_metric[examples]'" in done.stderr.replace("needs", "need")
    assert not (tmp_path / "out").exists()
