"""The protocol by which a tensor carries the action of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lie_metric.algebra import Generator
from lie_metric.resampling import Resampling

__all__ = ["Representation", "check_axes", "transformed"]


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


def transformed(representation: Any, tensor: Tensor, maps: Tensor) -> Tensor:
    """A tensor after maps of space, refused where its representation does not say what they do.

    Args:
        representation: How it moves.
        tensor: The tensor.
        maps: Where points go, (B or 1, d, d + 1).

    Returns:
        The tensor, of the same shape.

    Raises:
        TypeError: If the representation has no ``transform``.

    Example:
        >>> import torch
        >>> from lie_metric.representations import Points
        >>> transformed(Points(1), torch.tensor([[3.0]]), torch.tensor([[[-1.0, 0.0]]])).item()
        -3.0
    """
    own = getattr(representation, "transform", None)
    if not callable(own):
        raise TypeError(
            f"`representation` must have a method `transform(tensor, maps)` for maps that are no exponentials, got "
            f"{representation!r}. Add one, with maps of points of shape (B or 1, d, d + 1)."
        )
    return own(tensor, maps)
