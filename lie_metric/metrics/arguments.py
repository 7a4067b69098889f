"""Arguments of metrics: which a class takes, what tells two values of one apart, and groups of images."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["accepted", "told_apart", "validated_groups"]


def told_apart(value: Any) -> str:
    """Text that two options share only if they are the same: by value what is plain, all else by identity.

    Args:
        value: Any option.

    Returns:
        The text.

    Example:
        >>> one, other = (lambda: 0), (lambda: 0)
        >>> told_apart([1, None]) == told_apart((1, None)), told_apart(one) == told_apart(other)
        (True, False)
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return f"{type(value).__module__}.{type(value).__qualname__}({told_apart(entries)})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(told_apart, value))}]"
    if value is None or isinstance(value, (str, int, float, torch.dtype, torch.device)):
        return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"


@lru_cache(maxsize=64)
def accepted(kind: type, last: type) -> frozenset[str]:
    """The names of the arguments of a class, of those of its bases too where it passes others on."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {one.name for one in parameters if one.kind in {one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD}}
        if base is last or not any(one.kind == one.VAR_KEYWORD for one in parameters):
            break
    return frozenset(names)


def validated_groups(groups: Sequence[int] | Tensor, count: int) -> list[int]:
    """The group of each image as an integer."""
    advice = "Give one integer for each image, alike for images that belong together, such as crops of one photo."
    if isinstance(groups, Tensor):
        if groups.ndim != 1 or groups.dtype.is_floating_point or groups.dtype.is_complex or groups.dtype == torch.bool:
            raise TypeError(
                f"`groups` must be integers on one axis, got shape {tuple(groups.shape)} of {groups.dtype}. {advice}"
            )
        groups = groups.tolist()
    if isinstance(groups, str) or not hasattr(groups, "__len__") or not hasattr(groups, "__iter__"):
        raise TypeError(f"`groups` must be a sequence of integers, got {groups!r}. {advice}")
    found = list(groups)
    wrong = next((one for one in found if isinstance(one, bool) or not hasattr(one, "__index__")), None)
    if wrong is not None:
        raise TypeError(f"`groups` must be integers, got {wrong!r}. {advice}")
    if len(found) != count:
        raise ValueError(f"`groups` must have one entry for each of the {count} images, got {len(found)}. {advice}")
    numbers = [int(one.__index__()) for one in found]
    if any(one < 0 for one in numbers):
        raise ValueError(f"`groups` must not be negative, got {min(numbers)}. {advice}")
    return numbers
