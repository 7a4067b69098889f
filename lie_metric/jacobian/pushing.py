"""A function run once with tensors that carry their tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lie_metric.jacobian.carrying import FUSED, Dual, carries, dispatch, motionless, wrap
from lie_metric.jacobian.memory import Tangents, Unknown
from lie_metric.jacobian.refusals import NumberTaken, Unsupported

__all__ = ["Fused", "first_undefined", "push_forward"]


def push_forward(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, created: bool = False
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivatives along K tangents, from one run of the function.

    Args:
        function: A function of one tensor, built of operations of torch, which may write into the tensor. Gradients
            must be disabled.
        inputs: Any shape S.
        tangents: Shape (K, *S).
        created: Whether tensors that the function creates carry tangents, so that moving ones can be written into them;
            it takes longer.

    Returns:
        The value, shape S', and the derivatives, shape (K, *S').

    Raises:
        Unsupported: If the function does what tangents cannot follow.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> push_forward(lambda v: v.square(), x, torch.eye(2))[1].tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    moving = Tangents(tangents)
    moving.sharing.append(lambda: tangents)  # the caller's, who may still need them
    start = wrap(inputs, moving)
    NumberTaken.happened = False
    with _Created(len(tangents)) if created else Fused():
        result = function(start)
    del start
    if NumberTaken.happened:
        raise NumberTaken
    if not isinstance(result, Tensor):
        raise Unsupported(f"the function returns {type(result).__name__}")
    if not isinstance(result, Dual):
        if torch._C._functorch.is_functorch_wrapped_tensor(result):
            raise Unsupported("the function returns a tensor of a transform that has ended")
        return result, result.new_zeros((len(tangents), *result.shape))
    return result.value, result.tangents.expand(len(tangents), *result.shape)


def first_undefined(function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor) -> str:
    """The first operation whose result is finite and whose derivative is not.

    Args:
        function: As in :func:`push_forward`.
        inputs: As in :func:`push_forward`.
        tangents: As in :func:`push_forward`.

    Returns:
        Its name, as ``"sqrt"``; empty if there is none, or the function cannot be followed that far.

    Example:
        >>> first_undefined(lambda x: x.square().sqrt().exp(), torch.zeros(2), torch.ones(1, 2))
        'sqrt'
    """
    seen = _Undefined()
    try:
        with torch.no_grad(), seen:
            function(wrap(inputs, tangents))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        pass  # what was seen before counts
    return seen.name


class _Undefined(TorchDispatchMode):
    """Looks for the first operation by which tangents are lost to NaN or infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, Dual) for leaf in tree_iter((args, kwargs))):
            return func(*args, **kwargs)
        result = dispatch(func, args, kwargs)
        for leaf in tree_iter(result):
            if self.name or not isinstance(leaf, Dual) or isinstance(leaf.moving, Unknown):
                continue
            if bool(torch.isfinite(leaf.value).all()) and not bool(torch.isfinite(leaf.tangents).all()):
                self.name = func._overloadpacket.__name__
        return result


class Fused(TorchFunctionMode):
    """Lets torch functions that have a rule as a whole use it; whatever does not pass here is right as well."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = FUSED.get(func)
        if rule is not None:
            result = rule(func, args, kwargs or {})
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


class _Created(TorchDispatchMode):
    """Tensors that are created carry tangents: zeros, into which others can be written."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        moving = any(isinstance(leaf, Dual) for leaf in tree_iter((args, kwargs)))
        result = dispatch(func, args, kwargs) if moving else func(*args, **kwargs)
        if func._overloadpacket.__name__ in _CREATING and type(result) is Tensor and carries(result):
            return wrap(result, motionless(result, self.count))
        return result


_CREATING = {
    "zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "empty_strided", "new_empty_strided", "clone", "scalar_tensor", "linspace", "eye",
    "arange", "_to_copy", "lift_fresh",
}  # fmt: skip
