"""The same elements in another order, shape or type: tangents follow by the same view, behind their own axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import carries, stands_for_a_view, wrap, wrap_all
from lie_metric.jacobian.refusals import Unsupported
from lie_metric.jacobian.rules.arguments import aligned, behind, count_of

__all__ = [
    "COPY",
    "SAME_ORDER",
    "along",
    "apart",
    "as_strided",
    "copy",
    "expand",
    "flipped",
    "other_numbers",
    "permute",
    "same_order",
    "transpose",
]


SAME_ORDER = ("view", "_unsafe_view", "unsqueeze", "squeeze", "reshape", "flatten")
COPY = ("clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "lift", "detach_copy", "alias_copy")


def same_order(func: Any, args: tuple, kwargs: dict) -> Any:
    """Another shape for the same elements in the same order."""
    dual = args[0]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype:
        raise Unsupported("the bits of numbers are read as those of another type")
    return wrap(value, dual.tangents.reshape(count_of(dual), *value.shape), (dual,))


def copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """The same elements at the same places: tangents are shared until somebody writes."""
    dual = args[0]
    value = func(dual.value, *args[1:], **kwargs)
    if value.dtype == dual.dtype and value.device == dual.device:
        return wrap(value, dual.moving.scaled(), (dual,))
    return wrap(value, dual.tangents.to(value.device, value.dtype), (dual,)) if carries(value) else value


def flipped(func: Any, args: tuple, kwargs: dict) -> Any:
    """A conjugate or negative view, which torch marks by a bit of the tensor: here a copy."""
    dual = args[0]
    value, tangents = (func(part).resolve_conj().resolve_neg() for part in (dual.value, dual.tangents))
    return stands_for_a_view(wrap(value, tangents), dual)


def other_numbers(func: Any, args: tuple, kwargs: dict) -> Any:
    """Complex numbers as pairs, or pairs as complex numbers, which must lie so."""
    dual = args[0]
    return wrap(func(dual.value), func(dual.tangents.resolve_conj().contiguous()), (dual,))


def along(*places: int) -> Callable[[Any, tuple, dict], Any]:
    """A linear operation along axes, whose numbers are the arguments at these places.

    Args:
        places: The places.

    Returns:
        The rule.
    """

    def rule(func: Any, args: tuple, kwargs: dict) -> Any:
        if not args[0].ndim:
            return NotImplemented
        expected = func._schema.arguments
        given = (*args, *(expected[place].default_value for place in range(len(args), places[-1] + 1)))
        dual, moved = args[0], list(given)
        for place in places:
            axis = given[place]
            if isinstance(axis, int):
                moved[place] = behind(axis)
            elif axis:
                moved[place] = [behind(a) for a in axis]
            else:
                return NotImplemented
        return wrap_all(func(dual.value, *args[1:]), func(dual.tangents, *moved[1:]), (dual,))

    return rule


def apart(func: Any, args: tuple, kwargs: dict) -> Any:
    """Pieces that may be changed in place one by one, although they come from one tensor."""
    found = along(2)(func, args, kwargs)
    if found is NotImplemented:
        return found
    return type(found)(wrap(part.value.clone(), part.tangents.clone()) for part in found)


def expand(func: Any, args: tuple, kwargs: dict) -> Any:
    """Views that show an element at several places."""
    dual = args[0]
    value = func(dual.value, *args[1:], **kwargs)
    tangents = aligned(dual, value.ndim)
    return wrap(value, tangents.expand(len(tangents), *value.shape), (dual,))


def transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    """The last two axes, or the only one."""
    dual = args[0]
    tangents = dual.tangents
    return wrap(func(dual.value), tangents.transpose(1, 2) if dual.ndim == 2 else tangents, (dual,))


def permute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Axes in another order."""
    dual, order = args
    moved = [0, *(axis % dual.ndim + 1 for axis in order)]
    return wrap(func(dual.value, order), dual.tangents.permute(moved), (dual,))


def as_strided(func: Any, args: tuple, kwargs: dict) -> Any:
    """A view by strides; tangents, which need not lie as the values do, are taken from the elements that it shows."""
    dual = args[0]
    value = func(dual.value, *args[1:])
    own, shown = _places(dual.value), _places(value)
    elements = torch.full((1 + max(int(places.max()) if places.numel() else 0 for places in (own, shown)),), -1)
    elements[own] = torch.arange(own.numel())
    chosen = elements[shown]
    if bool((chosen < 0).any()):
        raise Unsupported("a view by strides reads memory beside a tensor's own elements")
    return wrap(value, dual.tangents.flatten(1)[:, chosen.to(value.device)].unflatten(1, value.shape), (dual,))


def _places(value: Tensor) -> Tensor:
    """Where in its memory each element of a tensor is."""
    found = torch.tensor(value.storage_offset())
    for size, stride in zip(value.shape, value.stride(), strict=True):
        found = found[..., None] + stride * torch.arange(size)
    return found.flatten()
