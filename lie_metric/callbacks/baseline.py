"""The untrained model, kept until it is measured on the same images as the trained ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lie_metric.callbacks.weights import copies, exchanged, tensors_of
from lie_metric.curves.measurements import Measurement
from lie_metric.warning import warn

__all__ = ["Untrained"]


class Untrained:
    """Weights of the untrained model.

    Attributes:
        wanted: Whether they are to be kept.
        weights: By name, in main memory; None as long as there are none.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.weights: dict[str, Tensor] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether there are weights."""
        return self.weights is not None

    def forget(self) -> None:
        """Frees them."""
        self.weights, self.wanted = None, False

    def keep(self, module: torch.nn.Module) -> None:
        """Copies the weights of a module.

        Args:
            module: The module.
        """
        tensors = tensors_of(module)
        if any(map(is_lazy, tensors.values())):
            self.give_up("it has lazy modules that have not been called yet")
        else:
            self.weights = copies(tensors)

    def measure(self, module: torch.nn.Module, start: Measurement, measure: Callable[[], None]) -> None:
        """Measures with these weights in the module.

        Args:
            module: The module.
            start: What the measurement adds to, and where failures are kept.
            measure: What measures.
        """
        try:
            with exchanged(module, self.weights or {}):
                measure()
        except ValueError:
            self.give_up("its parameters or buffers were replaced in training")
        except Exception as error:
            start.errors = dict.fromkeys(start.metrics, error)

    def give_up(self, reason: str) -> None:
        """Frees them, and says why.

        Args:
            reason: Why.

        Warns:
            UserWarning: Always.
        """
        self.forget()
        warn(f"No baseline: the untrained model cannot be kept, because {reason.removesuffix('.')}.")
