"""Elements taken from one tensor or another, and those that others are put in the place of."""

from __future__ import annotations

from typing import Any

import torch

from lie_metric.jacobian.carrying import Dual, plain, wrap
from lie_metric.jacobian.rules.arguments import aligned, only_first

__all__ = ["constant", "index_fill", "masked_fill", "where", "written_over"]


def where(func: Any, args: tuple, kwargs: dict) -> Any:
    """Elements of two tensors, of which either may be at rest."""
    if len(args) != 3:
        return NotImplemented
    condition, first, second = args
    value = func(condition, plain(first), plain(second))
    zero = value.new_zeros(())
    moved = [aligned(arg, value.ndim) if isinstance(arg, Dual) else zero for arg in (first, second)]
    tangents = torch.where(condition, moved[0], moved[1]).to(value.dtype)
    return wrap(value, tangents.expand(len(tangents), *value.shape))


def masked_fill(func: Any, args: tuple, kwargs: dict) -> Any:
    """Elements at rest in the place of some."""
    if not only_first(args, kwargs):
        return NotImplemented
    dual, mask, filling = args
    value = func(dual.value, mask, filling)
    tangents = aligned(dual, value.ndim).masked_fill(mask, 0)
    return wrap(value, tangents.expand(len(tangents), *value.shape))


def index_fill(func: Any, args: tuple, kwargs: dict) -> Any:
    """By the rule of what it is made of: `vmap` fills all rows with the last one's number (seen in torch 2.14)."""
    dual, axis, index, filling = args
    if not isinstance(filling, Dual):
        return NotImplemented
    chosen = torch.zeros_like(plain(dual), dtype=torch.bool).index_fill(axis, index, True)
    return torch.where(chosen, filling.to(dual.dtype), dual)


def constant(func: Any, args: tuple, kwargs: dict) -> Any:
    """A tensor filled anew."""
    if not only_first(args, kwargs):
        return NotImplemented
    return func(plain(args[0]), *args[1:])


def written_over(func: Any, args: tuple, kwargs: dict) -> Any:
    """What :meth:`copy_` leaves of its target."""
    target, source = args[:2]
    value = func(plain(target), plain(source), *args[2:])
    if not isinstance(source, Dual):
        return value
    tangents = aligned(source, value.ndim).to(value.dtype)
    return wrap(value, tangents.expand(len(tangents), *value.shape), (source,))
