"""The protocol by which a tensor carries the action of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lie_metric.algebra import Generator
from lie_metric.resampling import Resampling

__all__ = ["Representation", "check_axes"]


@runtime_checkable
class Representation(Protocol):
    """The protocol by which a tensor carries an action; any object with these methods is one.

    The actions must fit together: :meth:`tangents` is the derivative of :meth:`act` at t = 0 and linear in the
    generator. Finite transforms T_t of one-parameter groups act by :meth:`act`. Others, such as flips, need one more
    method, ``map(tensor, function)``, see :func:`map_grid`; it also tells what of the tensor has left the frame.
    """

    def check(self, tensor: Tensor, name: str) -> None:
        """Raises ValueError, naming the argument, if the tensor cannot carry the action."""

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions X_k · tensor: shape (K, *tensor.shape)."""

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The finite action T_t tensor: the shape of ``tensor``."""

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor as blocks (B, positions, elements); means over images pool the positions of a block."""


def check_axes(tensor: Tensor, name: str, layout: str, axes: int) -> None:
    """Refuses a tensor that is empty or has another number of axes.

    Args:
        tensor: What was given.
        name: The argument's name, for the message.
        layout: The axes in words.
        axes: How many there have to be.

    Raises:
        ValueError: If it does not fit.
    """
    if tensor.ndim != axes or tensor.numel() == 0:
        raise ValueError(
            f"`{name}` must be non-empty with axes {layout}, got shape {tuple(tensor.shape)}. "
            "Reshape it, or give the representation that fits (see `lie_metric.representations`)."
        )
