"""The package `pytorch_lightning` has Trainer, modules and loggers of its own."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))

    def forward(self, x):
        scores = self.net(x)
        self.log("seen", float(len(x)))
        return scores

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def fitted(tmp_path):
    pytest.importorskip("tensorboard")
    from pytorch_lightning.loggers import TensorBoardLogger

    data = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3), 4)
    monitors = [lm.EquivarianceMonitor("rotation", 4), lm.LayerwiseMonitor("rotation", probes=1)]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=monitors, logger=TensorBoardLogger(tmp_path),
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), data, data)
    return trainer


def test_curves_charts_hyperparameters_and_pictures_are_written(fitted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    events = EventAccumulator(fitted.logger.log_dir, {"scalars": 0, "tensors": 0, "images": 0}).Reload()
    assert [event.step for event in events.Scalars("equivariance/rotation")] == [0, 1, 3]
    assert events.Tensors("custom_scalars__config__")
    start = metadata.parse_session_start_info_plugin_data(
        events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    assert start.hparams["equivariance_num_images"].number_value == 4
    steps = [event.step for event in events.Scalars("layerwise_rotation/convolution")]
    assert [event.step for event in events.Images("layerwise/attribution")] == steps == [1, 3]


def test_its_logged_values_are_untouched(fitted):
    assert fitted.callback_metrics["seen"] == 4.0  # two images would have been seen in the rehearsal


def test_its_deepspeed_is_refused():
    from pytorch_lightning.strategies import DeepSpeedStrategy

    class Fake:
        strategy = object.__new__(DeepSpeedStrategy)

    with pytest.raises(Exception, match="must have weights that it can gather"):
        lm.EquivarianceMonitor().setup(Fake(), None, "fit")
