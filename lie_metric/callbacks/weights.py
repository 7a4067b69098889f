"""Weights of another time in a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["exchange", "tensors_of"]


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once.

    Args:
        module: The module.

    Returns:
        Tensors by name.
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def exchange(tensors: Mapping[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Exchanges values in place; `data` leaves no trace in the version counters that autograd compares.

    Args:
        tensors: Tensors by name.
        kept: The other values by name; afterwards those that the tensors had.
    """
    for name, tensor in tensors.items():
        current = tensor.data.to(kept[name].device, copy=True)
        tensor.data.copy_(kept[name])
        kept[name] = current
