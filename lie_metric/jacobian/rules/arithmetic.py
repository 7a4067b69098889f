"""Sums, differences, products and quotients of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import Dual, plain, wrap
from lie_metric.jacobian.memory import Tangents
from lie_metric.jacobian.rules.arguments import aligned, only_first
from lie_metric.jacobian.rules.pointwise import times

__all__ = ["addition", "difference", "negative", "product", "quotient", "reversed_difference"]


def addition(func: Any, args: tuple, kwargs: dict, into: Tangents | None = None, sign: int = 1) -> Any:
    """A sum; the tangents of its first argument are ``into`` if they are no longer needed."""
    first, second = args[:2]
    value = func(plain(first), plain(second), *args[2:], **kwargs)
    factor = sign * (args[2] if len(args) > 2 else kwargs.get("alpha", 1))
    if isinstance(first, Dual) and isinstance(second, Dual):
        if first.moving is second.moving and value.dtype == first.moving.raw.dtype:
            return wrap(value, first.moving.scaled(1 + factor))
        return wrap(value, _sum_of_both(first, second, value, factor, into))
    dual, factor = (first, 1) if isinstance(first, Dual) else (second, factor)
    if dual.shape == value.shape and dual.moving.raw.dtype == value.dtype:
        return wrap(value, dual.moving.scaled(None if factor == 1 else factor))
    tangents = aligned(dual, value.ndim)
    tangents = tangents if factor == 1 else factor * tangents
    return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype), (dual,))


def _sum_of_both(first: Dual, second: Dual, value: Tensor, factor: float, into: Tangents | None) -> Tensor:
    one, other = first.moving, second.moving
    alike = first.shape == second.shape and one.raw.shape == other.raw.shape and one.raw.dtype == other.raw.dtype
    out = one.raw if alike and into is one else None
    if alike and isinstance(other.factor, Tensor):
        return torch.addcmul(one.get(), other.raw, other.factor, value=factor, out=out)
    if alike and isinstance(one.factor, Tensor) and factor == 1:
        return torch.addcmul(other.get(), one.raw, one.factor, out=out)
    if out is not None:
        return one.get().add_(other.get(), alpha=factor)
    tangents = torch.add(aligned(first, value.ndim), aligned(second, value.ndim), alpha=factor)
    return tangents.expand(tangents.shape[0], *value.shape).to(value.dtype)


def difference(func: Any, args: tuple, kwargs: dict, into: Tangents | None = None) -> Any:
    """A difference; see :func:`addition`."""
    return addition(func, args, kwargs, into, sign=-1)


def reversed_difference(func: Any, args: tuple, kwargs: dict) -> Any:
    """``other - alpha * x``."""
    dual, other = args[:2]
    if len(args) > 2 or kwargs or not only_first(args, kwargs) or isinstance(other, Tensor):
        return NotImplemented
    value = func(dual.value, other)
    return wrap(value, times(dual, value, -1))


def product(func: Any, args: tuple, kwargs: dict) -> Any:
    """A product of one tensor that moves, or of two."""
    first, second = args
    a, b = plain(first), plain(second)
    value = func(a, b)
    if isinstance(first, Dual) and isinstance(second, Dual):
        if first.shape != value.shape:
            (first, a), (second, b) = (second, b), (first, a)
        one = first.moving
        if first.shape == value.shape and one.raw.dtype == second.moving.raw.dtype == value.dtype:
            tangents = one.raw * (b if one.factor is None else one.factor * b)
            return wrap(value, tangents.addcmul_(aligned(second, value.ndim), a))
        tangents = torch.addcmul(aligned(first, value.ndim) * b, aligned(second, value.ndim), a)
        return wrap(value, tangents.to(value.dtype))
    dual, factor = (first, b) if isinstance(first, Dual) else (second, a)
    lasting = _lasting(factor, value)
    if lasting is not None:
        return wrap(value, times(dual, value, lasting), (dual,))
    tangents = aligned(dual, value.ndim) * factor
    return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _lasting(factor: Any, value: Tensor) -> Any:
    """A factor of the function's as a number or a tensor that nobody can change, or None if its copy costs too much."""
    if isinstance(factor, Tensor):
        return factor.clone() if 4 * factor.numel() <= value.numel() else None
    return factor if isinstance(factor, (int, float)) else None


def quotient(func: Any, args: tuple, kwargs: dict) -> Any:
    """A quotient, of which either may move."""
    if kwargs:
        return NotImplemented  # where it rounds
    dual, divisor = args
    value = func(plain(dual), plain(divisor))
    if isinstance(divisor, Dual):
        moved = aligned(divisor, value.ndim) * value.neg()
        if isinstance(dual, Dual):
            moved = aligned(dual, value.ndim) + moved
        tangents = moved / divisor.value
        return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))
    if isinstance(divisor, (int, float)) and divisor:
        return wrap(value, times(dual, value, 1 / divisor), (dual,))
    tangents = aligned(dual, value.ndim) / divisor
    return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def negative(func: Any, args: tuple, kwargs: dict) -> Any:
    """Minus a tensor."""
    value = func(args[0].value)
    return wrap(value, times(args[0], value, -1), args)
