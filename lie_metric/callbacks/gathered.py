"""The whole weights of a module that a strategy shards, for as long as a monitor measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from lightning.pytorch import LightningModule, Trainer

from lie_metric.callbacks.trainers import outermost
from lie_metric.running import Unsharded, gather, is_sharded

__all__ = ["Weights"]


class Weights:
    """The weights of this epoch; several monitors of a Trainer share them."""

    def __init__(self) -> None:
        self._whole: Unsharded | Exception | None = None

    def forget(self) -> None:
        """Frees them."""
        self._whole = None

    def gather(self, trainer: Trainer, pl_module: LightningModule, others: Iterable[Weights]) -> None:
        """Gathers the weights of a module that is sharded, unless that is done; all processes have to ask for it.

        Args:
            trainer: The trainer.
            pl_module: The module.
            others: Those of other monitors, which may have done it.
        """
        if self._whole is not None or not is_sharded(outermost(trainer, pl_module).modules()):
            return
        self._whole = next((other._whole for other in others if other._whole is not None), None)
        if self._whole is None:
            try:
                self._whole = gather(outermost(trainer, pl_module), pl_module.device)
            except Exception as error:  # of all processes alike
                self._whole = error

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Puts them into the module; does nothing to one that is not sharded.

        Yields:
            Nothing.

        Raises:
            Exception: Why they could not be had.
        """
        if isinstance(self._whole, Exception):
            raise self._whole
        with nullcontext() if self._whole is None else self._whole.standing():
            yield
