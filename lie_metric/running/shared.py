"""Buffers that processes hold each on its own: those of the first, for a measurement that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lie_metric.running.processes import add_up, process
from lie_metric.running.tensors import is_ordinary

__all__ = ["buffers_of_the_first", "shared_buffers"]

Places = list[tuple[nn.Module, str, Tensor]]


def buffers_of_the_first(modules: Iterable[nn.Module], device: torch.device) -> Places:
    """Copies of the first process's buffers; every process has to ask for it.

    Running statistics of batch normalisation are each process's own in training. Checkpoints keep those of the first
    process, and data parallelism exchanges them when it runs the next time.

    Args:
        modules: Modules that all processes have alike.
        device: One by which processes talk to one another.

    Returns:
        Module, name and value; none in a single process.

    Raises:
        ValueError: If processes have buffers of other sizes.
    """
    rank, world = process()
    if world == 1:
        return []
    held = [
        (module, name, buffer)
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
        for name, buffer in module._buffers.items()
        if buffer is not None and is_ordinary(buffer) and not buffer.is_meta
    ]
    with torch.inference_mode(False), torch.no_grad():
        parts = [buffer.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for *_, buffer in held]
        told = torch.zeros(world, dtype=torch.int64, device=device)
        told[rank] = sum(map(len, parts))
        sizes = add_up(told).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`model` must have the same buffers on every process, got {sizes} bytes by rank. Measure it on one "
                "process, or give buffers whose size depends on data the same size."
            )
        if not sizes[0]:
            return []
        bytes_ = torch.cat(parts)
        torch.distributed.broadcast(bytes_, 0)
        return [
            (module, name, value.clone().view(buffer.dtype).view(buffer.shape).to(buffer.device))
            for (module, name, buffer), value in zip(held, bytes_.split([len(part) for part in parts]), strict=True)
        ]


@contextmanager
def shared_buffers(places: Places) -> Iterator[None]:
    """Puts buffers into their modules; afterwards the modules have their own again.

    Args:
        places: As of :func:`buffers_of_the_first`.

    Yields:
        Nothing.
    """
    own = [(module, name, module._buffers[name]) for module, name, _ in places]
    try:
        for module, name, value in places:
            module._buffers[name] = value
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
