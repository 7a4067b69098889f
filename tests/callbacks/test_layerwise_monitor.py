"""Attribution while training: what is logged, that training is the same, and what happens on errors."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.functional.sums import standard_error, totals
from lie_metric.layerwise import attributed, share


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.head = nn.Linear(144, 3)
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise RuntimeError("planted")
        return self.head(self.features(x).flatten(1))

    def step(self, batch):
        return nn.functional.cross_entropy(self.head(self.features(batch[0]).flatten(1)), batch[1])

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def loaders():
    source = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 1, 8, 8, generator=source), torch.randint(0, 3, (24,), generator=source))
    return DataLoader(data, 8, shuffle=True), DataLoader(data, 8)


def fit(callbacks, epochs=2, module=None, logger=False, **options):
    seed_everything(1, verbose=False)
    module = module or Module()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, *loaders())
    return trainer, module


@pytest.mark.parametrize("probes", [None, 3])
def test_logs_the_report_of_the_first_images(probes):
    trainer, module = fit([lm.LayerwiseMonitor("rotation", num_images=5, probes=probes)])
    x = torch.cat([batch[0] for batch in loaders()[1]])[:5]
    with pytest.warns(UserWarning, match="Shares of 5 images scatter"):
        report = lm.layerwise_equivariance_error(module, x, "rotation", probes=probes)
    logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("layerwise_")}
    wanted = {}
    for row in report.by("type"):
        wanted[f"layerwise_rotation/{row.name}"] = row.share
        wanted[f"layerwise_rotation_se/{row.name}"] = row.share_standard_error
        if probes:
            wanted[f"layerwise_rotation_squared_norm/{row.name}"] = row.squared_norm
    assert logged == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    kinds = {key.split("/")[1] for key in logged if key.startswith("layerwise_rotation/")}
    assert {"convolution", "activation", "head"} <= kinds
    assert sum(logged[f"layerwise_rotation/{kind}"] for kind in kinds) == pytest.approx(1, abs=1e-5)


def test_shares_are_pooled_over_processes():
    """Two halves of the images, added up as two processes do it, have the shares and errors of the whole."""
    torch.manual_seed(0)
    module, x = Module().double(), torch.randn(8, 1, 8, 8, dtype=torch.float64)
    (_, whole), (_, first), (_, second) = (
        attributed(module, images, "rotation").sums("type", start) for images, start in ((x, 0), (x[:5], 0), (x[5:], 5))
    )
    both = {name: first[name] + second[name] for name in first}
    torch.testing.assert_close(share(totals(both)), share(totals(whole)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(standard_error(both, share), standard_error(whole, share), rtol=1e-9, atol=1e-12)


def test_training_is_not_changed():
    with_monitor, without = (fit(callbacks)[1] for callbacks in ([lm.LayerwiseMonitor()], []))
    states = with_monitor.state_dict(), without.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_pictures_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path, default_hp_metric=False)
    fit([lm.LayerwiseMonitor("rotation", every_n_epochs=2)], epochs=4, logger=[board, CSVLogger(tmp_path)])
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    assert len(events.Images("layerwise/attribution")) == 2
    assert len(events.Images("layerwise/modules_rotation")) == 2
    steps = [event.step for event in events.Scalars("layerwise_rotation/convolution")]
    assert [event.step for event in events.Images("layerwise/attribution")] == steps == [5, 11]


def test_a_failure_is_nan_and_a_warning_or_raised():
    class FailsLater(lm.LayerwiseMonitor):
        def on_validation_epoch_start(self, trainer, pl_module):
            pl_module.fails = trainer.current_epoch == 1

    with pytest.warns(UserWarning, match="could not be attributed.*planted"):
        trainer, module = fit([FailsLater("rotation")])
    assert trainer.callback_metrics["layerwise_rotation/convolution"].isnan()
    assert not any(m._forward_hooks for m in module.modules())
    with pytest.raises(RuntimeError, match="planted"):
        fit([FailsLater("rotation", on_error="raise")])


def test_history_goes_on_after_a_resume():
    monitor = lm.LayerwiseMonitor("rotation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([monitor])
    other = lm.LayerwiseMonitor("rotation")
    other.load_state_dict(monitor.state_dict())
    assert list(other._history["rotation"]) == [0, 1]
    assert set(other._history["rotation"][1]) >= {"features.0", "head"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_images": 0}, "`num_images` must be an integer of at least 1"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be"),
        ({"probes": 0}, "`probes` must be"),
        ({"depth": -1}, "`depth` must be an integer of at least 0"),
        ({"on_error": "stop"}, "`on_error` must be"),
        ({"generators": "turn"}, "got 'turn'"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        lm.LayerwiseMonitor(**arguments)
