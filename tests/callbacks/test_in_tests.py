"""`trainer.test` measures the test loaders where it is asked to."""

import gc
import importlib
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.callbacks import gathered
from lie_metric.curves import spread

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SOURCE = torch.Generator().manual_seed(0)
VALIDATION, TEST, OTHERS = (torch.randn(count, 1, 8, 8, generator=SOURCE) for count in (8, 12, 6))


def loader(images, batch_size=4):
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 3), batch_size)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    pytest.importorskip(request.param)
    importlib.import_module(f"{request.param}.loggers")
    return importlib.import_module(request.param)


def module_of(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten(), nn.Linear(72, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def trainer_of(package, callbacks, epochs=1, **options):
    return package.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, **{"logger": False, **options},
    )  # fmt: skip


def of(module, images, batch_size=4):
    metric = lm.LocalEquivarianceError("rotation")
    for part in images.split(batch_size):
        metric.update(module, part)
    return metric.compute()["rotation"].item()


def test_after_training_and_alone(package, tmp_path):
    csv = package.loggers.CSVLogger(tmp_path)
    monitors = [
        lm.EquivarianceMonitor("rotation", on_error="raise", test=True),
        lm.LayerwiseMonitor("rotation", on_error="raise", test=True),
    ]
    module = module_of(package)
    # Five epochs: linearity and floor are left out of the sixth of training, and of no test.
    trainer = trainer_of(package, monitors, epochs=5, logger=csv)
    trainer.fit(module, loader(VALIDATION), loader(VALIDATION))
    kept = (tmp_path / "lightning_logs" / "version_0" / "equivariance.jsonl").read_bytes()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    shown = monitors[1].state_dict()["history"]["rotation"].copy()
    (found,) = trainer.test(module, loader(TEST), verbose=False)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())
    wanted = of(module, TEST)
    assert found["test_equivariance/rotation"] == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(of(module, VALIDATION), rel=1e-3)
    kinds = ("", "_lee", "_finite", "_linearity", "_floor")
    families = {f"test_{name}{end}" for name in ("layerwise_rotation", *map("equivariance{}".format, kinds))
                for end in ("", "_se")}  # fmt: skip
    assert {key.split("/")[0] for key in found} == families | {"test_loss"}
    assert all(value == value for value in found.values())
    shares = [value for key, value in found.items() if key.startswith("test_layerwise_rotation/")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert monitors[1].state_dict()["history"]["rotation"] == shown
    assert (tmp_path / "lightning_logs" / "version_0" / "equivariance.jsonl").read_bytes() == kept
    assert "test_equivariance/rotation" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    (again,) = trainer_of(package, monitors).test(module, loader(TEST), verbose=False)
    assert again == found


def test_several_loaders_and_a_part_of_them(package):
    module = module_of(package)
    monitor = lm.EquivarianceMonitor("rotation", 6, on_error="raise", test=True)
    (*_, last) = trainer_of(package, [monitor]).test(module, [loader(TEST), loader(OTHERS)], verbose=False)
    key = "test_equivariance/rotation/dataloader_idx_{}".format
    assert last[key(1)] == pytest.approx(of(module, OTHERS), rel=1e-6)
    chosen = spread(6, 12)
    assert last[key(0)] == pytest.approx(of(module, TEST[chosen]), rel=1e-6)


def test_tests_are_measured_before_training_begins_again(package):
    """What a test leaves behind are no tensors of inference mode."""
    module, monitor = module_of(package), lm.EquivarianceMonitor("rotation", on_error="raise", test=True)
    trainer = trainer_of(package, [monitor])
    trainer.test(module, loader(TEST), verbose=False)
    trainer.fit(module, loader(VALIDATION), loader(VALIDATION))
    assert trainer.callback_metrics["equivariance/rotation"].item() == pytest.approx(of(module, VALIDATION), rel=1e-6)
    (found,) = trainer.validate(module, loader(OTHERS), verbose=False)
    assert found["equivariance/rotation"] == pytest.approx(of(module, OTHERS), rel=1e-6)
    assert not any(key.startswith("test_") for key in found)


def test_nothing_is_measured_unasked(package):
    monitors = [lm.EquivarianceMonitor("rotation"), lm.LayerwiseMonitor("rotation")]
    trainer = trainer_of(package, monitors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (found,) = trainer.test(module_of(package), loader(TEST), verbose=False)
    assert set(found) == {"test_loss"}
    told = [str(one.message) for one in caught if "nothing in `trainer.test()`" in str(one.message)]
    assert [text.split("`")[1] for text in told] == ["EquivarianceMonitor", "LayerwiseMonitor"]


def test_a_misuse_shows_and_a_failure_is_nan(package):
    module = module_of(package)
    monitor = lm.EquivarianceMonitor("rotation", images=1, test=True)
    with pytest.raises((TypeError, ValueError), match=r"`EquivarianceMonitor`.*got a tensor of shape \(4,\)"):
        trainer_of(package, [monitor]).test(module, loader(TEST), verbose=False)

    def fails_later(model, images):
        if len(images) > 2:
            raise RuntimeError("planted")
        return model(images)

    monitor = lm.EquivarianceMonitor("rotation", function=fails_later, test=True)
    with pytest.warns(UserWarning, match="could not be measured, it failed with RuntimeError: planted"):
        (found,) = trainer_of(package, [monitor]).test(module, loader(TEST), verbose=False)
    assert found["test_equivariance/rotation"] != found["test_equivariance/rotation"]


def test_keys_of_two_monitors_and_bad_arguments(package):
    monitors = [lm.EquivarianceMonitor(test=True), lm.EquivarianceMonitor(prefix="test_equivariance")]
    with pytest.raises(Exception, match=r"must have keys of its own.*'test_equivariance"):
        trainer_of(package, monitors).test(module_of(package), loader(TEST), verbose=False)
    with pytest.raises(TypeError, match="`test` must be True or False, got 'all'"):
        lm.LayerwiseMonitor(test="all")


def test_deepspeed_is_refused_in_tests_that_are_measured(package):
    strategies = importlib.import_module(f"{package.__name__}.strategies")

    class Fake:
        strategy = object.__new__(strategies.DeepSpeedStrategy)

    with pytest.raises(Exception, match="must have weights that it can gather"):
        lm.EquivarianceMonitor(test=True).setup(Fake(), None, "test")


def test_gathered_weights_are_shared_and_freed(package, monkeypatch):
    """With a stand-in for weights that are dealt out: two monitors hold one copy, while they measure."""
    made = []

    class Whole:
        standing = staticmethod(nullcontext)

    def gather(*_):
        whole = Whole()
        made.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(gathered, "is_sharded", lambda modules: True)
    monkeypatch.setattr(gathered, "gather", gather)
    monitors = [lm.EquivarianceMonitor("rotation", test=True), lm.LayerwiseMonitor("rotation", test=True)]
    trainer, module = trainer_of(package, monitors), module_of(package)
    for run in (trainer.test, trainer.validate):
        made.clear()
        run(module, loader(TEST), verbose=False)
        gc.collect()
        assert [whole() for whole in made] == [None]
    made.clear()
    trainer_of(package, monitors, epochs=2).fit(module, loader(VALIDATION), loader(VALIDATION))
    gc.collect()
    assert [whole() for whole in made] == [None] * 3  # in the sanity check, and in each epoch


def test_weights_that_cannot_be_gathered_are_nan(package, monkeypatch):
    def fails(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(gathered, "is_sharded", lambda modules: True)
    monkeypatch.setattr(gathered, "gather", fails)
    trainer = trainer_of(package, [lm.EquivarianceMonitor("rotation", test=True)])
    with pytest.warns(UserWarning, match="could not be measured.*planted"):
        (found,) = trainer.test(module_of(package), loader(TEST), verbose=False)
    assert found["test_equivariance/rotation"] != found["test_equivariance/rotation"]
