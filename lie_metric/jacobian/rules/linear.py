"""Operations that are linear in what moves: they map tangents as they map values, as one larger batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import Dual, above, carries, plain, wrap, wrap_all
from lie_metric.jacobian.rules.arguments import aligned, behind, count_of, only_first

__all__ = [
    "FOLDED",
    "LINEAR",
    "cat",
    "folded",
    "gathered",
    "indexed",
    "largest",
    "length",
    "linear_in_first",
    "of_matrices",
    "one_by_one",
    "padding",
    "pooled",
    "reduction",
    "repeated",
    "with_axes",
]


LINEAR = ("rot90", "take", "trace", "diag_embed", "masked_select", "take_along_dim", "_reshape_alias")
FOLDED = {
    3: ("upsample_nearest1d", "upsample_linear1d", "reflection_pad1d", "replication_pad1d", "avg_pool1d"),
    4: (
        "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "reflection_pad2d", "replication_pad2d", "avg_pool2d",
        "_adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    ),
    5: ("upsample_nearest3d", "upsample_trilinear3d", "replication_pad3d", "avg_pool3d", "_adaptive_avg_pool3d"),
}  # fmt: skip


def linear_in_first(func: Any, args: tuple, kwargs: dict) -> Any:
    """A function that is linear in its first argument maps tangents as it maps values."""
    if not only_first(args, kwargs):
        return NotImplemented
    dual, rest = args[0], args[1:]
    value = func(dual.value, *rest, **kwargs)
    if isinstance(value, Tensor) and not dual.ndim:  # `vmap` may take its own axis for one of a number
        return wrap(value, torch.stack([func(t, *rest, **kwargs) for t in dual.tangents]))
    with above():
        tangents = torch.vmap(lambda t: func(t, *rest, **kwargs))(dual.tangents)
    return wrap_all(value, tangents, (dual,))


def with_axes(place: int) -> Callable[[Any, tuple, dict], Any]:
    """A linear operation along an axis or several, which are the argument at a place.

    Args:
        place: The place.

    Returns:
        The rule.
    """

    def rule(func: Any, args: tuple, kwargs: dict) -> Any:
        axes = args[place] if len(args) > place else ()
        if not args[0].ndim or axes == ():
            return linear_in_first(func, args, kwargs)
        dual, moved = args[0], list(args)
        moved[place] = behind(axes) if isinstance(axes, int) else [behind(axis) for axis in axes]
        return wrap(func(dual.value, *args[1:], **kwargs), func(dual.tangents, *moved[1:], **kwargs), (dual,))

    return rule


def of_matrices(func: Any, args: tuple, kwargs: dict) -> Any:
    """A linear operation on the last two axes."""
    dual = args[0]
    return wrap(func(dual.value, *args[1:]), func(dual.tangents, *args[1:]))


def indexed(func: Any, args: tuple, kwargs: dict) -> Any:
    """Entries by indices; with axes between two of those, torch puts the chosen ones first."""
    dual, indices = args
    given = [place for place, index in enumerate(indices) if index is not None]
    if not dual.ndim or not given or given[-1] - given[0] >= len(given):
        return linear_in_first(func, args, kwargs)
    return wrap(func(dual.value, indices), func(dual.tangents, [None, *indices]))


def gathered(func: Any, args: tuple, kwargs: dict) -> Any:
    """Entries along one axis."""
    dual, axis, places = args[:3]
    if not dual.ndim or not places.ndim:
        return linear_in_first(func, args, kwargs)
    return wrap(
        func(dual.value, axis, places), func(dual.tangents, behind(axis), places.expand(count_of(dual), *places.shape))
    )


def repeated(func: Any, args: tuple, kwargs: dict) -> Any:
    """Copies side by side."""
    dual, times = args
    return wrap(func(dual.value, times), func(aligned(dual, len(times)), [1, *times]))


def folded(axes: int) -> Callable[[Any, tuple, dict], Any]:
    """A linear operation on a batch of so many axes, for which tangents are a larger batch.

    Args:
        axes: How many axes.

    Returns:
        The rule.
    """

    def rule(func: Any, args: tuple, kwargs: dict) -> Any:
        dual = args[0]
        if dual.ndim != axes or not only_first(args, kwargs):
            return linear_in_first(func, args, kwargs)
        value = func(dual.value, *args[1:])
        tangents = func(dual.tangents.flatten(0, 1), *args[1:])
        return wrap(value, tangents.unflatten(0, (count_of(dual), len(dual))))

    return rule


def one_by_one(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation that is linear in its tensors together, of which `vmap` does not know that."""
    count = next(count_of(arg) for arg in args if isinstance(arg, Dual))

    def moved(arg: Any, tangent: int) -> Any:
        if isinstance(arg, Dual):
            return arg.tangents[tangent]
        return torch.zeros_like(arg) if isinstance(arg, Tensor) and arg.is_floating_point() else arg

    value = func(*map(plain, args), **kwargs)
    return wrap(value, torch.stack([func(*(moved(arg, k) for arg in args), **kwargs) for k in range(count)]))


def padding(func: Any, args: tuple, kwargs: dict) -> Any:
    """Padding by a constant, which does not move."""
    dual, widths = args[:2]
    return wrap(func(dual.value, *args[1:]), func(dual.tangents, widths, 0), (dual,))


def cat(func: Any, args: tuple, kwargs: dict) -> Any:
    """Tensors side by side, of which some may be at rest."""
    parts, axis = args[0], args[1] if len(args) > 1 else 0
    value = func([plain(part) for part in parts], axis)
    count = next(count_of(part) for part in parts if isinstance(part, Dual))
    tangents = [
        part.tangents if isinstance(part, Dual) else part.new_zeros((1, *part.shape)).expand(count, *part.shape)
        for part in parts
    ]
    if func._overloadpacket.__name__ == "cat":  # empty ones of any shape are passed over
        tangents = [moved for part, moved in zip(parts, tangents, strict=True) if tuple(part.shape) != (0,)]
    joined = func(tangents, behind(axis)) if tangents else value.new_zeros((count, *value.shape))
    return wrap(value, joined.to(value.dtype))


def reduction(func: Any, args: tuple, kwargs: dict) -> Any:
    """A mean or sum, over all axes or some."""
    dual = args[0]
    if kwargs.get("dtype") not in {None, dual.dtype} or not carries(dual) or not dual.ndim:
        return NotImplemented
    axes, keep = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else False)
    value = func(dual.value, *args[1:], **kwargs)
    operation = torch.mean if func._overloadpacket.__name__ == "mean" else torch.sum
    return wrap(value, operation(dual.tangents, _behind_all(axes, dual), keepdim=keep))


def length(func: Any, args: tuple, kwargs: dict) -> Any:
    """The Euclidean norm, over all axes or some; where it is zero it is taken to be at rest, as torch does."""
    dual, order = args[0], args[1] if len(args) > 1 else 2
    if order != 2 or kwargs.get("dtype") not in {None, dual.dtype} or dual.is_complex() or not dual.ndim:
        return NotImplemented
    axes, keep = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else False)
    value = func(dual.value, *args[1:], **kwargs)
    moved = (dual.tangents * dual.value).sum(_behind_all(axes, dual), keepdim=keep)
    return wrap(value, moved.div_(value).masked_fill_(value == 0, 0))


def largest(func: Any, args: tuple, kwargs: dict) -> Any:
    """Maxima or minima over all axes or some, among equals the mean."""
    dual = args[0]
    if not dual.ndim:
        return NotImplemented
    axes, keep = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else False)
    value = func(dual.value, *args[1:])
    over = axes or list(range(dual.ndim))
    chosen = dual.value == func(dual.value, over, True)
    moved = torch.where(chosen, dual.tangents, 0).sum(_behind_all(axes, dual), keepdim=keep)
    return wrap(value, moved.div_(chosen.sum(over, keepdim=keep)))


def _behind_all(axes: Sequence[int] | None, dual: Dual) -> list[int]:
    return [behind(axis) for axis in axes] if axes else list(range(1, dual.ndim + 1))


def pooled(func: Any, args: tuple, kwargs: dict) -> Any:
    """Maxima with their places: tangents are taken from there."""
    dual = args[0]
    value, places = func(dual.value, *args[1:])
    axes = 2 if "2d" in func._overloadpacket.__name__ else 3
    flat = places.flatten(-axes)
    moved = dual.tangents.flatten(-axes).gather(-1, flat.expand(count_of(dual), *flat.shape))
    return wrap(value, moved.reshape(count_of(dual), *value.shape)), places
