"""Which of several processes this is, and what they add up to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_up", "process"]


def process() -> tuple[int, int]:
    """The rank of this process, and how many there are.

    Returns:
        Both; 0 and 1 where none are joined.

    Example:
        >>> process()
        (0, 1)
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def add_up(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, all of which have to ask for it.

    Args:
        values: The tensor, on a device by which processes talk to one another.

    Returns:
        The sum.

    Example:
        >>> add_up(torch.tensor([1.0])).item()
        1.0
    """
    if process()[1] > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values
