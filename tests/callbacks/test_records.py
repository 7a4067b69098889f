"""What the monitor keeps of a run for comparisons: what the files hold, when there are none, and bad disks."""

import builtins
import json
import pickle
import types
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from processes import one_of_two
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.callbacks.records import directory
from lie_metric.curves.files import append
from lie_metric.metrics import LatticeEquivarianceError, OrbitVariance
from lie_metric.records import Record

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Classifier(LightningModule):
    def __init__(self, seed=0, regime="none", fails_on=-1):
        super().__init__()
        self.save_hyperparameters(ignore="fails_on")
        self.fails_on = fails_on
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x):
        if self.fails_on == self.global_rank and not self.trainer.sanity_checking:
            raise RuntimeError("planted")
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(count=12, size=4):
    return DataLoader(TensorDataset(IMAGES[:count], torch.arange(count) % 3), size)


def fit(logger, monitor=None, *, module=None, val=None, seed=0, callbacks=(), ckpt_path=None, **options):
    seed_everything(seed, verbose=False)
    monitor = monitor or lm.EquivarianceMonitor(("rotation", "scale"), metrics=[OrbitVariance()])
    options = {"max_epochs": 2, "enable_checkpointing": False} | options
    trainer = Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[monitor, *callbacks], **options
    )  # fmt: skip
    trainer.fit(module or Classifier(), loader(), val or loader(), ckpt_path=ckpt_path)
    return trainer


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_each_epoch_is_a_line_beside_the_loggers_files(tmp_path, kind, monkeypatch):
    monitor, seen = lm.EquivarianceMonitor(("rotation", "scale"), displacement=None, metrics=[OrbitVariance()]), []
    kept = types.SimpleNamespace(real=lm.LocalEquivarianceError.records)
    monkeypatch.setattr(
        lm.LocalEquivarianceError, "records", lambda self, m=None: seen.append(self) or kept.real(self, m)
    )
    trainer = fit(kind(tmp_path, "x"), monitor, seed=7)
    header, *found = lines(Path(trainer.log_dir) / "equivariance.jsonl")
    assert header == {"version": 1, "hyperparameters": {"seed": 0, "regime": "none"}, "seed": 7}
    assert [(line["epoch"], line["baseline"], line["step"]) for line in found] == [
        (0, True, 0),
        (0, False, 2),
        (1, False, 5),
    ]
    assert len(seen) == 3
    for line, metric in zip(found, list(seen), strict=True):
        assert line["version"] == 1
        keys = [entry["key"] for entry in line["records"]]
        assert keys == ["equivariance", "equivariance_lee", "equivariance_floor", "equivariance_orbit_variance"]
        first = line["records"][0]
        assert first["names"] == ["rotation", "scale"]
        assert (first["units"], first["loader"], first["suffix"]) == (["radian", "log factor"], 0, "")
        assert (first["measure"], first["metric"]) == ("relative", "LocalEquivarianceError")
        assert first["input_shape"] == [1, 8, 8]
        assert first["settings"]["resampling"] == "bspline, reflection, pixel areas"
        assert first["spread"] == pytest.approx(metric.output_variance().item(), rel=1e-11)
        assert first["fingerprint"] == metric.images_fingerprint()
        record, wanted = Record.from_json(first), metric.record("relative")
        torch.testing.assert_close(record.replicates.value, wanted.replicates.value, rtol=1e-11, atol=0)
        torch.testing.assert_close(record.replicates.left_out, wanted.replicates.left_out, rtol=1e-11, atol=0)
        torch.testing.assert_close(
            record.replicates.standard_error(), torch.stack(list(metric.standard_error().values()))
        )
    values = {f"{e['key']}/{n}": v for e in found[-1]["records"] for n, v in zip(e["names"], e["values"], strict=True)}
    logged = {key: value.item() for key, value in trainer.callback_metrics.items() if "_se/" not in key}
    assert values == pytest.approx(logged, rel=1e-6)
    # 65 numbers for each key, and little else.
    assert Path(trainer.log_dir, "equivariance.jsonl").stat().st_size < 3 * (8 * 65 * 15 + 5000)


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}])
def test_nothing_is_written_where_nothing_is_logged(tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = options.pop("logger", None)
    fit(CSVLogger(tmp_path) if logger is None else logger, **options)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_nothing_is_read_outside_of_fit(tmp_path):
    trainer = fit(CSVLogger(tmp_path))
    file = Path(trainer.log_dir) / "equivariance.jsonl"
    before = file.read_text()
    trainer.validate(Classifier(), loader(), verbose=False)
    assert file.read_text() == before


def test_loaders_prefixes_and_resumed_runs(tmp_path):
    monitors = [
        lm.EquivarianceMonitor("rotation", prefix=name, displacement=None, floor=False, baseline=False)
        for name in ("one", "two")
    ]
    logger = CSVLogger(tmp_path, version="run")
    trainer = fit(logger, monitors[0], callbacks=monitors[1:], val=[loader(), loader(8)], max_epochs=1)
    saved = tmp_path / "last.ckpt"
    trainer.save_checkpoint(saved)
    for name in ("one", "two"):
        (line,) = lines(Path(trainer.log_dir) / f"{name}.jsonl")[1:]
        assert {(e["key"], e["loader"], e["suffix"], sum(e["groups"])) for e in line["records"]} == {
            (f"{name}{end}", k, f"/dataloader_idx_{k}", (12, 8)[k]) for end in ("", "_lee") for k in (0, 1)
        }
    with (Path(trainer.log_dir) / "one.jsonl").open("a") as file:
        file.write('{"version":1,"epo')  # as a process leaves it that is killed
    fit(CSVLogger(tmp_path, version="run"), monitors[0], val=[loader(), loader(8)], max_epochs=2, ckpt_path=saved)
    text = (Path(trainer.log_dir) / "one.jsonl").read_text().splitlines()
    assert len(text) == 4
    assert json.loads(text[3])["epoch"] == 1
    with pytest.warns(UserWarning, match=r"Lines \[3\] of .* are torn"):
        assert lm.read_record(trainer.log_dir, "one", loader=1).images == 8


def test_failing_disks_are_told_of_once_and_training_goes_on(tmp_path, monkeypatch):
    plain = fit(CSVLogger(tmp_path, "plain"))
    real, tried = Path.open, []

    def full(self, *args, **kwargs):
        if self.suffix == ".jsonl":
            tried.append(1)
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(CSVLogger(tmp_path, "full"))
    told = [str(one.message) for one in caught if "cannot be kept" in str(one.message)]
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert len(tried) == 2  # after the baseline and the first epoch, and after the second
    assert not list(tmp_path.rglob("full/**/*.jsonl"))
    for name, value in plain.callback_metrics.items():
        assert trainer.callback_metrics[name] == value
    for one, other in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_metric_that_cannot_be_read_does_not_stop_training(tmp_path, monkeypatch):
    def failing(self, measures=None):
        raise RuntimeError("planted")

    monkeypatch.setattr(OrbitVariance, "records", failing)
    trainer = fit(CSVLogger(tmp_path))
    keys = {e["key"] for line in lines(Path(trainer.log_dir) / "equivariance.jsonl")[1:] for e in line["records"]}
    assert keys == {"equivariance", "equivariance_lee", "equivariance_finite", "equivariance_floor"}
    assert trainer.current_epoch == 2


def test_training_is_unchanged_by_files(tmp_path):
    with_files, without = fit(CSVLogger(tmp_path)), fit(False)
    assert list(tmp_path.rglob("*.jsonl"))
    for one, other in zip(with_files.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_directories_of_loggers(tmp_path):
    def logger(**attributes):
        return types.SimpleNamespace(**attributes)

    assert directory([]) is None
    assert directory([logger(save_dir=None, name="a", version="b"), logger(log_dir=str(tmp_path))]) == tmp_path
    assert directory([logger(save_dir=tmp_path, name="project", version="id3")]) == tmp_path / "project" / "id3"
    assert directory([logger(save_dir=tmp_path, name="project", version=3)]) == tmp_path / "project" / "version_3"
    assert directory([logger(log_dir="s3://bucket/run"), object()]) is None


def test_appending(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    append(path, [{"a": 1}], {"version": 1})
    append(path, [{"a": 2}, {"a": 3}], {"version": 1})
    assert lines(path) == [{"version": 1}, {"a": 1}, {"a": 2}, {"a": 3}]
    with pytest.raises(ValueError, match="JSON compliant"):
        append(path, [{"a": float("nan")}], {})
    assert len(lines(path)) == 4


def _worker(rank, folder):
    with one_of_two(rank, folder):
        _everything(folder, 2)
        metric = lm.LocalEquivarianceError("rotation")
        metric.update(nn.Flatten(), IMAGES[rank::2])
        grouped = LatticeEquivarianceError("flips")
        grouped.update(nn.Flatten(), IMAGES[rank * 5 : 5 + rank * 7], groups=GROUPS[rank * 5 : 5 + rank * 7])
        found = metric.images_fingerprint(), metric.record().to_json(), grouped.images_fingerprint()
        with builtins.open(f"{folder}/{rank}.pickle", "wb") as file:
            pickle.dump(found, file)


GROUPS = [0, 0, 3, 3, 3, 1, 1, 2, 4, 4, 4, 70]


def _everything(folder, world):
    options = {"strategy": "ddp", "devices": 2} if world == 2 else {}
    for name, fails_on in (("fine", -1), ("lame", 1)):
        torch.manual_seed(0)
        metrics = [OrbitVariance(), LatticeEquivarianceError("flips")]
        monitor = lm.EquivarianceMonitor(("rotation", "scale"), num_images=11, metrics=metrics)
        module = Classifier(fails_on=fails_on if world == 2 else 0 if fails_on == 1 else -1)
        fit(CSVLogger(folder, f"{name}{world}", version="run"), monitor, module=module, max_epochs=1, **options)


@pytest.mark.slow
def test_two_processes_keep_what_one_keeps(tmp_path):
    """Fingerprints are the same to the bit, whatever process saw an image; a failure anywhere leaves its metric out."""
    torch.multiprocessing.start_processes(_worker, (str(tmp_path),), 2, start_method="forkserver")
    _everything(tmp_path, 1)
    one, two = (lines(tmp_path / f"fine{world}" / "run" / "equivariance.jsonl") for world in (1, 2))
    assert len(one) == len(two) == 3
    # After training the weights differ: two processes see other batches.
    for mine, theirs in zip(one[1]["records"], two[1]["records"], strict=True):
        a, b = Record.from_json(mine), Record.from_json(theirs)
        assert a.fingerprint == b.fingerprint
        assert a.replicates.images.tolist() == b.replicates.images.tolist()
        torch.testing.assert_close(a.replicates.left_out, b.replicates.left_out, rtol=1e-4, atol=0)
        assert mine["settings"] == theirs["settings"]
        assert lm.compare(a, b).rows[0].ratio == pytest.approx(1, rel=1e-4)
    assert one[2]["records"][0]["fingerprint"] == two[2]["records"][0]["fingerprint"]
    for world in (1, 2):
        path = tmp_path / f"lame{world}" / "run" / "equivariance.jsonl"
        assert not path.exists() or not any("records" in line for line in lines(path))
    (first, record, by_group), (second, other, _) = (
        pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)
    )
    single = lm.LocalEquivarianceError("rotation")
    single.update(nn.Flatten(), IMAGES)
    assert first == second == single.images_fingerprint()
    assert record["fingerprint"] == other["fingerprint"] == first
    together = LatticeEquivarianceError("flips")
    together.update(nn.Flatten(), IMAGES, groups=GROUPS)
    assert by_group == together.images_fingerprint()
