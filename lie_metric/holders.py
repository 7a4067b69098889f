"""Reading and replacing the named parts of mappings, tuples and objects."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["entry", "held", "recast", "replaced", "tensor_of", "tensors"]


def tensor_of(holder: Any, key: str, name: str = "inputs") -> Tensor:
    """The floating-point tensor under a name.

    Args:
        holder: A mapping, a tuple or list, or an object with attributes.
        key: A key, an index or an attribute; dotted where it is deeper.
        name: What the holder is called in messages.

    Returns:
        The tensor.

    Raises:
        KeyError: If there is no such part.
        TypeError: If it is no floating-point tensor.
    """
    part = entry(holder, key, name)
    if not isinstance(part, Tensor) or not part.is_floating_point():
        got = part.dtype if isinstance(part, Tensor) else type(part).__name__
        raise TypeError(f"`{name}[{key!r}]` must be a floating-point tensor to be measured, got {got}.")
    return part


def entry(holder: Any, key: str, name: str = "inputs") -> Any:
    """What stands under a name.

    Args:
        holder: As in :func:`tensor_of`.
        key: As in :func:`tensor_of`.
        name: As in :func:`tensor_of`.

    Returns:
        The part.

    Raises:
        KeyError: If there is none.

    Example:
        >>> entry({"nodes": (1, 2)}, "nodes.1")
        2
    """
    for step in str(key).split("."):
        try:
            holder = _get(holder, step)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError):
            raise KeyError(
                f"`{name}` must have a part {key!r}, got {type(holder).__name__} with {held(holder)}."
            ) from None
    return holder


def _get(holder: Any, step: str) -> Any:
    if isinstance(holder, Mapping):
        return holder[step]
    if isinstance(holder, (tuple, list)):
        return holder[int(step)]
    return getattr(holder, step)


def held(holder: Any) -> list[str]:
    """The names of what a holder holds at its first level.

    Args:
        holder: As in :func:`tensor_of`.

    Returns:
        The names.

    Example:
        >>> held((1, 2))
        ['0', '1']
    """
    if isinstance(holder, Mapping):
        return [str(key) for key in holder]
    if isinstance(holder, (tuple, list)):
        return [str(index) for index in range(len(holder))]
    keys = getattr(holder, "keys", None)
    return sorted(keys() if callable(keys) else vars(holder) if hasattr(holder, "__dict__") else [])


def replaced(holder: Any, path: list[str], part: Tensor) -> Any:
    """A shallow copy of what holds parts, with another tensor in one place.

    Args:
        holder: As in :func:`tensor_of`.
        path: The steps of the name.
        part: The tensor.

    Returns:
        The copy.

    Example:
        >>> replaced((torch.zeros(1), 5), ["0"], torch.ones(1))
        (tensor([1.]), 5)
    """
    if not path:
        return part
    step, *rest = path
    inner = replaced(_get(holder, step), rest, part)
    if isinstance(holder, tuple):
        entries = [inner if index == int(step) else entry for index, entry in enumerate(holder)]
        return type(holder)(*entries) if hasattr(holder, "_fields") else tuple(entries)
    made = copy.copy(holder)
    if isinstance(made, list):
        made[int(step)] = inner
    elif isinstance(made, Mapping):
        cast("dict[str, Any]", made)[step] = inner
    else:
        setattr(made, step, inner)
    return made


def recast(holder: Any, dtype: torch.dtype) -> Any:
    """What holds parts with its floating-point tensors, at any depth, in another dtype, and none of inference mode.

    Args:
        holder: As in :func:`tensor_of`.
        dtype: The dtype.

    Returns:
        A shallow copy.

    Example:
        >>> recast({"pos": torch.zeros(1), "z": torch.zeros(1, dtype=torch.long)}, torch.float64)["pos"].dtype
        torch.float64
    """

    def cast_(value: Any) -> Any:
        if isinstance(value, (Mapping, tuple, list)):
            # What holds none, such as settings, is not copied: it may be of a kind that cannot be.
            return recast(value, dtype) if any(True for _ in tensors(value)) else value
        if not isinstance(value, Tensor):
            return value
        value = value.to(dtype) if value.is_floating_point() else value
        return value.clone() if value.is_inference() else value

    if isinstance(holder, tuple):
        return type(holder)(*map(cast_, holder)) if hasattr(holder, "_fields") else tuple(map(cast_, holder))
    made = copy.copy(holder)
    if isinstance(made, list):
        return list(map(cast_, made))
    if isinstance(made, Mapping):
        for key, value in dict(made).items():
            cast("dict[Any, Any]", made)[key] = cast_(value)
        return made
    for name in held(made):
        value = getattr(made, name, None)
        if isinstance(value, (Tensor, Mapping, tuple, list)):
            setattr(made, name, cast_(value))
    return made


def tensors(holder: Any) -> Iterator[Tensor]:
    """The tensors that :func:`recast` reaches.

    Args:
        holder: As in :func:`tensor_of`.

    Yields:
        The tensors.

    Example:
        >>> [one.item() for one in tensors({"pos": torch.ones(()), "atoms": (torch.zeros(()), "C")})]
        [1.0, 0.0]
    """
    if isinstance(holder, Mapping):
        values = list(holder.values())
    elif isinstance(holder, (tuple, list)):
        values = list(holder)
    else:
        values = [getattr(holder, name, None) for name in held(holder)]
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, tuple, list)):
            yield from tensors(value)
