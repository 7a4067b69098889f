"""Tests as a second validation: callbacks that measure in ``trainer.test()`` too, where they are asked to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

__all__ = ["InTests"]


class InTests(Callback):
    """A callback whose hooks of tests are those of validation, if :attr:`test` is true.

    Attributes:
        test: Whether they are.
    """

    test = False

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation, if tests are measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.test:
            self.on_validation_epoch_start(trainer, pl_module)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation, if tests are measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch; not used.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        if self.test:
            self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in validation, if tests are measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What ``test_step`` returned; not used.
            batch: The batch, on the module's device.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        if self.test:
            self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation, if tests are measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.test:
            self.on_validation_epoch_end(trainer, pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation, if tests are measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.test:
            self.on_validation_end(trainer, pl_module)
