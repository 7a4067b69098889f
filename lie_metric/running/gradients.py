"""Functions that take gradients themselves, as those whose forces are gradients of an energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["GraphsKept", "gradients_as_needed"]


def gradients_as_needed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that can be measured without gradients although it takes some itself.

    ``pos.requires_grad_()`` has no effect under ``torch.no_grad()``, and ``torch.autograd.grad`` of what comes of it
    fails. Then, and from then on, the function runs with gradients enabled, and its result is detached.

    Args:
        function: A function of one tensor that is the same at each call, so that it can be begun again.

    Returns:
        The function; where gradients are enabled it is the one that was given.

    Example:
        >>> def force(pos):
        ...     return -torch.autograd.grad(pos.requires_grad_().square().sum(), pos)[0]
        >>> with torch.no_grad():
        ...     gradients_as_needed(force)(torch.ones(2))
        tensor([-2., -2.])
    """
    needed = False

    def call(inputs: Tensor) -> Tensor:
        nonlocal needed
        if torch.is_grad_enabled():
            return function(inputs)
        if not needed:
            try:
                return function(inputs)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
        fresh = inputs.clone()  # the first attempt may have set its `requires_grad`
        with torch.enable_grad():
            result = function(fresh)
        needed = True
        return result.detach()

    return call


class GraphsKept(TorchFunctionMode):
    """Gradients that a function takes itself can be differentiated again, as ``create_graph=True`` has it.

    Potentials ask for that in training alone (``create_graph=self.training``): in evaluation their forces have no
    graph, and a derivative of them by a backward pass would be lost.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            kwargs = {**kwargs, "create_graph": True, "retain_graph": True}
        elif func == _SET_REQUIRES_GRAD and args[0].requires_grad and args[1]:
            return None  # torch refuses to set what is so already, unlike `requires_grad_`
        return func(*args, **kwargs)


_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
