"""Keeps replicates of each measured epoch in a file beside the logger's, so that runs can be compared afterwards."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lie_metric.callbacks.tensorboard import flat_hyperparameters
from lie_metric.callbacks.trainers import is_fitting, step
from lie_metric.curves.files import append, entries_of
from lie_metric.records import VERSION
from lie_metric.warning import warn

__all__ = ["directory", "keep"]

_WARNED: weakref.WeakSet[Trainer] = weakref.WeakSet()


def keep(
    trainer: Trainer,
    pl_module: LightningModule,
    prefix: str,
    measures: Sequence[str],
    loaders: Sequence[Any],
    *,
    baseline: bool,
) -> None:
    """Appends what was measured in this epoch to ``<log_dir>/<prefix>.jsonl``, without ever being in the way.

    All processes take part in adding up, and the one of rank zero writes. Nothing is kept without a logger that has a
    directory, with ``fast_dev_run``, and outside of ``fit``. A file that cannot be written is warned of once.

    Args:
        trainer: The trainer.
        pl_module: The module.
        prefix: First word of the keys, and name of the file.
        measures: Which measures of the main metric are logged; of others the one that they compute.
        loaders: The loaders of this epoch: of each what was measured of the model (``curve``) and of the untrained one
            (``start``), with ``metrics`` by name, the main one under none, how many ``images``, and ``errors`` by name.
        baseline: Whether the untrained model was measured.
    """
    if not loaders or not trainer.loggers or getattr(trainer, "fast_dev_run", False) or not is_fitting(trainer):
        return
    folder = directory(trainer.loggers) if trainer.is_global_zero else None
    sets = [(True, [loader.start for loader in loaders])] if baseline else []
    sets.append((False, [loader.curve for loader in loaders]))
    measured = [
        (is_start, index, each, name)
        for is_start, found in sets
        for index, each in enumerate(found)
        if each is not None
        for name in each.metrics
    ]
    # Whatever failed where, all processes read the same metrics.
    flags = [[float(each.images), float(name in each.errors)] for *_, each, name in measured]
    told = torch.tensor([[float(folder is not None), 0.0], *flags], device=pl_module.device)
    (wanted, _), *outcomes = trainer.strategy.reduce(told, reduce_op="sum").tolist()
    if not wanted:
        return
    entries: dict[bool, list[dict[str, Any]]] = {}
    for (is_start, index, each, name), (images, failures) in zip(measured, outcomes, strict=True):
        if not images or failures:
            continue
        try:
            found = entries_of(name, each.metrics[name], prefix, measures, index if len(loaders) > 1 else None)
        except Exception as error:
            _warn(trainer, error)
            continue
        entries.setdefault(is_start, []).extend(found)
    if folder is None:
        return
    lines = [
        {
            "version": VERSION,
            "epoch": 0 if is_start else trainer.current_epoch,
            "step": 0 if is_start else step(trainer),
            "baseline": is_start,
            "records": found,
        }
        for is_start, found in sorted(entries.items(), reverse=True)
    ]
    try:
        append(folder / f"{prefix}.jsonl", lines, _header(trainer, pl_module))
    except Exception as error:
        _warn(trainer, error)


def directory(loggers: Iterable[Any]) -> Path | None:
    """The directory of a run: that of the first logger that has one on this machine.

    Args:
        loggers: The loggers.

    Returns:
        The directory; None if there is none.
    """
    for logger in loggers:
        try:
            found = getattr(logger, "log_dir", None)
            if found is None and logger.save_dir is not None and logger.version is not None:
                # Of loggers that share one folder, as Lightning's checkpoints are put.
                version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
                found = os.path.join(logger.save_dir, str(logger.name), version)
        except Exception:  # a logger of someone else's; it may have anything
            continue
        if isinstance(found, (str, os.PathLike)) and "://" not in str(found):
            return Path(found)
    return None


def _header(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    for source in (getattr(trainer, "datamodule", None), pl_module):
        saved |= flat_hyperparameters(getattr(source, "hparams_initial", None) or {})
    seed = os.environ.get("PL_GLOBAL_SEED", "")  # as `seed_everything` leaves it
    return {"version": VERSION, "hyperparameters": saved} | ({"seed": int(seed)} if seed.isdigit() else {})


def _warn(trainer: Trainer, error: Exception) -> None:
    if trainer not in _WARNED:
        _WARNED.add(trainer)
        warn(
            f"What `lie_metric.compare` needs of this run cannot be kept, it failed with {type(error).__name__}: "
            f"{error}. Training, measuring and logging go on."
        )
