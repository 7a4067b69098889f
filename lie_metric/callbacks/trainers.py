"""What is asked of a Trainer, of ``lightning.pytorch`` or of the package ``pytorch_lightning``."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lie_metric.running import random_state

__all__ = [
    "first_batch",
    "is_a",
    "is_fitting",
    "is_testing",
    "measured_loaders",
    "number_of_batches",
    "outermost",
    "refuse_strategy",
    "step",
]


def is_a(value: object, *names: str) -> bool:
    """Whether a class of one of these names is among those of an object.

    The packages ``lightning`` and ``pytorch_lightning`` have each class twice.

    Args:
        value: Any object.
        names: Names of classes.

    Returns:
        Whether it is.

    Example:
        >>> is_a(True, "int"), is_a(True, "str")
        (True, False)
    """
    return any(kind.__name__ in names for kind in type(value).__mro__)


def is_fitting(trainer: Trainer) -> bool:
    """Whether the trainer is in ``fit``, rather than in ``validate`` or ``test``."""
    return trainer.state.fn == "fit"


def is_testing(trainer: Trainer) -> bool:
    """Whether the trainer is in ``test``."""
    return trainer.state.fn == "test"


def step(trainer: Trainer) -> int:
    """The step at which the trainer logs what it logs at this moment."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def number_of_batches(trainer: Trainer, dataloader_idx: int) -> float:
    """How many batches of a validation or test loader are run, infinite if that is not known.

    Args:
        trainer: The trainer.
        dataloader_idx: Number of the loader.

    Returns:
        The number.
    """
    batches = trainer.num_test_batches if is_testing(trainer) else trainer.num_val_batches
    return batches[dataloader_idx] if dataloader_idx < len(batches) else math.inf


def measured_loaders(trainer: Trainer) -> list[Any]:
    """The loaders whose batches come with an index of their own: of tests in ``test``, of validation elsewhere.

    Args:
        trainer: The trainer.

    Returns:
        The loaders; None for several that run side by side.
    """
    alone = trainer.test_loop if is_testing(trainer) else trainer.validate_loop
    loop = trainer.fit_loop.epoch_loop.val_loop if is_fitting(trainer) else alone
    # `trainer.val_dataloaders` shows the loaders of an earlier fit during `trainer.validate()`, and hides whether they
    # are run one after the other.
    combined = loop._combined_loader
    if combined is None:
        return [None]
    return list(combined.flattened) if combined._mode == "sequential" else [None]


def outermost(trainer: Trainer, pl_module: LightningModule) -> torch.nn.Module:
    """The module as the strategy has wrapped it.

    Args:
        trainer: The trainer.
        pl_module: The module.

    Returns:
        The wrapper, or the module itself if there is none.
    """
    model = trainer.strategy.model
    return pl_module if model is None else model


def refuse_strategy(callback: Callback, trainer: Trainer, stage: str) -> None:
    """Refuses strategies under which the whole weights cannot be had.

    Args:
        callback: Who asks.
        trainer: The trainer.
        stage: The stage about to begin.

    Raises:
        MisconfigurationException: If the strategy is DeepSpeed's.
    """
    if stage in {"fit", "validate"} and is_a(trainer.strategy, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            f"`{type(callback).__name__}` must have weights that it can gather, got "
            f"{type(trainer.strategy).__name__}, whose engine keeps them to itself. Train with strategy='fsdp' or "
            "'ddp', or measure a checkpoint afterwards with `lie_metric.LocalEquivarianceError`."
        )


def first_batch(trainer: Trainer, pl_module: LightningModule, dataloader_idx: int) -> Any:
    """A batch of the first two entries of a validation set, without a trace of its having been made.

    Neither the loader's iterator and workers nor random states are touched, and the data set is given its attributes
    and its own random states back.

    Args:
        trainer: The trainer.
        pl_module: The module.
        dataloader_idx: Number of the loader.

    Returns:
        The batch on the module's device, as hooks would see it; None where a set cannot be indexed.
    """
    loader = measured_loaders(trainer)[dataloader_idx]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    stage = trainer.state.stage
    with random_state(), _as_found(loader.dataset):
        try:
            if loader.batch_sampler is None:
                batch = loader.collate_fn(loader.dataset[0])
            else:
                found = [loader.dataset[index] for index in range(min(2, len(loader.dataset)))]  # type: ignore[arg-type]
                batch = loader.collate_fn(found)
            trainer.state.stage = RunningStage.VALIDATING
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        except Exception:
            # Not ours to judge: sets may be indexed by other things than numbers. The first validation shows.
            return None
        finally:
            trainer.state.stage = stage


_SOURCES = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


@contextmanager
def _as_found(thing: object, depth: int = 6) -> Iterator[None]:
    """Gives the objects inside a data set their attributes, short lists and random states back."""
    kept: dict[int, tuple[Any, Any]] = {}

    def keep(value: Any, depth: int) -> None:
        if depth < 0 or id(value) in kept or isinstance(value, (torch.Tensor, np.ndarray, torch.nn.Module, type)):
            return
        inner: Any = ()
        if isinstance(value, _SOURCES):
            kept[id(value)] = value, _state_of(value)
        elif isinstance(value, (list, tuple, dict)):
            if len(value) > 64:  # entries of the set, rather than transforms or parts of it
                return
            inner = list(value.values() if isinstance(value, dict) else value)
            if not isinstance(value, tuple):
                kept[id(value)] = value, copy.copy(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            kept[id(value)] = value, dict(vars(value))
            inner = list(vars(value).values())
        for entry in inner:
            keep(entry, depth - 1)

    keep(thing, depth)
    try:
        yield
    finally:
        for value, state in kept.values():
            if isinstance(value, _SOURCES):
                _set_state(value, state)
            elif isinstance(value, list):
                value[:] = state
            else:
                now = value if isinstance(value, dict) else vars(value)
                for name in set(now) - set(state):
                    del now[name]
                now.update({name: old for name, old in state.items() if name not in now or now[name] is not old})


def _state_of(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return copy.deepcopy(source.bit_generator.state)
    return source.getstate() if isinstance(source, random.Random) else source.get_state()


def _set_state(source: Any, state: Any) -> None:
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.set_state(state)
