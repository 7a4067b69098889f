"""Tensors that a model holds, kept with their memory and their values, and put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as _flat

__all__ = ["Kept", "address_of", "different", "equal", "is_ordinary", "version_of"]


_TENSORS = {Tensor, nn.Parameter, nn.Buffer}


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor has a memory of its own, and can be compared and copied without asking other processes.

    Args:
        tensor: The tensor.

    Returns:
        Whether that is so.
    """
    return type(tensor) in _TENSORS and tensor.layout == torch.strided and not tensor.is_quantized


@dataclass(slots=True)
class Kept:
    """A tensor that a model holds.

    Attributes:
        path: Where.
        tensor: The tensor.
        memory: What shares its memory and keeps its shape, whatever is done to the tensor.
        version: How often it had been written to.
        value: A copy; None until something is about to write to it.
    """

    path: str
    tensor: Tensor
    memory: Tensor
    version: int
    value: Tensor | None = None
    recorded: bool = False

    def restore(self) -> None:
        """Puts the tensor back into its memory, and its values into that."""
        if self.tensor.is_inference():
            return  # a copy stood in its place
        if is_ordinary(self.tensor) and (
            self.tensor.data_ptr() != self.memory.data_ptr() or self.tensor.shape != self.memory.shape
        ):
            self.tensor.data = self.memory
        if self.value is not None:
            with torch.no_grad():
                self.tensor.copy_(self.value)
        if self.tensor.grad_fn is not None and not self.recorded:
            self.tensor.detach_()  # autograd took note of what a call wrote into it


def different(buffers: Iterable[Kept]) -> dict[int, Kept]:
    """Those whose values are no longer those that were kept, with one wait for each device.

    Args:
        buffers: What was kept.

    Returns:
        Those that differ, by ``id`` of the tensor.
    """
    found: dict[int, Kept] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, Kept]]] = {}
    for kept in buffers:
        tensor, value = kept.tensor, kept.value
        if value is None or tensor.is_inference():
            continue
        if not is_ordinary(tensor):
            if version_of(tensor) != kept.version:
                found[id(tensor)] = kept
        elif tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            found[id(tensor)] = kept
        else:
            alike.setdefault((tensor.device, tensor.dtype), []).append((tensor, value, kept))
    unequal: dict[torch.device, list[tuple[list[tuple[Tensor, Tensor, Kept]], Tensor]]] = {}
    with torch.no_grad():
        for (device, _), group in alike.items():
            # Networks have many small buffers: all of a kind are compared at once.
            present, values, _ = map(list, zip(*group, strict=True))
            unequal.setdefault(device, []).append((group, (_flat(present) != _flat(values)).any()))
    for groups in unequal.values():
        flags = torch.stack([flag for _, flag in groups]).tolist()
        for (group, _), flag in zip(groups, flags, strict=True):
            if flag:
                found |= {id(tensor): kept for tensor, value, kept in group if not equal(tensor, value)}
    return found


def equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, NaN among them; False for one that carries tangents.

    Args:
        tensor: A tensor.
        other: Another.

    Returns:
        Whether they have.
    """
    if not is_ordinary(tensor) or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    try:
        return bool(((tensor == other) | (tensor.isnan() & other.isnan())).all())
    except (RuntimeError, NotImplementedError):  # one that a transform of torch.func has left behind
        return False


def version_of(tensor: Tensor) -> int:
    """How often a tensor had been written to; 0 for one made in inference mode.

    Args:
        tensor: The tensor.

    Returns:
        The count.
    """
    return 0 if tensor.is_inference() else tensor._version


def address_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor shares with its views; 0 if it has none.

    Args:
        tensor: The tensor.

    Returns:
        The address.
    """
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
