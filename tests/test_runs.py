"""Runs read back from the monitor's files, TensorBoard, Lightning's CSV and exports; regimes and seeds."""

import csv
import json
import math
import shutil

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric import run_files, runs
from lie_metric.curves.files import append
from lie_metric.study.__main__ import main
from lie_metric.study.comparison import compare_runs, write_comparison

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*workers.*", "ignore:.*logging interval.*", "ignore:The output of", "ignore::FutureWarning"
)

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(LightningModule):
    def __init__(self, regime, seed):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch[0].flip(-1) if self.hparams.regime == "flipped" else batch[0]
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two regimes and two seeds, with both loggers, as the Trainer leaves them."""
    root = tmp_path_factory.mktemp("runs")
    for regime in ("plain", "flipped"):
        for seed in (0, 1):
            seed_everything(seed, verbose=False)
            loader = DataLoader(TensorDataset(IMAGES, torch.arange(24) % 3), 8)
            loggers = [
                TensorBoardLogger(root / "board", regime, f"seed_{seed}", default_hp_metric=False),
                CSVLogger(root / "csv", regime, f"seed_{seed}"),
            ]
            trainer = Trainer(
                max_epochs=2, accelerator="cpu", logger=loggers, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False,
                callbacks=[lm.EquivarianceMonitor(("rotation", "scale"), displacement=None, floor=False)],
            )  # fmt: skip
            trainer.fit(Net(regime, seed), loader, loader)
    return root


def stripped(root, into, *, keep):
    """A copy with some files only."""
    shutil.copytree(root, into)
    for file in into.rglob("*"):
        if file.is_file() and not any(part in file.name for part in keep):
            file.unlink()
    return into


def table(frame):
    return {
        (row.regime, row.seed, row.key, row.generator, row.epoch): (row.value, row.standard_error)
        for row in frame.itertuples()
    }


def test_every_kind_of_file_tells_the_same(trained, tmp_path):
    wanted = table(lm.read_runs(trained / "board"))
    assert len(wanted) == 4 * 3 * 2 * 2
    assert {key[:2] for key in wanted} == {(regime, seed) for regime in ("plain", "flipped") for seed in (0, 1)}
    assert {key[4] for key in wanted} == {0, 1, 2}
    only = {
        "events": stripped(trained / "board", tmp_path / "events", keep=("tfevents", "hparams")),
        "events alone": stripped(trained / "board", tmp_path / "alone", keep=("tfevents",)),
        "csv": trained / "csv",
        "csv alone": stripped(trained / "csv", tmp_path / "csv", keep=("metrics.csv",)),
    }
    for name, folder in only.items():
        found = table(lm.read_runs(folder))
        assert set(found) == set(wanted), name
        for key, numbers in found.items():
            assert numbers == pytest.approx(wanted[key], rel=1e-5), (name, key)
    sources = {run.source for folder in (trained / "board", *only.values()) for run in runs.read(folder)}
    assert sources == {"records", "tensorboard", "csv"}
    frame = lm.read_runs([trained / "board" / "plain", str(trained / "board" / "flipped")])
    assert list(frame) == [
        "run", "regime", "seed", "key", "generator", "loader", "epoch", "step", "value", "standard_error"
    ]  # fmt: skip
    assert table(frame) == wanted


def test_records_can_be_compared(trained):
    one, other = (trained / "board" / regime / "seed_0" for regime in ("flipped", "plain"))
    a, b = lm.read_record(one), lm.read_record(other / "equivariance.jsonl")
    found = lm.compare(a, b)
    assert (found.measure, found.images, found.over) == ("relative", 24, "images")
    assert lm.compare(lm.read_record(one, epoch=0), lm.read_record(other, epoch=0))["scale"].ratio == pytest.approx(1)
    assert lm.read_record(one, "equivariance_lee").measure == "lee"
    with pytest.raises(ValueError, match=r"`key` must be one of \['equivariance', 'equivariance_lee'\], got 'lee'"):
        lm.read_record(one, "lee")
    with pytest.raises(ValueError, match=r"`epoch` must be one of \[0.0, 1.0, 2.0\], got 9"):
        lm.read_record(one, epoch=9)
    with pytest.raises(ValueError, match="must hold one run with a file that the monitor keeps, got 4"):
        lm.read_record(trained / "board")
    sides = [[lm.read_record(trained / "board" / r / f"seed_{s}") for s in (0, 1)] for r in ("flipped", "plain")]
    assert lm.compare(*sides).over == "trainings"


@pytest.mark.parametrize(
    ("parts", "hyperparameters", "regime", "seed"),
    [
        ("none/version_3", {}, "none", 3),
        ("none/seed_2/version_0", {}, "none", 2),
        ("cnn-rotation-s4", {}, "cnn-rotation", 4),
        ("x/y", {"regime": "all", "seed": 5}, "all", 5),
        ("x/version_1", {"seed_everything": 6}, "x", 6),
        ("x/seed=7", {"seed_everything": 6}, "x", 7),
        ("vit_s16", {}, "vit_s16", None),
        ("x/seed_1", {"seed": 8, "regime": 0.5}, "0.5", 8),
    ],
)
def test_regimes_and_seeds(parts, hyperparameters, regime, seed):
    run = runs.Run(parts, "csv", hyperparameters=hyperparameters)
    assert runs._regime(run, ("regime",), None) == (regime, seed)


def test_regimes_by_expression_and_by_several():
    run = runs.Run("runs/cnn-rotation-s4", "csv", hyperparameters={"model": "cnn", "augmentation": "rotation"})
    assert runs._regime(run, ("model", "augmentation"), None) == ("cnn rotation", 4)
    assert runs._regime(run, (), runs._compiled(r"cnn-(\w+)")) == ("rotation", 4)
    assert runs._regime(run, (), runs._compiled(r"(?P<seed>\d)$")) == ("4", 4)
    assert runs._regime(run, (), runs._compiled(r"(?P<x>c)nn-(?P<regime>\w+)-s(?P<seed>\d)")) == ("rotation", 4)
    with pytest.raises(ValueError, match="`regex` must match the path of every run"):
        runs._regime(run, (), runs._compiled("(vit)"))
    for bad, match in (("(", "must be a regular expression"), ("cnn", "must have a group")):
        with pytest.raises(ValueError, match=match):
            runs.read("anywhere", regex=bad)


def test_hyperparameters_of_any_kind(tmp_path):
    (tmp_path / "hparams.yaml").write_text(
        "seed: 3\nmodel:\n  name: cnn\nthing: !!python/object:some.Class\n  a: 1\nregime: null\n"
    )
    assert run_files._yaml(tmp_path / "hparams.yaml")["model/name"] == "cnn"
    assert run_files._yaml(tmp_path / "hparams.yaml")["seed"] == 3
    (tmp_path / "hparams.yaml").write_text("a: [1\nb")
    assert run_files._yaml(tmp_path / "hparams.yaml") == {}
    assert run_files._yaml(tmp_path / "none.yaml") == {}


def written(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


VALUES = {("none", 0): 2.0, ("none", 1): 2.2, ("rotation", 0): 1.0, ("rotation", 1): 1.3}


@pytest.mark.parametrize("layout", ["wandb chart", "wandb history", "mlflow wide", "mlflow long", "long"])
def test_exports(tmp_path, layout):
    """The same four runs in the layouts of the services."""
    path, by, regex = tmp_path / "export.csv", "regime", None
    names = {key: f"{key[0]}-s{key[1]}" for key in VALUES}
    if layout == "wandb chart":
        row = {"trainer/global_step": 9}
        for key, value in VALUES.items():
            row |= {f"{names[key]} - equivariance/rotation{end}": value for end in ("", "__MIN", "__MAX")}
        written(path, [row])
    elif layout == "wandb history":
        for key, value in VALUES.items():
            row = {
                "_step": 9,
                "epoch": 1,
                "equivariance/rotation": value,
                "equivariance_se/rotation": 0.1,
                "val_loss": 3,
            }
            written(tmp_path / f"{names[key]}.csv", [row])
    elif layout == "mlflow wide":
        rows = [
            {"run_id": hash(key), "tags.mlflow.runName": "a" * (k + 1), "metrics.equivariance/rotation": value,
             "metrics.equivariance_se/rotation": 0.1, "params.regime": key[0], "params.seed": key[1]}
            for k, (key, value) in enumerate(VALUES.items())
        ]  # fmt: skip
        written(path, rows)
    else:
        run, key_name = ("Run ID", "key") if layout == "mlflow long" else ("run", "metric")
        rows = [
            {run: names[key], key_name: f"equivariance{end}/rotation", "value": number, "step": 9}
            for key, value in VALUES.items()
            for end, number in (("", value), ("_se", 0.1))
        ]
        written(path, rows)
    paths = [path] if path.exists() else sorted(tmp_path.glob("*.csv"))
    if layout == "wandb history":
        with pytest.warns(UserWarning, match="Not understood in .*val_loss"):
            frame = lm.read_runs(paths, by, regex=regex)
    else:
        frame = lm.read_runs(paths, by, regex=regex)
    found = {(row.regime, int(row.seed)): row.value for row in frame.itertuples()}
    assert found == VALUES
    assert set(frame.generator) == {"rotation"}
    errors = frame.standard_error.tolist()
    assert all(map(math.isnan, errors)) if layout == "wandb chart" else errors == [0.1] * 4


class TestRefused:
    def test_paths(self, tmp_path):
        with pytest.raises(ValueError, match=r"got '.*missing', which does not exist. Give what the logger writes to"):
            runs.read(tmp_path / "missing")
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(ValueError, match="is no file of a run"):
            runs.read(tmp_path / "notes.txt")
        with pytest.raises(
            ValueError, match=r"keys such as 'equivariance/rotation', got none in .*EquivarianceMonitor"
        ):
            runs.read(tmp_path)

    def test_tables(self, tmp_path):
        with pytest.raises(ValueError, match=r"got the columns \['step', 'loss'\]"):
            runs.read(written(tmp_path / "x.csv", [{"step": 1, "loss": 2}]))
        (tmp_path / "empty.csv").write_text("a,b\n")
        with pytest.raises(ValueError, match="must hold tables with rows"):
            runs.read(tmp_path / "empty.csv")

    def test_versions_and_strangers(self, tmp_path):
        append(tmp_path / "later" / "equivariance.jsonl", [], {"version": 2})
        with pytest.raises(ValueError, match=r"version 1 or lower, got version 2 .* Upgrade lie_metric"):
            runs.read(tmp_path / "later")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "train.jsonl").write_text('{"loss": 1}\nnot json\n')
        with pytest.raises(ValueError, match="got none in"):
            runs.read(tmp_path / "other")

    def test_extras_are_named(self, trained, monkeypatch, tmp_path):
        import sys

        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lie_metric\[examples\]'"):
            lm.read_runs(trained)
        assert len(runs.read(trained / "csv")) == 4
        folder = stripped(trained / "board", tmp_path / "events", keep=("tfevents",))
        monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
        with pytest.raises(ModuleNotFoundError, match="TensorBoard's files need tensorboard"):
            runs.read(folder)


class TestRegimes:
    def test_two_regimes_and_two_seeds(self, trained, tmp_path, capsys):
        assert main(["compare", str(trained / "board"), "--baseline", "plain", "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        assert "2 trainings, paired" in printed
        assert "Errors over trainings" in printed
        found = compare_runs([trained / "board"])
        assert found.baseline == "plain" or found.baseline == "flipped"
        rows = {(row.regime, row.generator): row for row in compare_runs([trained / "board"], baseline="plain").rows}
        sides = [[lm.read_record(trained / "board" / r / f"seed_{s}") for s in (0, 1)] for r in ("flipped", "plain")]
        wanted = lm.compare(*sides)
        for name in ("rotation", "scale"):
            row, one = rows["flipped", name], wanted[name]
            assert row.compared.ratio == pytest.approx(one.ratio)
            assert (row.compared.low, row.compared.high, row.compared.p) == pytest.approx((one.low, one.high, one.p))
            assert row.compared.p_holm == pytest.approx(one.p_holm)
            assert row.value == pytest.approx(one.a)
            assert rows["plain", name].compared is None
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "comparison.html", "comparison.txt", "equivariance.png"
        }  # fmt: skip
        page = (tmp_path / "out" / "comparison.html").read_text()
        assert not any(word in page for word in ("http://cdn", "https://", "src=", "@DATA@"))
        data = json.loads(page.split('id="data">')[1].split("</script>")[0])
        assert set(data["runs"]) == {"plain", "flipped"}
        assert len(data["rows"]) == 4
        assert data["labels"] == {"equivariance": "relative error"}

    def test_one_training_each_is_paired_over_images(self, trained):
        folders = [trained / "board" / regime / "seed_0" for regime in ("plain", "flipped")]
        found = compare_runs(folders, baseline="plain", measures=("relative", "lee"))
        wanted = lm.compare(lm.read_record(folders[1]), lm.read_record(folders[0]))
        row = next(
            row for row in found.rows if (row.key, row.regime, row.generator) == ("equivariance", "flipped", "scale")
        )
        assert row.over == "images, paired"
        assert row.compared.p == pytest.approx(wanted["scale"].p)
        assert row.compared.over_images == pytest.approx(wanted["scale"].over_images)
        assert any("do not cover the spread between trainings" in note for note in found.notes)
        assert {row.key for row in found.rows} == {"equivariance", "equivariance_lee"}

    def test_without_replicates_errors_are_not_paired(self, trained):
        folders = [trained / "csv" / regime / "seed_0" for regime in ("plain", "flipped")]
        found = compare_runs(folders, baseline="plain")
        row = next(row for row in found.rows if row.regime == "flipped")
        assert row.over == "images, not paired"
        assert any("whether images, sizes and stencils are the same cannot be told" in note for note in found.notes)

    def test_welch_without_common_seeds(self, tmp_path):
        from scipy import stats

        values = {"none": (2.0, 2.2, 1.9), "rotation": (1.0, 1.3)}
        rows = [
            {
                "run": f"{regime}-s{k + 10 * (regime == 'none')}",
                "metric": "equivariance/rotation",
                "value": value,
                "step": 1,
            }
            for regime, of in values.items()
            for k, value in enumerate(of)
        ]
        (row,) = [r for r in compare_runs([written(tmp_path / "x.csv", rows)]).rows if r.compared]
        logs = [[math.log(value) for value in values[name]] for name in ("rotation", "none")]
        assert row.over == "2 and 3 trainings"
        assert row.compared.p == pytest.approx(stats.ttest_ind(*logs, equal_var=False).pvalue)

    def changed(self, trained, tmp_path, change):
        """Two runs, of which the second has something else in its file."""
        shutil.copytree(trained / "board", tmp_path / "board")
        for seed in (0, 1):
            file = tmp_path / "board" / "flipped" / f"seed_{seed}" / "equivariance.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for line in lines[1:]:
                for entry in line["records"]:
                    change(entry)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return compare_runs([tmp_path / "board"], baseline="plain")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda e: e.update(input_shape=[1, 16, 16]), r"Attention, other size of images .*\(1, 8, 8\).*pixels"),
            (lambda e: e["settings"].update(resampling="bilinear"), "Attention, other stencil .*bilinear"),
            (lambda e: e.update(units=["pixel", "pixel"]), "Attention, other units"),
        ],
    )
    def test_what_makes_no_comparison_is_said(self, trained, tmp_path, change, match):
        found = self.changed(trained, tmp_path, change)
        assert any(__import__("re").search(match, note) for note in found.notes), found.notes
        assert {row.compared.verdict for row in found.rows if row.compared} == {"not comparable"}

    def test_other_images_are_said_and_not_paired(self, trained, tmp_path):
        found = self.changed(trained, tmp_path, lambda e: e.update(fingerprint="0"))
        assert any(note.startswith("Attention, other images") for note in found.notes)
        assert {row.over for row in found.rows if row.compared} == {"2 trainings, paired"}
        folders = [tmp_path / "board" / regime / "seed_0" for regime in ("plain", "flipped")]
        assert {r.over for r in compare_runs(folders, baseline="plain").rows if r.compared} == {"images, not paired"}

    def test_zero_is_no_ratio(self, tmp_path):
        rows = [
            {"run": f"{r}-s0", "metric": "equivariance/rotation", "value": v, "step": 1}
            for r, v in (("a", 0), ("b", 1))
        ]
        found = compare_runs([written(tmp_path / "x.csv", rows)])
        assert any("is zero, NaN or missing: no ratio" in note for note in found.notes)
        assert [row.compared.verdict for row in found.rows if row.compared] == ["undefined"]
        write_comparison(tmp_path / "out", found, pictures=False)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["missing"], "`paths` must be folders of runs"),
            (["{board}/plain"], "at least two regimes, got 2 runs of \\['plain'\\] by regime"),
            (["{board}", "--by", "seed"], "got 2 of '0' with seed 0"),
            (["{board}", "--baseline", "nothing"], r"`baseline` must be one of \['flipped', 'plain'\], got 'nothing'"),
            (
                ["{board}", "--measure", "loss"],
                r"`measure` must be one of \['relative', 'equivariance_lee'\], got 'loss'",
            ),
            (["{board}", "--by-regex", "("], "`regex` must be a regular expression"),
            (["{board}", "--by-regex", "(x9)"], "`regex` must match the path of every run"),
            (["{board}", "--level", "95"], "`level` must be between 0 and 1"),
            (["{board}", "--loader", "4"], "`loader` must be the number of a validation loader"),
            (["{board}", "--out", "{board}/plain/seed_0/hparams.yaml"], "`out` must be a folder that can be written"),
        ],
    )
    def test_bad_arguments_say_what_to_do(self, trained, capsys, options, match):
        assert main(["compare", *(text.replace("{board}", str(trained / "board")) for text in options)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert __import__("re").search(match, error), error
