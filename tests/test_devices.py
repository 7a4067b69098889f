"""On an accelerator: the values of the processor, training unchanged bit for bit, what is kept stays on the device.

The same is run on the processor, so that what is tested here is known to run where there is no accelerator.
"""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(),
        nn.AvgPool2d(3), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 3),
    )  # fmt: skip


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trained(device, callbacks, precision):
    """Losses, weights and the monitors' values of a run with kernels that always do the same."""
    seed_everything(0)
    module = Classifier()
    trainer = Trainer(
        max_epochs=2, accelerator=device, devices=1, precision=precision, deterministic=True, benchmark=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4)
    try:
        trainer.fit(module, loader, loader)
    finally:
        torch.use_deterministic_algorithms(False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "val_loss"}
    return module.losses, {name: value.cpu() for name, value in module.state_dict().items()}, values


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_unchanged_bit_for_bit(device, precision, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monitors = [lm.EquivarianceMonitor(num_images=8, on_error="raise"), lm.LayerwiseMonitor(num_images=4)]
    losses, weights, values = trained(device, monitors, precision)
    without, others, _ = trained(device, [], precision)
    assert losses == without
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert values["equivariance/rotation"] > 0
    assert values["layerwise_rotation/convolution"] == values["layerwise_rotation/convolution"]


METRICS = {
    "local": lambda: lm.LocalEquivarianceError("affine"),
    "finite": lambda: lm.FiniteEquivarianceError(lm.orbits.displaced("rotation", (2.0,))),
    "stencil": lambda: lm.StencilError("rotation"),
    "orbits": lambda: lm.OrbitVariance(),
    "lattice": lambda: lm.LatticeEquivarianceError("flips"),
    "consistency": lambda: lm.PredictionConsistency(),
    "stability": lambda: lm.RelativeStability(),
    "relaxed": lambda: lm.RelaxedEquivarianceError(),
    "bands": lambda: lm.BandLimitedEquivariance(),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_have_the_values_of_the_processor(device, name):
    values = []
    for place in ("cpu", device):
        model, metric = network().eval().to(place), METRICS[name]().to(place)
        with torch.no_grad():
            metric.update(model, IMAGES[:6].to(place))
        found = metric.compute()
        found = found if isinstance(found, dict) else {"": found}
        values.append({key: float(value) for key, value in found.items() if torch.as_tensor(value).ndim == 0})
        sums = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
        assert all(value.device.type == place for value in sums)
    assert values[0]
    assert values[1] == pytest.approx(values[0], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("method", ["forward", "reverse", "double_backward", "difference"])
def test_methods_agree_with_the_processor(device, method):
    model = network().eval()
    with torch.no_grad():
        expected = lm.lie_derivative(copy.deepcopy(model).double(), IMAGES[:3].double(), "affine")
        found = lm.lie_derivative(model.to(device), IMAGES[:3].to(device), "affine", method=method)
    for name, value in found.items():
        assert value.device.type == device
        assert float((value.cpu() - expected[name]).norm() / expected[name].norm()) < 1e-3


def test_recorders_and_layers(device):
    model = network().eval().to(device)
    recorder = lm.Recorder(IMAGES, ("rotation", "scale"), on_error="raise")
    found = recorder.measure(model, step=0)
    expected = lm.Recorder(IMAGES, ("rotation", "scale"), on_error="raise").measure(network().eval(), step=0)
    assert found == pytest.approx(expected, rel=1e-3)
    report = lm.layerwise_equivariance_error(model, IMAGES[:4].to(device), "rotation")
    shares = {row.name: row.share for row in report.by("type")}
    whole = lm.layerwise_equivariance_error(network().eval(), IMAGES[:4], "rotation")
    assert shares == pytest.approx({row.name: row.share for row in whole.by("type")}, abs=1e-3)


@pytest.mark.gpu
@NO_CUDA
def test_updates_wait_for_the_device_only_to_check():
    """Once the first update has checked the model, further ones wait as often for one image as for many."""
    model, waits = network().eval().cuda(), []
    for count in (4, 12):
        metric = lm.LocalEquivarianceError("affine").cuda()
        images = IMAGES[:count].cuda()
        with torch.no_grad():
            metric.update(model, images)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    metric.update(model, images)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(each.message) for each in caught))
    assert waits[0] == waits[1]
