"""One training in four loops: of Lightning, of transformers, of accelerate on two processes, and written by hand.

They see the same batches and have the same weights at each point, so everything that is measured must be the same:
what the files keep of float64 sums, of the untrained model and after each epoch.
"""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lie_metric as lm
from lie_metric import runs

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

COUNT, EPOCHS, BATCH = 24, 4, 8
SOURCE = torch.Generator().manual_seed(0)
TRAINING, IMAGES = (torch.randn(COUNT, 1, 8, 8, generator=SOURCE) for _ in range(2))
GENERATORS = ("translation", "rotation", "scale")


def options():
    return {
        "measures": ("relative", "lee", "sensitivity", "rms"),
        "metrics": [lm.PredictionConsistency(), lm.OrbitVariance()],
        "seed": 3,
        "on_error": "raise",
    }


class Set(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": index % 3}


def loader(images, batch_size=BATCH):
    return DataLoader(Set(images), batch_size)


def vit():
    """Normalised layers, whose weights are far from those of an untrained one, which hardly responds."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    return model


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def recorder_of(folder, **changes):
    return lm.Recorder(IMAGES, GENERATORS, batch_size=BATCH, folder=folder, **{**options(), **changes})


class Module(LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.net, self.folder = vit(), folder

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return self.net(**batch).loss

    def validation_step(self, batch, _):
        pass

    def on_train_epoch_end(self):
        torch.save(self.net.state_dict(), self.folder / f"{self.current_epoch + 1}.pt")

    def configure_optimizers(self):
        return optimizer_of(self.net)


@pytest.fixture(scope="module")
def lightning(tmp_path_factory):
    """The folder in which the monitor has kept its records, and beside them the weights after each epoch."""
    folder = tmp_path_factory.mktemp("lightning")
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[lm.EquivarianceMonitor(GENERATORS, COUNT, **options())],
        logger=CSVLogger(folder), enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(folder), loader(TRAINING), loader(IMAGES))
    return folder


def assert_same(folder, other, rtol=1e-6):
    """That two runs have the same points, and that of each everything that is kept of it is the same."""
    one, two = (runs.read(path)[0] for path in (folder, other))
    assert two.records.keys() == one.records.keys() == {(key, 0) for key in KEYS}
    for where, points in one.records.items():
        others = two.records[where]
        assert [epoch for epoch, _ in others] == [epoch for epoch, _ in points]
        for (_, wanted), (_, found) in zip(points, others, strict=True):
            assert found.fingerprint == wanted.fingerprint
            assert (found.names, found.settings, found.images) == (wanted.names, wanted.settings, COUNT)
            for name in ("value", "left_out"):
                pair = (getattr(record.replicates, name) for record in (found, wanted))
                torch.testing.assert_close(*pair, rtol=rtol, atol=0, msg=lambda text, at=where: f"{at}: {text}")
            assert found.spread == pytest.approx(wanted.spread, rel=rtol, nan_ok=True)
    epochs = [epoch for epoch, _ in one.records["equivariance_floor", 0]]
    assert epochs == [0, 1, 2, 4]
    assert [epoch for epoch, _ in one.records["equivariance", 0]] == list(range(EPOCHS + 1))


def assert_equal(model, folder):
    """That training ended with the same weights, bit for bit."""
    wanted = torch.load(folder / f"{EPOCHS}.pt")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


KEYS = {
    f"equivariance{kind}"
    for kind in ("", "_lee", "_sensitivity", "_rms", "_finite", "_floor", "_prediction_consistency", "_orbit_variance")
}


def by_hand(folder, change=lambda model: model):
    recorder, model = recorder_of(folder), vit()
    optimizer, step = optimizer_of(model), 0
    run = change(model)
    recorder.measure(run, step)
    for _ in range(EPOCHS):
        for batch in loader(TRAINING):
            optimizer.zero_grad()
            run(**batch).loss.backward()
            optimizer.step()
            step += 1
        recorder.measure(run, step)
    return recorder, model


def test_a_loop_by_hand(lightning, tmp_path):
    recorder, model = by_hand(tmp_path)
    assert_same(lightning, tmp_path)
    assert_equal(model, lightning)
    # Linearity, a ratio of two metrics, has no record: it is compared as it is logged.
    with next(lightning.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["equivariance_linearity/rotation"] not in {"", "nan"}]
    # The baseline, and as Lightning counts: the last step before.
    assert [int(row["step"]) for row in rows] == [0, *(epoch * COUNT // BATCH - 1 for epoch in (1, 2, 4))]
    entries = [entry for entry in recorder.history if "equivariance_linearity/rotation" in entry]
    for row, entry in zip(rows, entries, strict=True):
        for name in ("translation_x", "translation_y", "rotation", "scale"):
            for key in (f"equivariance_linearity/{name}", f"equivariance_linearity_se/{name}"):
                assert entry[key] == pytest.approx(float(row[key]), rel=1e-6)


def test_the_trainer_of_transformers(lightning, tmp_path):
    from lie_metric.callbacks.transformers import watch

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self):
            return loader(TRAINING)

    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=EPOCHS, eval_strategy="epoch", report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    model = vit()
    trainer = InOrder(model, arguments, eval_dataset=Set(IMAGES), optimizers=(optimizer_of(model), None))
    recorder = recorder_of(tmp_path / "record")
    watch(trainer, recorder)
    trainer.train()
    assert_same(lightning, tmp_path / "record")
    assert_equal(model, lightning)
    told = [entry for entry in trainer.state.log_history if "equivariance/rotation" in entry]
    assert [entry["step"] for entry in told] == [COUNT // BATCH * epoch for epoch in range(EPOCHS + 1)]


LAUNCHED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_loops
test_loops.under_accelerate(*sys.argv[2:])
"""


def under_accelerate(folder, weights, precision, compiled):
    """Runs on each of the processes.

    Gradients of two halves of a batch agree with those of one process to rounding, which training makes larger: each
    epoch ends with the weights of the one process.
    """
    from accelerate import Accelerator, DataLoaderConfiguration

    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, dataloader_config=DataLoaderConfiguration(split_batches=True),
        dynamo_backend="aot_eager" if compiled == "compiled" else None,
    )  # fmt: skip
    assert accelerator.num_processes == 2
    recorder, inside = recorder_of(folder), vit()
    model, optimizer, batches = accelerator.prepare(inside, optimizer_of(inside), loader(TRAINING))
    recorder.measure(model, step=0)
    for epoch in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
        kept = torch.load(f"{weights}/{epoch + 1}.pt")
        near = 1e-3 if precision == "no" else 0.1
        for name, value in inside.state_dict().items():
            torch.testing.assert_close(value, kept[name], rtol=near, atol=near)
        inside.load_state_dict(kept)
        recorder.measure(model, step=(epoch + 1) * COUNT // BATCH)
    assert isinstance(model, nn.parallel.DistributedDataParallel) == (compiled == "eager")
    dealt = lm.Recorder.of_loader(accelerator.prepare(loader(IMAGES)), "rotation", num_images=8)
    with pytest.raises(ValueError, match="`inputs` must be the same samples on every process"):
        dealt.measure(model, step=0)
    accelerator.end_training()


def launched(folder, code, *arguments):
    """What a script prints on two processes, which meet at a port that the launcher is given by the system."""
    script = folder / "launched.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "compiled"), [("no", "eager"), ("bf16", "compiled")])
def test_accelerate_on_two_processes(lightning, tmp_path, precision, compiled):
    """Whatever the precision of training is, what is measured is the model in float32."""
    record = tmp_path / "record"
    launched(tmp_path, LAUNCHED, str(Path(__file__).parent), str(record), str(lightning), precision, compiled)
    assert_same(lightning, record)


@pytest.mark.slow
def test_the_lines_for_accelerate_run_as_they_stand(tmp_path):
    guide = (Path(__file__).parents[1] / "examples" / "README.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in guide.split("```python\n")[1:] if "Accelerator(" in block]
    printed = launched(tmp_path, code)
    assert [line.split()[0] for line in printed.splitlines()] == ["0", "1"]
    found = lm.read_runs(tmp_path)
    last = found[(found["key"] == "equivariance") & (found["generator"] == "rotation") & (found["epoch"] == 2)]
    assert float(last["value"].item()) == pytest.approx(float(printed.split()[-1]), rel=1e-6)
