"""Weights of another time in a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["copies", "exchanged", "tensors_of"]


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once.

    Args:
        module: The module.

    Returns:
        Tensors by name.
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory.

    Args:
        tensors: Tensors by name.

    Returns:
        Their copies.
    """
    return {name: tensor.data.to("cpu", copy=True) for name, tensor in tensors.items()}


@contextmanager
def exchanged(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in a module; its own again afterwards, bit for bit, whatever fails on the way.

    Args:
        module: The module.
        weights: Values for every parameter and buffer.

    Yields:
        Nothing.

    Raises:
        ValueError: If the module has others by now.
    """
    tensors = tensors_of(module)
    if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError("`weights` must be for the parameters and buffers that the module has; they were replaced.")
    own = copies(tensors)
    try:
        _write(tensors, weights)
        yield
    finally:
        _write(tensors, own)


def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Sets values in place; `data` leaves no trace in the version counters that autograd compares."""
    for name, tensor in tensors.items():
        tensor.data.copy_(values[name])
