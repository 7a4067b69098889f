"""Pointwise functions: every tangent is multiplied by one derivative."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import Dual, above, wrap
from lie_metric.jacobian.memory import Tangents
from lie_metric.jacobian.rules.arguments import aligned, only_first

__all__ = ["POINTWISE", "SLOPES", "pointwise", "times"]


aten = torch.ops.aten


SLOPES: dict[str, Callable[..., Tensor]] = {
    # From the argument x, the value y and the further arguments.
    "relu": lambda x, y: (y > 0).to(x.dtype),
    "sigmoid": lambda x, y: y * (1 - y),
    "tanh": lambda x, y: torch.addcmul(torch.ones((), dtype=y.dtype, device=y.device), y, y, value=-1),
    "exp": lambda x, y: y.clone(),
    "log": lambda x, y: x.reciprocal(),
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y**3,
    "reciprocal": lambda x, y: -y * y,
    "abs": lambda x, y: x.sign(),
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "erf": lambda x, y: (-x * x).exp() * (2 / math.sqrt(math.pi)),
    "square": lambda x, y: 2 * x,
    "pow": lambda x, y, exponent: _power(x, exponent),
    "clamp": lambda x, y, low=None, high=None: _within(x, low, high),
    "clamp_min": lambda x, y, low: _within(x, low, None),
    "clamp_max": lambda x, y, high: _within(x, None, high),
    "log1p": lambda x, y: (x + 1).reciprocal(),
    "expm1": lambda x, y: y + 1,
    "silu": lambda x, y: aten.silu_backward(torch.ones_like(x), x),
    "mish": lambda x, y: aten.mish_backward(torch.ones_like(x), x),
    "hardswish": lambda x, y: aten.hardswish_backward(torch.ones_like(x), x),
    "hardsigmoid": lambda x, y: aten.hardsigmoid_backward(torch.ones_like(x), x),
    "gelu": lambda x, y, approximate="none": aten.gelu_backward(torch.ones_like(x), x, approximate=approximate),
    "leaky_relu": lambda x, y, slope=0.01: aten.leaky_relu_backward(torch.ones_like(x), x, slope, False),
    "hardtanh": lambda x, y, low=-1, high=1: aten.hardtanh_backward(torch.ones_like(x), x, low, high),
    "softplus": lambda x, y, beta=1, threshold=20: aten.softplus_backward(torch.ones_like(x), x, beta, threshold),
}

POINTWISE = ("elu", "log2", "atan", "threshold")


def _power(x: Tensor, exponent: Any) -> Any:
    if not isinstance(exponent, (int, float)):
        return NotImplemented
    return exponent * x ** (exponent - 1) if exponent else torch.zeros_like(x)


@functools.cache
def _bounds_move() -> bool:
    """Whether a number that is a bound counts as not cut, in which versions of torch differ, in every mode."""
    bound = torch.zeros((), device="cpu")
    with above():
        _, slope = cast(
            tuple[Tensor, Tensor], torch.func.jvp(lambda v: v.clamp(min=0), (bound,), (torch.ones_like(bound),))
        )
    return bool(slope)


def _within(x: Tensor, low: Any, high: Any) -> Any:
    """One where a number is not cut."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return NotImplemented  # torch has halves there where they are equal
    over, under = (torch.ge, torch.le) if _bounds_move() else (torch.gt, torch.lt)
    inside = torch.ones_like(x, dtype=torch.bool) if low is None else over(x, low)
    return (inside if high is None else inside & under(x, high)).to(x.dtype)


def pointwise(func: Any, args: tuple, kwargs: dict) -> Any:
    """A pointwise function multiplies every tangent by one derivative."""
    if not only_first(args, kwargs) or any(isinstance(arg, Tensor) and arg.ndim for arg in args[1:]):
        return NotImplemented
    dual, rest = args[0], args[1:]
    value = dual.value
    if not value.is_floating_point():
        return NotImplemented  # the derivative of a complex function need not be one number
    slope = SLOPES.get(func._overloadpacket.__name__)
    if slope is not None:
        result = func(value, *rest, **kwargs)
        derivative = slope(value, result, *rest, **kwargs)
        if derivative is not NotImplemented:
            return wrap(result, times(dual, result, derivative))
    with above():
        result, derivative = cast(
            tuple[Tensor, Tensor],
            torch.func.jvp(
                lambda v: func(v, *rest, **kwargs), (value.contiguous(),), (torch.ones_like(value).contiguous(),)
            ),
        )
    return wrap(result, times(dual, result, derivative))


def times(dual: Dual, value: Tensor, factor: Tensor | float) -> Tangents:
    """Tangents times a factor, later if that is possible.

    Args:
        dual: The tensor with the tangents.
        value: The result of the operation.
        factor: The factor, nobody else's.

    Returns:
        The tangents of the result.
    """
    kept = value.shape == dual.shape and value.dtype == dual.moving.raw.dtype
    if kept and (not isinstance(factor, Tensor) or factor.dtype == value.dtype):
        return dual.moving.scaled(factor)
    tangents = aligned(dual, value.ndim) * factor
    return Tangents(tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))
