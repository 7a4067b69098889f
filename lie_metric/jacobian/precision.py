"""The coarsest precision that a function computes in, whatever the type of its inputs is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["coarsest"]


class _Coarsest(TorchDispatchMode):
    """Notes the largest rounding of the floating-point types that tensors have on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor) and part.is_floating_point():
                self.eps = max(self.eps, torch.finfo(part.dtype).eps)
        return result


def coarsest(function: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """The largest relative rounding on the way of some inputs through a function.

    Args:
        function: The function.
        inputs: Where it is evaluated.

    Returns:
        The largest ``torch.finfo(dtype).eps`` of its tensors.

    Example:
        >>> x = torch.ones(2, dtype=torch.float64)
        >>> coarsest(lambda v: v.float().exp().double(), x) == torch.finfo(torch.float32).eps
        True
    """
    mode = _Coarsest()
    try:
        with mode:
            value = function(inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        value = function(inputs)  # what does not run beneath such a mode says nothing of its types
    return max(mode.eps, torch.finfo(value.dtype).eps)
