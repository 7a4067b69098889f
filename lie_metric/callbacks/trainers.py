"""What is asked of a Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["refuse_sharded", "validation_loaders"]


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders whose batches come with an index of their own.

    Args:
        trainer: The trainer.

    Returns:
        The loaders; None for several that run side by side.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == TrainerFn.FITTING else trainer.validate_loop
    # `trainer.val_dataloaders` shows the loaders of an earlier fit during `trainer.validate()`, and hides whether they
    # are run one after the other.
    combined = loop._combined_loader
    if combined is None:
        return [None]
    return list(combined.flattened) if combined._mode == "sequential" else [None]


def refuse_sharded(callback: Callback, trainer: Trainer, stage: str) -> None:
    """Refuses strategies under which no process holds the whole module.

    Args:
        callback: Who asks.
        trainer: The trainer.
        stage: The stage about to begin.

    Raises:
        MisconfigurationException: If the strategy shards the module.
    """
    sharding = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if stage in {"fit", "validate"} and isinstance(trainer.strategy, sharding):
        raise MisconfigurationException(
            f"`{type(callback).__name__}` must have a strategy that keeps the module whole on each device, got "
            f"{type(trainer.strategy).__name__}. Train with strategy='ddp' or on one device, or measure a "
            "checkpoint afterwards with `lie_metric.LocalEquivarianceError`."
        )
