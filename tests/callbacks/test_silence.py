"""Logged values and metrics of the module are those of a run without monitors."""

import contextlib

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.aggregation import CatMetric

import lie_metric as lm
from lie_metric.callbacks.silence import silence

OURS = ("equivariance", "layerwise")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Steps(Metric):
    """Counts in place, and in a tensor that `torchmetrics` knows nothing of."""

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.own = torch.zeros(())

    def update(self, values):
        self.count += len(values)
        self.own += 1
        self.rows.append(values.detach().mean(1))

    def compute(self):
        return self.count + 100 * self.own


class Inner(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.mean = MeanMetric()

    def forward(self, x):
        scores = self.net(x)
        self.mean.update(scores.detach())
        return scores


class Module(LightningModule):
    """Logs and counts in `forward`, in every way there is."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.steps = Steps()
        self.collection = MetricCollection({"a": MeanMetric(), "b": SumMetric()})
        self.unregistered = [MeanMetric(), {"deep": CatMetric()}]
        self.found = []

    def forward(self, x):
        scores = self.inner(x)
        seen = scores.detach()
        self.log("logged", seen.square().mean())
        self.log_dict({"one": seen.max(), "two": seen.min()})
        self.steps(seen)
        self.collection.update(seen)
        self.unregistered[0].update(seen)
        self.unregistered[1]["deep"].update(seen.sum())
        if self.loggers:
            self.logger.log_metrics({"direct": float(seen.mean())}, step=self.global_step)
        return scores

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.log("val_steps", self.steps)

    def on_validation_epoch_end(self):
        metrics = [self.steps, self.inner.mean, self.unregistered[0], self.unregistered[1]["deep"]]
        self.found += [metric.compute().tolist() for metric in metrics] + [metric._update_count for metric in metrics]
        self.found += [len(self.steps.rows)] + [value.item() for value in self.collection.compute().values()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(tmp_path, name, callbacks):
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)
    logger = CSVLogger(tmp_path, name=name, version=0)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    lines = [dict(row) for row in logger.experiment.metrics]
    own = [{k: v for k, v in row.items() if not k.startswith(OURS)} for row in lines]
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if not name.startswith(OURS)}
    return module, own, values, trainer


def test_logged_values_and_metrics_are_untouched(tmp_path):
    monitors = [lm.EquivarianceMonitor("rotation", baseline=False), lm.LayerwiseMonitor("rotation", probes=1)]
    (module, own, values, trainer), (without, own_without, values_without, _) = (
        run(tmp_path, name, callbacks) for name, callbacks in (("with", monitors), ("without", []))
    )
    assert module.found == without.found
    assert module.found[0] > 0
    assert values == values_without
    assert {"logged", "one", "two", "val_loss", "val_steps"} <= set(values)
    assert [{k: v for k, v in row.items() if v == v} for row in own] == own_without
    assert trainer.callback_metrics["equivariance/rotation"].isfinite()
    assert any(key.startswith("layerwise_rotation/") for key in trainer.callback_metrics)
    assert trainer.loggers
    for part in module.modules():
        assert "log" not in vars(part)
        assert "forward" not in vars(part) or isinstance(part, Metric)
    assert "forward" not in vars(module.steps)


@pytest.mark.parametrize("inference", [False, True])
def test_everything_is_back_after_an_exception(inference):
    class Fake:
        loggers = ()

    with torch.inference_mode(inference):
        module = Module()
        module.steps.update(torch.ones(2, 3))
        module.collection.update(torch.ones(2, 3))
        before = module.steps.compute(), module.collection.compute()
        held = [dict(vars(metric)) for metric in module.modules() if isinstance(metric, Metric)]
        with contextlib.suppress(KeyboardInterrupt), silence(Fake(), module):
            module.log("anything", 1.0)
            module.inner.log_dict({})
            module.steps(torch.ones(5, 3))
            module.collection(torch.ones(5, 3) * 3)
            assert module.steps.count == 7
            raise KeyboardInterrupt
        after = [vars(metric) for metric in module.modules() if isinstance(metric, Metric)]
        for one, other in zip(held, after, strict=True):
            assert one.keys() == other.keys()
            assert all(one[name] is other[name] for name in one)
        module.steps._computed = None
        assert module.steps.compute() == before[0]
        assert module.collection.compute() == before[1]


def test_a_metric_that_forward_uses_keeps_its_value():
    class Uses(LightningModule):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def forward(self, x):
            return x.sum((2, 3)) / self.mean(torch.tensor([1.0, 3.0]))

    class Fake:
        loggers = ()

    module = Uses()
    x = torch.ones(1, 1, 2, 2)
    with silence(Fake(), module):
        assert module(x).item() == 2.0
        module.mean.update(5.0)
    assert module.mean._update_count == 0
