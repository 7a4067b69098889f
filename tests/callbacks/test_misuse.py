"""Kinds of models and batches: what is measured, or what is said before the first training step."""

import dataclasses
import logging
import re
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lie_metric as lm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Set(Dataset):
    def __init__(self, form, count=8):
        self.form, self.count = form, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.form(IMAGES[index])


class Stream(IterableDataset):
    def __init__(self, form):
        self.form = form

    def __iter__(self):
        return iter([self.form(image) for image in IMAGES])


@dataclasses.dataclass
class HiddenStates:
    last_hidden_state: torch.Tensor


class Module(LightningModule):
    """A small convolutional network, whose output is made into some form."""

    def __init__(self, output=lambda scores: scores.mean((2, 3)), channels=3):
        super().__init__()
        self.net = nn.Conv2d(channels, 4, 3, padding=1)
        self.output = output
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.output(self.net(x))

    def training_step(self, batch, batch_idx):
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WithoutForward(LightningModule):
    def __init__(self):
        super().__init__()
        self.loss, self.net = nn.MSELoss(), nn.Conv2d(3, 4, 3)

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Unwritten(WithoutForward):
    def forward(self, x):
        raise NotImplementedError


class Boxes(Module):
    """What detection models of torchvision return."""

    def forward(self, x):
        return [{"boxes": torch.zeros(2, 4), "scores": torch.zeros(2)} for _ in x]


class Timed(Module):
    def forward(self, x, t):
        return self.net(x).mean((2, 3)) * t


class Methods(Module):
    def forward(self, batch):
        return self.encode(batch["image"])

    def encode(self, x):
        return self.net(x).mean((2, 3))


class Lazy(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.LazyConv2d(4, 3)

    def validation_step(self, batch, batch_idx):
        self(batch)


def detection(batch):
    return [image for image in batch], [{"boxes": torch.zeros(1, 4)} for _ in batch]


def tokens(scores):
    return scores.flatten(2).mT[:, :-1]


class NoStep(Callback):
    """Training must not have begun."""

    def on_train_batch_start(self, *_):
        raise AssertionError


def fit(
    module,
    form=lambda image: image,
    monitor=None,
    callbacks=(),
    sanity=2,
    loader=None,
    collate=None,
    max_epochs=1,
    **options,
):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=max_epochs, accelerator="cpu", callbacks=[monitor or lm.EquivarianceMonitor("rotation"), *callbacks],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=sanity, **options,
    )  # fmt: skip
    train, val = (DataLoader(Set(form), 4, collate_fn=collate) for _ in range(2))
    trainer.fit(module, train, val if loader is None else loader)
    return trainer


REFUSED = {
    "detection": (
        Module,
        {"collate": detection},
        "single images at batch[0], as detection models take",
    ),
    "detection, one image": (
        Module,
        {"collate": lambda b: detection(b[:1])},
        "single images at batch[0]",
    ),
    "boxes": (
        Boxes,
        {},
        "got a list of mappings with keys ['boxes', 'scores'], one for each image, as detection models",
    ),
    "list of images": (Module, {"collate": list}, "Pass `EquivarianceMonitor(images=torch.stack)`"),
    "an unusual key": (
        Module,
        {"form": lambda x: {"img": x, "label": 0}},
        "got a dict with keys ['img', 'label']. Pass `EquivarianceMonitor(images='img')` if",
    ),
    "an unusual key, nested": (
        Module,
        {"form": lambda x: {"label": 0, "data": {"img": (x * 255).byte()}}},
        "Pass `EquivarianceMonitor(images=lambda batch: batch['data']['img'].float() / 255)` if",
    ),
    "without forward": (
        WithoutForward,
        {},
        "got WithoutForward, which has none. Say what of it is measured, e.g. "
        "`EquivarianceMonitor(function=lambda model, images: model.net(images))`",
    ),
    "forward is not written": (
        Unwritten,
        {},
        "with NotImplementedError. To measure another function pass its name or "
        "`EquivarianceMonitor(function=lambda module, images: module.net(images))`.",
    ),
    "two views": (Module, {"form": lambda x: ((x, x), 0)}, "EquivarianceMonitor(images=lambda batch: batch[0][0])"),
    "labels first": (
        Module,
        {"form": lambda x: (0, x)},
        "found in a list of ['Tensor', 'Tensor']. Pass `EquivarianceMonitor(images=1)` if",
    ),
    "labels first, uint8": (
        Module,
        {"form": lambda x: (0, (x * 255).byte())},
        "Pass `EquivarianceMonitor(images=lambda batch: batch[1].float() / 255)` if",
    ),
    "labels first by key": (
        Module,
        {"form": lambda x: {"x": 0, "pixels": x}},
        "Pass `EquivarianceMonitor(images='pixels')`",
    ),
    "no images": (
        Module,
        {"form": lambda x: {"picture": 0}},
        "a tensor of shape (B, C, H, W), e.g. `lambda batch: batch['picture']`",
    ),
    "several keys": (Module, {"form": lambda x: {"image": x, "x": x}}, "got ['image', 'x']"),
    "strings": (Module, {"form": lambda x: "text"}, "got a str, found in a list of ['str', 'str'"),
    "numbers": (Module, {"form": lambda x: 0}, ",) and torch.int64. Pass `EquivarianceMonitor(images=...)`"),
    "uint8": (Module, {"form": lambda x: ((x * 255).byte(), 0)}, "(images=lambda batch: batch[0].float() / 255)`."),
    "not finite": (Module, {"form": lambda x: x / 0}, "must be finite"),
    "no channels": (Module, {"form": lambda x: x[0]}, "EquivarianceMonitor(images=lambda batch: batch[:, None])"),
    "channels last": (
        Module,
        {"form": lambda x: x.movedim(0, -1)},
        "EquivarianceMonitor(input_representation=lie_metric.representations.ChannelsLast())",
    ),
    "two arguments": (Timed, {}, "EquivarianceMonitor(function=lambda model, images: model(images, t=...))"),
    "takes the batch": (
        Methods,
        {},
        "dimension 4. To measure another function pass its name or "
        "`EquivarianceMonitor(function=lambda module, images: module.net(images))`",
    ),
    "tokens": (lambda: Module(tokens), {}, "EquivarianceMonitor(output_representation=...)"),
    "three axes": (lambda: Module(lambda s: s.mean(3)), {}, "EquivarianceMonitor(output_representation=...)"),
    "hidden states": (
        lambda: Module(lambda s: HiddenStates(s.flatten(1))),
        {},
        "EquivarianceMonitor(output=lambda returned: returned.last_hidden_state)",
    ),
    "dict": (lambda: Module(lambda s: {"last_hidden_state": s}), {}, "last_hidden_state"),
    "classes": (lambda: Module(lambda s: s.mean((2, 3)).argmax(1)), {}, "EquivarianceMonitor(output=...)"),
}
"""Kind of model and batch, and what is said."""

MEASURED = {
    "plain": (Module, {}, {}),
    "segmentation": (lambda: Module(lambda s: s), {"form": lambda x: (x, x[0].long())}, {}),
    "embeddings": (lambda: Module(lambda s: s.flatten(1)), {}, {}),
    "nested": (Module, {"form": lambda x: ({"image": x}, 0)}, {}),
    "nested tuple of one": (Module, {"form": lambda x: ((x,), 0)}, {}),
    "lazy": (Lazy, {}, {}),
    "two arguments": (Timed, {}, {"function": lambda module, x: module(x, t=2.0)}),
    "a method": (Methods, {}, {"function": "encode"}),
    "takes the batch": (Methods, {}, {"function": lambda module, x: module({"image": x})}),
    "hidden states": (
        lambda: Module(lambda s: HiddenStates(s.flatten(1))),
        {},
        {"output": lambda returned: returned.last_hidden_state},
    ),
    "channels last": (
        Methods,
        {"form": lambda x: x.movedim(0, -1)},
        {
            "function": lambda module, x: module.encode(x.movedim(-1, 1)),
            "input_representation": lm.representations.ChannelsLast(),
        },
    ),
    "detection": (
        Module,
        {"collate": detection},
        {"images": lambda b: torch.stack(b[0]), "function": lambda module, x: torch.cat([module(i[None]) for i in x])},
    ),
    "uint8": (Module, {"form": lambda x: ((x * 255).byte(), 0)}, {"images": lambda b: b[0].float() / 255}),
}


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("case", REFUSED)
def test_misuse_is_refused_before_the_first_step(case, sanity):
    make, batch, match = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(match)):
        fit(make(), callbacks=[NoStep()], sanity=sanity, **batch)


@pytest.mark.parametrize(
    "case", ["two arguments", "uint8", "three axes", "labels first", "without forward", "an unusual key"]
)
def test_the_layerwise_monitor_refuses_alike(case):
    make, batch, match = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(match.replace("Equivariance", "Layerwise"))):
        fit(make(), monitor=lm.LayerwiseMonitor("rotation"), callbacks=[NoStep()], **batch)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("case", MEASURED)
def test_what_is_measured(case, sanity):
    make, batch, options = MEASURED[case]
    monitor = lm.EquivarianceMonitor("rotation", on_error="raise", baseline=False, **options)
    trainer = fit(make(), monitor=monitor, sanity=sanity, **batch)
    assert trainer.callback_metrics["equivariance/rotation"].isfinite()


@pytest.mark.parametrize("case", ["two arguments", "a method", "takes the batch"])
def test_functions_reach_the_layerwise_monitor_and_companions(case):
    make, batch, options = MEASURED[case]
    trainer = fit(make(), monitor=lm.LayerwiseMonitor("rotation", on_error="raise", **options), **batch)
    assert trainer.callback_metrics["layerwise_rotation/convolution"].isfinite()
    monitor = lm.EquivarianceMonitor("rotation", metrics=[lm.PredictionConsistency()], on_error="raise", **options)
    found = fit(make(), monitor=monitor, **batch).callback_metrics
    assert all(value.isfinite() for key, value in found.items() if key.startswith("equivariance_prediction"))


def test_sets_that_cannot_be_indexed_show_misuse_in_the_first_validation():
    loader = DataLoader(Stream(lambda x: (0, x)), 4)
    with pytest.raises(TypeError, match=r"Pass `EquivarianceMonitor\(images=1\)`"):
        fit(Module(), sanity=0, loader=loader)
    with pytest.raises(TypeError, match=r"Pass `EquivarianceMonitor\(images=1\)`"):
        Trainer(
            accelerator="cpu", callbacks=[lm.EquivarianceMonitor()], logger=False, enable_progress_bar=False
        ).validate(Module(), loader, verbose=False)


def test_an_empty_loader():
    with pytest.raises(MisconfigurationException, match="got validation loaders of"):
        fit(Module(), callbacks=[NoStep()], loader=DataLoader(Set(lambda x: x, 0), 4))


def test_a_model_that_fails_obeys_on_error_at_once():
    def failing(scores):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fit(Module(failing), monitor=lm.EquivarianceMonitor(on_error="raise"), callbacks=[NoStep()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(Module(failing))
    told = [entry for entry in caught if "planted" in str(entry.message)]
    assert told
    assert {entry.filename for entry in told} == {__file__}
    assert trainer.callback_metrics["equivariance/rotation"].isnan()


def test_an_output_that_does_not_move_is_told_once_a_run():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Module(lambda scores: scores.mean((2, 3)) * torch.zeros(4)), max_epochs=2)
    assert sum("The output of Module does not move" in str(entry.message) for entry in caught) == 1


def test_models_that_take_batches_of_one_size_only():
    def four(scores):
        assert len(scores) % 4 == 0
        return scores.mean((2, 3))

    module = Module(four)
    trainer = fit(module, monitor=lm.EquivarianceMonitor("rotation", on_error="raise", method="forward"))
    assert trainer.callback_metrics["equivariance/rotation"].isfinite()


def test_one_line_says_what_is_measured(caplog):
    monitor = lm.EquivarianceMonitor("rotation", 6, function="encode")
    with caplog.at_level(logging.INFO):
        fit(Methods(), monitor=monitor)
    (line,) = [record.message for record in caplog.records if "measures" in record.message]
    assert "`EquivarianceMonitor` measures Methods.encode: output (B, 4): invariant" in line
    assert "stencil bspline" in line
    assert "method forward" in line
    assert line.endswith("6 images spread over the validation set.")


class Stateful(Dataset):
    """Draws from random states of its own, counts, and caches: indexing it ahead must not be seen."""

    def __init__(self):
        self.own, self.other = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.calls, self.log, self.cache = 0, [], {}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.calls += 1
        self.log.append(index)
        self.cache[index] = True
        self.file = object()
        noise = self.own.random() + torch.rand((), generator=self.other) + torch.rand(()) + np.random.rand()  # noqa: NPY002
        return (IMAGES[index] * noise).float()


def test_a_rehearsal_without_a_sanity_check_leaves_no_trace_on_the_data():
    sets = []
    for monitor in (lm.EquivarianceMonitor("rotation"), Callback()):
        data = Stateful()
        trainer = fit(Module(), monitor=monitor, sanity=0, loader=DataLoader(data, 4))
        drawn = data.own.random(), torch.rand((), generator=data.other).item(), torch.rand(()).item()
        sets.append((data.calls, data.log, *drawn))
        assert trainer.state.finished
    assert sets[0] == sets[1]


# ---------------------------------------------------------------------------------------------------------------------
# Several monitors


@pytest.mark.parametrize(
    ("pair", "shared"),
    [
        (lambda: (lm.EquivarianceMonitor("rotation"), lm.EquivarianceMonitor("scale")), "EquivarianceMonitor"),
        (lambda: (lm.LayerwiseMonitor("rotation"), lm.LayerwiseMonitor("scale")), "LayerwiseMonitor"),
        (lambda: (lm.EquivarianceMonitor(prefix="a"), lm.LayerwiseMonitor(prefix="a")), "EquivarianceMonitor"),
        (
            lambda: (lm.EquivarianceMonitor(metrics={"b": lm.OrbitVariance()}, prefix="a"),
                     lm.EquivarianceMonitor(prefix="a_b")),
            "EquivarianceMonitor",
        ),
    ],
)  # fmt: skip
def test_two_monitors_of_one_key_are_refused(pair, shared):
    with pytest.raises(MisconfigurationException, match=rf"Pass `{shared}\(prefix=...\)` to one of them"):
        fit(Module(), monitor=Callback(), callbacks=pair())


def test_two_layerwise_monitors_and_their_checkpoints(tmp_path):
    def pair():
        return [lm.LayerwiseMonitor(name, prefix=name, probes=1) for name in ("rotation", "scale")]

    first = pair()
    fit(Module(), callbacks=first).save_checkpoint(tmp_path / "both.ckpt")
    second = pair()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=second, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train, val = (DataLoader(Set(lambda x: x), 4) for _ in range(2))
    trainer.fit(Module(), train, val, ckpt_path=tmp_path / "both.ckpt")
    for monitor, name in zip(second, ("rotation", "scale"), strict=True):
        assert list(monitor._history) == [name]
        assert list(monitor._history[name]) == [0, 1]


def test_testing_says_that_nothing_is_measured():
    class Tested(Module):
        def test_step(self, batch, batch_idx):
            pass

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[lm.EquivarianceMonitor("rotation")]
    )
    told = r"nothing in `trainer.test\(\)`.*pass `EquivarianceMonitor\(test=True\)`"
    with pytest.warns(UserWarning, match=told) as caught:
        assert trainer.test(Tested(), DataLoader(Set(lambda x: x), 4), verbose=False) == [{}]
    assert [entry.filename for entry in caught if "nothing in" in str(entry.message)] == [__file__]


def test_a_set_sorted_by_class_is_measured_as_a_whole():
    """Half the images are noise, and noise moves faster: the first ones alone would not tell."""
    source = torch.Generator().manual_seed(0)
    rough = torch.rand(48, 3, 8, 8, generator=source)
    smooth = nn.functional.avg_pool2d(torch.rand(48, 3, 8, 8, generator=source), 5, 1, 2)
    images = torch.cat([smooth, rough])

    class Sorted(Set):
        def __getitem__(self, index):
            return images[index]

    module = Module(lambda scores: scores.square().mean((2, 3)))
    module.net.requires_grad_(False)
    monitor = lm.EquivarianceMonitor("rotation", 24, measures=("lee",))
    found = fit(module, monitor=monitor, loader=DataLoader(Sorted(None, 96), 8)).callback_metrics
    value, error = found["equivariance_lee/rotation"].item(), found["equivariance_lee_se/rotation"].item()

    def of(part):
        metric = lm.LocalEquivarianceError("rotation")
        metric.update(module, part)
        return metric.lee()["rotation"].item()

    assert abs(value - of(images)) < 2 * error
    assert abs(of(images[:24]) - of(images)) > 2 * error
