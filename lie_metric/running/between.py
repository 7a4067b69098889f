"""What a model holds between two calls of one measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lie_metric.running.containers import MUTABLE, Saved, contents, give_back, holds
from lie_metric.running.modules import OWN
from lie_metric.running.tensors import address_of, is_ordinary

__all__ = ["Between"]


class Between:
    """What a model holds between two calls of one measurement: attributes by reference, buffers by value.

    A buffer counts as changed when its count of writes moved, or when torch was seen to write to its memory, as by way
    of ``.data``. What is written to by other means (through ``.numpy()``, or by compiled code that does not count) is
    given back after the measurement, but not between its calls.

    Args:
        modules: The modules.
        values: Copies of buffers that there are already, by ``id`` of the buffer.
    """

    def __init__(self, modules: Iterable[nn.Module], values: Mapping[int, Tensor | None]) -> None:
        self._attributes: list[tuple[dict[str, Any], Saved]] = []
        self._containers: list[tuple[Any, Saved]] = []
        self._buffers: list[tuple[dict[str, Any], str, Any]] = []
        self._tensors: dict[int, list[Any]] = {}
        self._memories: dict[int, list[list[Any]]] = {}
        for module in modules:
            self._attributes.append((module.__dict__, contents(module.__dict__)))
            for key, value in module.__dict__.items():
                if key not in OWN and isinstance(value, MUTABLE):
                    self._containers.append((value, contents(value)))
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its buffers stand in no dictionary
            for name, buffer in module._buffers.items():
                self._buffers.append((module._buffers, name, buffer))
                if buffer is not None and is_ordinary(buffer) and not buffer.is_meta and not buffer.is_inference():
                    copy = values.get(id(buffer))
                    copy = buffer.detach().clone() if copy is None else copy
                    self._tensors[id(buffer)] = [buffer, copy, buffer._version, buffer.data_ptr()]

    def before_write(self, address: int) -> None:
        """Marks buffers as changed.

        Args:
            address: Of the memory that is about to be written to.
        """
        if not address:
            return  # a tensor without memory shares none, and a buffer without entries is at 0
        if not self._memories:
            for kept in self._tensors.values():
                self._memories.setdefault(address_of(kept[0]), []).append(kept)
        for kept in self._memories.get(address, ()):
            kept[2] = -1

    def restore(self) -> None:
        """Gives back what a call has changed."""
        for container, saved in self._containers:
            give_back(container, saved)
        for attributes, saved in self._attributes:
            if holds(attributes, saved):
                continue
            own = {key: value for key, value in zip(*saved, strict=True) if key not in OWN}
            for key in attributes.keys() - own.keys() - OWN:
                del attributes[key]
            attributes.update(own)
        for place, name, buffer in self._buffers:
            if place.get(name) is not buffer:
                place[name] = buffer
        for kept in self._tensors.values():
            buffer, value, version, pointer = kept
            if buffer.data_ptr() != pointer or buffer.shape != value.shape:
                buffer.data = value.clone()  # its own memory is given back after the measurement
                kept[2:] = buffer._version, buffer.data_ptr()
            elif buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
                kept[2] = buffer._version
