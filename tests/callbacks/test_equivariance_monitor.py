"""The callback in real runs of the Trainer."""

import csv
import dataclasses
import json
import math
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lie_metric as lm
from lie_metric.callbacks import EquivarianceMonitor, weights
from lie_metric.curves import spread
from lie_metric.metrics import LocalEquivarianceError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KEYS = {"", "_se", "_lee", "_lee_se"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Classifier(LightningModule):
    def __init__(self, lr=0.1, wrap="tensor"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 3),
        )

    def forward(self, x):
        scores = self.net(x)
        match self.hparams.wrap:
            case "tensor":
                return scores
            case "tuple":
                return scores, x
            case "dict":
                return {"logits": scores, "features": x}
            case "dataclass":
                return Output(scores)
            case "nested":
                return {"heads": [x, scores]}

    def _loss(self, batch):
        x, y = as_pair(batch)
        scores = self.net(x)
        return nn.functional.cross_entropy(scores, y)

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


def as_pair(batch):
    """Images and labels of any batch of these tests."""
    if isinstance(batch, torch.Tensor):
        return batch, torch.arange(len(batch)) % 3
    if isinstance(batch, dict):
        images = next(v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim == 4)
        return images, torch.arange(len(images)) % 3
    if isinstance(batch[0], dict):
        return as_pair(batch[0])
    images = next(entry for entry in batch if isinstance(entry, torch.Tensor) and entry.ndim == 4)
    return images, torch.arange(len(images)) % 3


IMAGES = torch.randn(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Formatted(Dataset):
    """Images in batches of some form."""

    def __init__(self, form=lambda image: (image, 0), images=IMAGES):
        self.form, self.images = form, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.form(self.images[index])


def loader(form=lambda image: (image, 0), images=IMAGES, batch_size=4):
    return DataLoader(Formatted(form, images), batch_size)


def make_trainer(*callbacks, **options):
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **(settings | options))


def fitted(monitor, module=None, train=None, val=None, **options):
    seed_everything(0)
    trainer = make_trainer(monitor, **options)
    trainer.fit(module or Classifier(), train or loader(), loader() if val is None else val)
    return trainer


def chosen(count, images=IMAGES):
    """The images that a monitor takes of them."""
    return images[spread(count, len(images))]


def direct(module, images, generators=("translation", "rotation", "scale"), **options):
    metric = LocalEquivarianceError(generators, **options)
    metric.update(module, images)
    return metric.measures()


def assert_values(metrics, measured, prefix="equivariance", suffix=""):
    for family, measure in (("", "relative"), ("_lee", "lee")):
        for key, kind in ((family, measure), (f"{family}_se", f"{measure}_standard_error")):
            for name, value in measured[kind].items():
                assert float(metrics[f"{prefix}{key}/{name}{suffix}"]) == pytest.approx(value.item(), rel=1e-4), (
                    key,
                    name,
                )


# ---------------------------------------------------------------------------------------------------------------------
# What is logged


@pytest.mark.parametrize("num_images", [3, 6, 14, 100])
def test_values_are_those_of_the_metric_on_images_spread_over_the_set(num_images):
    trainer = fitted(EquivarianceMonitor(num_images=num_images))
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, chosen(num_images)))
    keys = {key for key in trainer.callback_metrics if key.startswith("equivariance")}
    names = ("translation_x", "translation_y", "rotation", "scale")
    beside = [f"_{name}{error}" for name in ("finite", "linearity", "floor") for error in ("", "_se")]
    assert keys == {f"equivariance{family}/{name}" for family in (*KEYS, *beside) for name in names}


def test_options_reach_the_metric():
    spiral = lm.Generator.affine("spiral", [[-0.5, 1, 0], [-1, -0.5, 0]])
    trainer = fitted(
        EquivarianceMonitor(
            ["rotation", spiral],
            14,
            measures=("relative", "lee", "sensitivity"),
            output="probabilities",
            lee_output="output",
            resampling=lm.PAPER,
            method="double_backward",
            chunk_size=1,
            seed=3,
            prefix="paper",
        )
    )
    options = {"output": "probabilities", "lee_output": "output", "resampling": lm.PAPER, "seed": 3, "with_noise": True}
    measured = direct(trainer.lightning_module, IMAGES, ("rotation", spiral), **options)
    assert_values(trainer.callback_metrics, measured, prefix="paper")
    for key, kind in (("sensitivity", "sensitivity"), ("sensitivity_se", "sensitivity_standard_error")):
        for name, value in measured[kind].items():
            assert float(trainer.callback_metrics[f"paper_{key}/{name}"]) == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize(("num_images", "strides"), [(14, (1, 1, 1)), (64, (4, 4, 4)), (128, (4, 8, 8))])
def test_what_stands_beside_by_default(num_images, strides):
    """Every fourth, eighth and sixteenth image, as long as sixteen are left."""
    many = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    data = [(image, 0) for image in many]
    trainer = fitted(
        EquivarianceMonitor(("translation_x", "rotation"), num_images), val=DataLoader(data, batch_size=50)
    )
    module, found = trainer.lightning_module, trainer.callback_metrics
    part = many[spread(num_images, 128)]
    numbers = list(range(len(part)))
    finite = lm.FiniteEquivarianceError(lm.orbits.displaced(("translation_x", "rotation"), (2,)))
    near = lm.FiniteEquivarianceError(lm.orbits.displaced(("translation_x", "rotation"), (1,)))
    local, floor = LocalEquivarianceError(("translation_x", "rotation")), lm.StencilError(("translation_x", "rotation"))
    local.update(module, part)
    for metric, stride in zip((finite, near, floor), strides, strict=True):
        metric.numbers = numbers[::stride]
        metric.update(module, part[::stride])
    assert_values(found, local.measures())
    values = {"finite": finite.compute(), "finite_se": finite.standard_error(), "floor": floor.compute()}
    values["linearity"], values["linearity_se"] = near.linearity(local)
    for family, by_name in values.items():
        for name, value in by_name.items():
            key = f"equivariance_{family}/{name.split('_2px')[0].split('_1px')[0]}"
            assert float(found[key]) == pytest.approx(value.item(), rel=1e-4), key
            assert value > 0


@pytest.mark.parametrize("every", [1, 2])
def test_floor_and_linearity_are_measured_ever_more_seldom(tmp_path, every):
    """At the first, second and fourth epoch that is measured, not at the third; the rest each time."""
    logger = CSVLogger(tmp_path)
    fitted(EquivarianceMonitor("rotation", 6, every, baseline=False), logger=logger, max_epochs=5 * every)
    logger.finalize("success")
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    measured = {
        family: [int(row["epoch"]) for row in rows if row.get(f"equivariance{family}/rotation")]
        for family in ("", "_finite", "_linearity", "_floor")
    }
    epochs = [every * (k + 1) - 1 for k in range(5)]
    assert measured[""] == measured["_finite"] == epochs
    assert measured["_linearity"] == measured["_floor"] == [epochs[k] for k in (0, 1, 3)]


def test_what_stands_beside_can_be_left_out():
    names = lambda **options: list(EquivarianceMonitor(**options).metrics)  # noqa: E731
    assert names() == ["finite", "linearity", "floor"]
    assert names(displacement=None) == ["floor"]
    assert names(floor=False, displacement=1) == ["finite", "linearity"]
    assert names(generators="saturation") == []
    assert names(input_representation=lm.representations.Field(3)) == []
    monitor = EquivarianceMonitor(("rotation", "saturation"), displacement=3.0)
    assert monitor.metrics["finite"].names == monitor.metrics["floor"].names == ("rotation",)
    assert monitor.metrics["finite"].orbits[0].pixels == 3
    with pytest.raises(ValueError, match="`pixels` must hold positive distances"):
        EquivarianceMonitor(displacement=0)
    with pytest.raises(ValueError, match="among"):
        EquivarianceMonitor(metrics={"floor": lm.LatticeEquivarianceError("flips")})


class OwnLayout:
    """Rows of pixels, which stand on no grid that anyone knows of."""

    def check(self, tensor, name):
        pass

    def tangents(self, tensor, generators, resampling):
        return torch.stack([torch.roll(tensor, 1, -1) - tensor for _ in generators])

    def act(self, tensor, generator, t, resampling):
        return tensor

    def components(self, tensor):
        return [tensor.flatten(1)[:, None]]


def test_what_stands_on_no_grid_has_no_pixels():
    assert list(EquivarianceMonitor(input_representation=OwnLayout()).metrics) == []


def test_images_too_small_for_a_displacement_are_told_once_and_measured_without():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fitted(EquivarianceMonitor("rotation", 6, displacement=5.0, baseline=False), max_epochs=1)
    told = [str(entry.message) for entry in caught if "'finite'" in str(entry.message)]
    assert told
    assert all("must leave half of the image in the frame" in text for text in told)
    assert math.isnan(trainer.callback_metrics["equivariance_finite/rotation"])
    assert math.isfinite(trainer.callback_metrics["equivariance_linearity/rotation"])
    assert math.isfinite(trainer.callback_metrics["equivariance/rotation"])


def test_companions_are_logged_beside():
    shifts = lm.orbits.uniform("translation", 0.3, name="shifts")
    small, flips = lm.PredictionConsistency(shifts, seed=4), lm.LatticeEquivarianceError("flips")
    trainer = fitted(EquivarianceMonitor("rotation", 6, metrics={"agreement": small, "lattice": flips}))
    found = trainer.callback_metrics
    for name, metric in (("agreement", small), ("lattice", flips)):
        assert not metric.update_called
        metric.update(trainer.lightning_module, chosen(6))
        for key, values in ((name, metric.compute()), (f"{name}_se", metric.standard_error())):
            for orbit, value in values.items():
                assert float(found[f"equivariance_{key}/{orbit}"]) == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    assert_values(found, direct(trainer.lightning_module, chosen(6), "rotation"))
    by_class = EquivarianceMonitor("rotation", metrics=[flips, lm.FiniteEquivarianceError()])
    assert list(by_class.metrics)[3:] == ["lattice_equivariance_error", "finite_equivariance_error"]


def test_every_metric_is_a_companion():
    kinds = [getattr(lm.metrics, name) for name in lm.metrics.__all__]
    size = {"size": lambda x: x.square().sum((1, 2, 3))}
    made = {
        lm.FiniteEquivarianceError: lambda: lm.FiniteEquivarianceError(lm.orbits.displaced("rotation", (1,))),
        lm.ConservationError: lambda: lm.ConservationError(size, function=lambda module, x: -x),
    }  # images are small, and no states
    metrics = [made.get(kind, kind)() for kind in kinds]
    monitor = EquivarianceMonitor("rotation", 14, metrics=metrics, displacement=None, floor=False)
    found = fitted(monitor).callback_metrics
    assert len(monitor.metrics) == len(kinds) == 10
    for name, metric in monitor.metrics.items():
        values = [found[f"equivariance_{name}/{key}"] for key in metric.names]
        assert all(value.isfinite() for value in values)
        assert all(f"equivariance_{name}_se/{key}" in found for key in metric.names)


class Refusing(lm.LatticeEquivarianceError):
    def update(self, model, images, targets=None):
        if not model.trainer.sanity_checking:
            raise ValueError("planted")


def test_a_companion_that_fails_is_nan_alone_and_named():
    metrics = {"bad": Refusing("flips"), "good": lm.LatticeEquivarianceError("flips")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = EquivarianceMonitor("rotation", 6, metrics=metrics, baseline=False)
        found = fitted(monitor, max_epochs=1).callback_metrics
    told = [str(entry.message) for entry in caught if "planted" in str(entry.message)]
    assert len(told) == 1
    assert told[0].startswith("The companion 'bad' of `EquivarianceMonitor` could not be measured")
    bad = {key for key, value in found.items() if value.isnan()}
    assert bad == {key for key in found if key.startswith(("equivariance_bad/", "equivariance_bad_se/"))} != set()
    with pytest.raises(RuntimeError, match=r"companion 'bad'.*planted"):
        fitted(EquivarianceMonitor("rotation", 6, metrics=metrics, on_error="raise"))


def test_a_companion_that_cannot_be_is_refused_before_training():
    odd = EquivarianceMonitor("rotation", 6, metrics=[lm.LatticeEquivarianceError(lm.lattice.Roll(1, 0))], images=strip)
    assert fitted(odd).callback_metrics["equivariance/rotation"].isfinite()
    square = EquivarianceMonitor("rotation", 6, metrics=[lm.LatticeEquivarianceError()], images=strip)
    refused(r"companion 'lattice_equivariance_error'.*must be square", square, ValueError, val=loader())


def strip(batch):
    """The same number of pixels in another shape, which the module's linear layer takes."""
    return batch[0].reshape(-1, 1, 4, 16)


@pytest.mark.parametrize(
    ("metrics", "error", "match"),
    [
        (lm.PredictionConsistency(), TypeError, "`metrics` must be a sequence or a mapping"),
        ([nn.ReLU()], TypeError, "`metrics` must be metrics of this library"),
        (
            [lm.PredictionConsistency(), lm.PredictionConsistency()],
            ValueError,
            r"got \['prediction_consistency'\] more than",
        ),
        ({"se": lm.PredictionConsistency()}, ValueError, "`metrics` must have names of letters"),
        ({"lee": lm.PredictionConsistency()}, ValueError, "`metrics` must have names of letters"),
        ({"a/b": lm.PredictionConsistency()}, ValueError, "`metrics` must have names of letters"),
        ({"a_se": lm.PredictionConsistency()}, ValueError, "`metrics` must have names of letters"),
    ],
)
def test_bad_companions(metrics, error, match):
    with pytest.raises(error, match=match):
        EquivarianceMonitor("rotation", metrics=metrics)


def test_an_equivariant_model_scores_zero_and_a_planted_violation_does_not():
    class Pooled(Classifier):
        def __init__(self, shift):
            super().__init__(lr=0.0)
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.GELU())
            self.head, self.shift = nn.Linear(4, 3), shift

        def forward(self, x):
            features = self.net(x)
            return self.head(features.mean((2, 3)) + self.shift * features[:, :, 0, 0])

        def _loss(self, batch):
            return self(batch[0]).square().mean()

    # Periodic and band limited: translations are exact up to the harmonics that the activation makes.
    grid = torch.arange(16) * torch.pi / 8
    waves = torch.stack([(grid[:, None] + i).cos() + (grid * 2 + i).sin() for i in range(8)])[:, None]
    fourier = lm.Resampling("fourier")
    values = []
    for shift in (0.0, 1.0):
        trainer = fitted(
            EquivarianceMonitor("translation", 8, resampling=fourier),
            Pooled(shift),
            val=loader(images=waves),
            max_epochs=1,
        )
        values.append(trainer.callback_metrics["equivariance_lee/translation_x"].item())
    assert values[0] < 1e-6 * values[1]


@pytest.mark.parametrize("wrap", ["tuple", "dict", "dataclass", "nested"])
def test_every_form_of_output(wrap):
    output = (lambda returned: returned["heads"][1]) if wrap == "nested" else "logits"
    trainer = fitted(EquivarianceMonitor(output=output), Classifier(wrap=wrap), max_epochs=1)
    module = trainer.lightning_module
    assert_values(trainer.callback_metrics, direct(module.net, IMAGES))


@pytest.mark.parametrize(
    ("form", "images"),
    [
        (lambda image: image, None),
        (lambda image: (image, 0), None),
        (lambda image: [image, 0, 1], None),
        (lambda image: ({"image": image}, 0), None),
        *[(lambda image, key=key: {key: image, "label": 0}, None) for key in ("image", "images", "pixel_values", "x")],
        *[(lambda image, key=key: {key: image, "label": 0}, None) for key in ("input", "inputs")],
        (lambda image: {"picture": image}, "picture"),
        (lambda image: {"x": torch.zeros(()), "image": image}, "image"),
        (lambda image: (0, image), 1),
        (lambda image: (0, {"deep": image}, image), lambda batch: batch[1]["deep"]),
    ],
)
def test_every_form_of_batch(form, images):
    trainer = fitted(EquivarianceMonitor(images=images), train=loader(form), val=loader(form), max_epochs=1)
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, IMAGES))


def test_several_loaders_have_a_metric_each():
    trainer = fitted(EquivarianceMonitor(num_images=6), val=[loader(), loader(images=IMAGES.flip(0), batch_size=5)])
    for index, images in enumerate((IMAGES, IMAGES.flip(0))):
        measured = direct(trainer.lightning_module, chosen(6, images))
        assert_values(trainer.callback_metrics, measured, suffix=f"/dataloader_idx_{index}")
    assert "equivariance/rotation" not in trainer.callback_metrics


def test_loaders_run_side_by_side_are_one():
    class Paired(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self._loss(batch["a"]))

    both = CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle")
    trainer = fitted(EquivarianceMonitor(images=lambda batch: batch["a"][0]), Paired(), val=both)
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, IMAGES))


def test_image_valued_outputs():
    class Filter(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 3, 3, padding=1)

        def _loss(self, batch):
            return self(batch[0]).square().mean()

    trainer = fitted(EquivarianceMonitor(), Filter())
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, IMAGES))


def test_iterable_validation_set():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter((image, 0) for image in IMAGES)

    trainer = fitted(EquivarianceMonitor(num_images=6), val=DataLoader(Stream(), 4))
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, IMAGES[:6]))


# ---------------------------------------------------------------------------------------------------------------------
# When it is logged


class Recorder(Callback):
    def __init__(self):
        self.curve = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.curve.append(trainer.callback_metrics.get("equivariance/rotation"))


def rows(directory):
    with (Path(directory) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def curve(directory, key="equivariance/rotation"):
    return [(int(row["step"]), float(row[key])) for row in rows(directory) if row.get(key)]


def test_every_n_epochs_keeps_the_old_value_in_between(tmp_path):
    recorder, logger = Recorder(), CSVLogger(tmp_path)
    seed_everything(0)
    monitor = EquivarianceMonitor(num_images=6, every_n_epochs=2)
    make_trainer(monitor, recorder, max_epochs=5, logger=logger).fit(Classifier(), loader(), loader())
    assert recorder.curve[0] is None
    assert recorder.curve[1] == recorder.curve[2] != recorder.curve[3] == recorder.curve[4]
    assert [step for step, _ in curve(logger.log_dir)] == [0, 7, 15]


@pytest.mark.parametrize("sanity_steps", [0, 2])
@pytest.mark.parametrize("every_n_epochs", [1, 2])
def test_baseline_is_the_untrained_model_on_the_same_images(tmp_path, sanity_steps, every_n_epochs):
    seed_everything(0)
    module, logger = Classifier(), CSVLogger(tmp_path)
    before = direct(module, chosen(6))
    monitor = EquivarianceMonitor(num_images=6, every_n_epochs=every_n_epochs)
    trainer = make_trainer(monitor, logger=logger, num_sanity_val_steps=sanity_steps)
    trainer.fit(module, loader(), loader())
    first = next(row for row in rows(logger.log_dir) if row["equivariance/rotation"])
    assert first["step"] == first["epoch"] == "0"
    assert_values(first, before)
    assert_values(trainer.callback_metrics, direct(module, chosen(6)))


def test_baseline_sees_what_the_module_does_before_its_first_step(tmp_path):
    class Initialised(Classifier):
        def on_train_start(self):
            nn.init.constant_(self.net[0].weight, 0.1)

    module, twin, logger = Initialised(), Initialised(), CSVLogger(tmp_path)
    twin.load_state_dict(module.state_dict())
    twin.on_train_start()
    make_trainer(EquivarianceMonitor(num_images=6), logger=logger).fit(module, loader(), loader())
    assert_values(rows(logger.log_dir)[0], direct(twin, chosen(6)))


def test_no_baseline_when_not_asked_for(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(EquivarianceMonitor(num_images=6, baseline=False), logger=logger)
    assert [step for step, _ in curve(logger.log_dir)] == [3, 7]


@pytest.mark.parametrize("change", ["lazy", "replaced"])
def test_no_baseline_of_weights_that_cannot_be_kept(tmp_path, change):
    class Changing(Classifier):
        def __init__(self):
            super().__init__()
            if change == "lazy":
                self.net[5] = nn.LazyLinear(3)

        def on_train_epoch_end(self):
            if change == "replaced":
                self.net[5] = nn.Sequential(self.net[5])

        def configure_optimizers(self):
            return None

    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}
    reason = {"lazy": "it has lazy modules", "replaced": "its parameters or buffers were replaced"}[change]
    with pytest.warns(UserWarning, match=f"No baseline: the untrained model cannot be kept, because {reason}"):
        fitted(EquivarianceMonitor(num_images=6), Changing(), **options)
    assert [step for step, value in curve(logger.log_dir) if math.isfinite(value)] == [7]


@pytest.mark.parametrize("fails_at", ["first", "third", "measurement"])
def test_weights_are_put_back_whatever_fails(fails_at):
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = {name: value + 1 for name, value in weights.copies(weights.tensors_of(module)).items()}
    written = []

    class Failing(dict):
        def __getitem__(self, name):
            written.append(name)
            if len(written) == {"first": 1, "third": 3}.get(fails_at):
                raise MemoryError("planted")
            return super().__getitem__(name)

    def exchange():
        with weights.exchanged(module, Failing(other)):
            assert all(torch.equal(value, before[name] + 1) for name, value in module.state_dict().items())
            raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        exchange()
    assert written
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_baseline_whose_exchange_fails_is_nan_and_training_is_the_same(tmp_path, monkeypatch):
    states = []
    for fails in (True, False):
        with monkeypatch.context() as patched:
            if fails:
                patched.setattr(weights, "copies", lambda *_: (_ for _ in ()).throw(MemoryError("planted")))
            logger = CSVLogger(tmp_path, name=str(fails))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer = fitted(EquivarianceMonitor(num_images=6), logger=logger)
        assert any("planted" in str(entry.message) for entry in caught) == fails
        assert [math.isfinite(value) for _, value in curve(logger.log_dir)] == [not fails, True, True]
        states.append(trainer.lightning_module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_several_validations_in_an_epoch(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(EquivarianceMonitor(num_images=6), logger=logger, val_check_interval=2, max_epochs=1)
    assert [step for step, _ in curve(logger.log_dir)] == [0, 1, 3]


def test_limit_val_batches(tmp_path):
    trainer = fitted(EquivarianceMonitor(num_images=100), limit_val_batches=2)
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, IMAGES[:8]))


def test_fast_dev_run():
    trainer = fitted(EquivarianceMonitor(every_n_epochs=5), fast_dev_run=True)
    assert_values(trainer.callback_metrics, direct(trainer.lightning_module, IMAGES[:4]))


def test_validate_alone():
    seed_everything(0)
    module = Classifier()
    (metrics,) = make_trainer(EquivarianceMonitor(every_n_epochs=5)).validate(module, loader(), verbose=False)
    assert_values(metrics, direct(module, IMAGES))


def test_sanity_check_rehearses_and_logs_nothing():
    sizes = []

    class Watch(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert not [key for key in trainer.callback_metrics if key.startswith("equivariance")]
            assert 2 in sizes
            assert set(sizes) <= {1, 2, 4}  # the check moves one image four times

    class Counted(Classifier):
        def forward(self, x):
            sizes.append(len(x))  # not of the module, what it holds is given back
            return super().forward(x)

    seed_everything(0)
    trainer = make_trainer(EquivarianceMonitor(), Watch(), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No image of loader")
        trainer.fit(Counted(), loader(), loader())
    assert torch.isfinite(trainer.callback_metrics["equivariance/rotation"])


def test_a_run_that_was_interrupted_leaves_nothing_to_the_next(tmp_path):
    class Interrupted(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("planted")

    monitor, logger = EquivarianceMonitor(num_images=6), CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="planted"):
        fitted(monitor, Interrupted())
    module = Classifier()
    before = direct(module, chosen(6))
    make_trainer(monitor, logger=logger).fit(module, loader(), loader())
    assert_values(rows(logger.log_dir)[0], before)


def test_two_monitors_under_two_prefixes():
    seed_everything(0)
    pair = EquivarianceMonitor("rotation"), EquivarianceMonitor("rotation", prefix="paper", resampling=lm.PAPER)
    trainer = make_trainer(*pair, max_epochs=1)
    trainer.fit(Classifier(), loader(), loader())
    assert trainer.callback_metrics["paper/rotation"] != trainer.callback_metrics["equivariance/rotation"]


@pytest.mark.parametrize("order", [1, -1])
def test_checkpoint_and_early_stopping_see_the_value_of_the_same_epoch(tmp_path, order):
    recorder = Recorder()
    best = ModelCheckpoint(tmp_path, monitor="equivariance/rotation", filename="{epoch}", save_top_k=1)
    stop = EarlyStopping("equivariance/rotation", patience=1, min_delta=1e9)
    seed_everything(0)
    callbacks = [EquivarianceMonitor(num_images=6), best, stop, recorder][::order]
    trainer = make_trainer(*callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.fit(Classifier(), loader(), loader())
    assert trainer.current_epoch == 2  # the second epoch is no improvement by 1e9
    assert best.best_model_score == min(recorder.curve)
    module = Classifier.load_from_checkpoint(best.best_model_path)
    assert direct(module, chosen(6))["relative"]["rotation"].item() == pytest.approx(
        float(best.best_model_score), rel=1e-4
    )


def test_resumed_curve_is_the_uninterrupted_one(tmp_path):
    curves = []
    for interrupted in (False, True):
        logger = CSVLogger(tmp_path, name=str(interrupted))
        seed_everything(0)
        module, checkpoint = Classifier(), tmp_path / "half.ckpt"
        module.net[4].p = 0.0
        trainer = make_trainer(EquivarianceMonitor(num_images=6), max_epochs=2 if interrupted else 4, logger=logger)
        trainer.fit(module, loader(), loader())
        found = curve(logger.log_dir)
        if interrupted:
            trainer.save_checkpoint(checkpoint)
            later = CSVLogger(tmp_path, name="resumed")
            trainer = make_trainer(EquivarianceMonitor(num_images=6), max_epochs=4, logger=later)
            module = Classifier()
            module.net[4].p = 0.0
            trainer.fit(module, loader(), loader(), ckpt_path=checkpoint)
            found += curve(later.log_dir)
        curves.append(found)
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [0, 3, 7, 11, 15]


# ---------------------------------------------------------------------------------------------------------------------
# Loggers


def test_keys_are_the_same_each_time(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(EquivarianceMonitor(num_images=6), logger=logger)
    found = [{k for k, v in row.items() if k.startswith("equivariance") and v} for row in rows(logger.log_dir)]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_tensorboard(tmp_path, default_hp_metric):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import metadata

    logger = TensorBoardLogger(tmp_path, default_hp_metric=default_hp_metric)
    trainer = fitted(EquivarianceMonitor(num_images=6), logger=logger, val=[loader(), loader()])
    events = EventAccumulator(logger.log_dir, {"scalars": 0, "tensors": 0}).Reload()

    tag = "equivariance/rotation/dataloader_idx_1"
    points = [(event.step, event.value) for event in events.Scalars(tag)]
    assert [step for step, _ in points] == [0, 3, 7]
    assert [step for step, _ in points][1:] == [event.step for event in events.Scalars("val_loss/dataloader_idx_1")]
    assert points[-1][1] == pytest.approx(float(trainer.callback_metrics[tag]))
    assert all(math.isfinite(value) for _, value in points)

    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    patterns = [chart.multiline.tag for chart in category.chart]
    assert len(patterns) == 5  # one chart for each family
    scalars = [name for name in events.Tags()["scalars"] if name.startswith("equivariance")]
    shown = [[name for name in scalars if re.match(pattern, name)] for (pattern,) in patterns]
    assert [len(names) for names in shown] == [8] * 5
    assert all("_se" not in name for names in shown for name in names)

    start = metadata.parse_session_start_info_plugin_data(
        events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    assert start.hparams["lr"].number_value == pytest.approx(0.1)
    assert start.hparams["equivariance_resampling"].string_value == str(lm.Resampling())
    if default_hp_metric:  # the tab would show `hp_metric` alone
        experiment = metadata.parse_experiment_plugin_data(
            events.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
        )
        shown = {metric.name.tag for metric in experiment.metric_infos}
        assert {"equivariance/rotation", "equivariance_lee/scale", "hp_metric"} <= shown
    else:  # without a declared list it shows every scalar
        assert metadata.EXPERIMENT_TAG not in events.summary_metadata


def test_charts_of_two_monitors(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    monitors = [EquivarianceMonitor("rotation", 4, prefix=prefix, baseline=False) for prefix in ("one", "two")]
    make_trainer(*monitors, logger=logger, max_epochs=1).fit(Classifier(), loader(), loader())
    events = EventAccumulator(logger.log_dir, {"tensors": 0}).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert {category.title for category in layout.category} == {"one", "two"}


@pytest.mark.slow
def test_tensorboard_is_not_needed():
    code = (
        "import sys; sys.modules['tensorboard'] = None; sys.modules['tensorboardX'] = None\n"
        "from lie_metric.callbacks import EquivarianceMonitor; EquivarianceMonitor()\n"
        "assert 'torch.utils.tensorboard' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def select_picture(batch):
    return batch["picture"]


def select_scores(returned):
    return returned["heads"][1]


def run_cli(tmp_path, monitor):
    class Pictures(LightningDataModule):
        def train_dataloader(self):
            return loader(lambda image: {"picture": image, "label": 0})

        def val_dataloader(self):
            return loader(lambda image: {"picture": image, "label": 0})

    config = {
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "lie_metric.callbacks.EquivarianceMonitor", "init_args": monitor}],
        },
        "model": {"lr": 0.1, "wrap": "nested"},
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return LightningCLI(
        Classifier, Pictures, args=["fit", f"--config={file}"], save_config_callback=None, seed_everything_default=0
    )


def test_lightning_cli(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    here = Path(__file__).stem
    cli = run_cli(
        tmp_path,
        {
            "generators": ["rotation", {"name": "spiral", "matrix": [[-0.5, 1, 0], [-1, -0.5, 0]]}],
            "num_images": 6,
            "every_n_epochs": 1,
            "measures": ["relative", "lee"],
            "images": f"{here}.select_picture",
            "output": f"{here}.select_scores",
            "lee_output": "probabilities",
            "resampling": {"interpolation": "cubic", "padding": "border"},
            "output_representation": {"class_path": "lie_metric.representations.Invariant"},
            "method": "forward",
            "chunk_size": 1,
            "baseline": False,
            "on_error": "raise",
        },
    )
    spiral = lm.Generator.affine("spiral", [[-0.5, 1, 0], [-1, -0.5, 0]])
    options = {"lee_output": "probabilities", "resampling": lm.Resampling("cubic", "border")}
    measured = direct(cli.model.net, chosen(6), ("rotation", spiral), **options)
    assert_values(cli.trainer.callback_metrics, measured)


def test_lightning_cli_with_a_key_and_one_name(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    output = f"{Path(__file__).stem}.select_scores"
    cli = run_cli(tmp_path, {"generators": "affine", "images": "picture", "output": output})
    assert_values(cli.trainer.callback_metrics, direct(cli.model.net, IMAGES, "affine"))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"generators": "rotatoin"}, ValueError, "`generators` must name known generators, got 'rotatoin'"),
        ({"generators": ()}, ValueError, "`generators` must name at least one"),
        ({"generators": 3}, TypeError, "`generators`"),
        ({"num_images": 0}, ValueError, "`num_images` must be at least 1, got 0"),
        ({"num_images": 2.5}, TypeError, "`num_images` must be an integer, got 2.5"),
        ({"num_images": True}, TypeError, "`num_images` must be an integer, got True"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` must be at least 1, got 0"),
        ({"measures": ()}, ValueError, "`measures` must be a sequence"),
        ({"measures": ("lee", "lei")}, ValueError, "`measures` must be a sequence"),
        ({"measures": "lee"}, ValueError, "`measures` must be a sequence"),
        ({"images": 2.5}, TypeError, "`images` must be a callable, a key or an index, got 2.5"),
        ({"output": "logit"}, ValueError, "`output` must be"),
        ({"lee_output": "softmax"}, ValueError, "`lee_output` must be"),
        ({"resampling": "bilinear"}, TypeError, "`resampling` must be"),
        ({"method": "backward"}, ValueError, "`method` must be"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be"),
        ({"seed": -1}, ValueError, "`seed` must be"),
        ({"output_representation": "image"}, TypeError, "`output_representation` must be"),
        ({"on_error": "ignore"}, ValueError, "`on_error` must be 'warn' or 'raise', got 'ignore'"),
        ({"prefix": "a/b"}, ValueError, "`prefix` must be a non-empty string without '/'"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        EquivarianceMonitor(**arguments)


def test_unknown_stencil():
    with pytest.raises(ValueError, match="`interpolation` must be one of"):
        EquivarianceMonitor(resampling=lm.Resampling("nearest"))


class NoStep(Callback):
    """Training must not have begun."""

    def on_train_batch_start(self, *_):
        raise AssertionError


def refused(match, monitor=None, error=MisconfigurationException, module=None, val=None, **options):
    trainer = make_trainer(monitor or EquivarianceMonitor(), NoStep(), **options)
    with pytest.raises(error, match=match):
        trainer.fit(module or Classifier(), loader(), val)


def test_no_validation():
    match = "`EquivarianceMonitor` must have validation images, got a run without validation"
    refused(match)
    refused(match, val=loader(), limit_val_batches=0)


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_empty_loader(sanity_steps):
    match = "got validation loaders of \\[0\\] batches"
    refused(match, val=loader(images=IMAGES[:0]), num_sanity_val_steps=sanity_steps)


@pytest.mark.parametrize(
    ("form", "images", "error", "match"),
    [
        (lambda image: {"picture": image}, None, TypeError, r"Pass `EquivarianceMonitor\(images='picture'\)`"),
        (lambda image: (0.0, image), 0, TypeError, "selected by images=0"),
        (lambda image: {"image": image, "x": image}, None, ValueError, "got \\['image', 'x'\\]"),
        (lambda image: {"picture": image}, "image", ValueError, "must be a key or index of the batch, got 'image'"),
        (lambda image: {"picture": image}, lambda batch: batch, TypeError, "got a dict with keys \\['picture'\\]"),
    ],
)
def test_batch_without_images(form, images, error, match):
    class NoLoss(Classifier):
        def validation_step(self, *_):
            pass

    if images == 0:
        images = lambda batch: "not a tensor"  # noqa: E731
        match = "got a str"
    refused(match, EquivarianceMonitor(images=images, on_error="warn"), error, NoLoss(), loader(form))


def test_deepspeed_is_refused():
    monitor = EquivarianceMonitor()
    trainer = types.SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy), enable_validation=True)
    for stage in ("fit", "validate"):
        with pytest.raises(MisconfigurationException, match=r"got DeepSpeedStrategy, .* Train with strategy='fsdp'"):
            monitor.setup(trainer, None, stage)
    monitor.setup(trainer, None, "test")


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (
            (IMAGES * 10).byte(),
            r"torch.uint8, .* Pass `EquivarianceMonitor\(images=lambda batch: batch\[0\].float\(\) / 255\)`",
        ),
        (IMAGES.clone().fill_(torch.nan), "`inputs` must be finite"),
        (IMAGES[:, 0], r"of shape \(B, C, H, W\), got a tensor of shape .* no axis of channels"),
    ],
)
@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_images_that_cannot_be_measured(images, match, on_error, sanity_steps):
    class Any(Classifier):
        def validation_step(self, *_):
            pass

    monitor, options = EquivarianceMonitor(on_error=on_error), {"num_sanity_val_steps": sanity_steps}
    refused(match, monitor, (TypeError, ValueError), Any(), loader(images=images), **options)


def test_output_without_a_representation_names_the_argument():
    class Odd(Classifier):
        def forward(self, x):
            return self.net(x).reshape(-1, 1, 3)

    match = r"`output_representation` must be given.*Here that is `EquivarianceMonitor\(output_representation=...\)`"
    refused(match, error=ValueError, module=Odd(), val=loader())
    invariant = lm.representations.Invariant()
    trainer = fitted(EquivarianceMonitor(output_representation=invariant), Odd(), max_epochs=1)
    assert torch.isfinite(trainer.callback_metrics["equivariance/rotation"])


def test_a_failing_epoch_is_nan_and_the_next_one_is_not(tmp_path):
    class Failing(Classifier):
        def forward(self, x):
            if self.trainer.current_epoch == 1:
                raise RuntimeError("planted")
            return super().forward(x)

    logger = CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(EquivarianceMonitor(num_images=6), Failing(), max_epochs=3, logger=logger)
    assert len([entry for entry in caught if "failed with RuntimeError: planted" in str(entry.message)]) == 1
    assert [math.isfinite(value) for _, value in curve(logger.log_dir)] == [True, True, False, True]
    with pytest.raises(RuntimeError, match="planted"):
        fitted(EquivarianceMonitor(num_images=6, on_error="raise"), Failing(), max_epochs=3)


def test_a_constant_model_is_nan_with_a_reason():
    class Constant(Classifier):
        def forward(self, x):
            return x.new_ones(len(x), 3) + 0 * x.sum()

    with pytest.warns(UserWarning, match="`relative` is NaN"):
        trainer = fitted(EquivarianceMonitor(), Constant(), max_epochs=1)
    assert torch.isnan(trainer.callback_metrics["equivariance/rotation"])
    assert trainer.callback_metrics["equivariance_lee/rotation"] == 0


def test_one_image():
    trainer = fitted(EquivarianceMonitor(num_images=1), max_epochs=1)
    assert torch.isfinite(trainer.callback_metrics["equivariance_lee/rotation"])
    assert torch.isnan(trainer.callback_metrics["equivariance_lee_se/rotation"])


def test_public_tensor_dataset_example():
    """The smallest use: one line in one's own Trainer."""
    data = DataLoader(TensorDataset(IMAGES, torch.arange(14) % 3), 7)
    trainer = make_trainer(EquivarianceMonitor(), max_epochs=1)
    trainer.fit(Classifier(), data, data)
    assert torch.isfinite(trainer.callback_metrics["equivariance/rotation"])
