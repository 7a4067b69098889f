"""What containers, arrays and slots of a model hold, kept by reference and put back."""

from __future__ import annotations

import array
import collections
import operator
from typing import Any

__all__ = ["MUTABLE", "Saved", "contents", "give_back", "holds", "names_of_slots", "write_back"]


MUTABLE = (dict, list, set, collections.deque)

# Keys and values; a copy of a dictionary would be several times as large.
Saved = tuple[tuple[Any, ...], tuple[Any, ...]]


def contents(container: Any) -> Saved:
    """What a container holds; a list or set has no keys.

    Args:
        container: A dictionary, list, set or deque.

    Returns:
        Its keys and its values.
    """
    return (tuple(container), tuple(container.values())) if isinstance(container, dict) else ((), tuple(container))


def holds(container: Any, saved: Saved) -> bool:
    """Whether a container has the same objects under the same keys, in the same order.

    Args:
        container: The container.
        saved: What it held.

    Returns:
        Whether it has.
    """
    keys, values = saved
    if len(container) != len(values):
        return False
    if not isinstance(container, dict):
        return all(map(operator.is_, container, values))
    return all(map(operator.is_, container.values(), values)) and all(map(operator.is_, container, keys))


def give_back(container: Any, saved: Saved) -> None:
    """Puts back what a container held.

    Args:
        container: The container.
        saved: What it held.
    """
    if holds(container, saved):
        return
    keys, values = saved
    if not isinstance(container, dict):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(values)
        return
    entries = dict(zip(keys, values, strict=True))
    if list(container) != list(entries):
        container.clear()
    for key, value in entries.items():  # some, as counters, add what `update` is given
        container[key] = value


def names_of_slots(cls: type) -> tuple[str, ...]:
    """The attributes that objects of a class have in slots.

    Args:
        cls: The class.

    Returns:
        Their names.
    """
    names = cls.__dict__.get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in names if name not in {"__dict__", "__weakref__"})


def write_back(values: Any, copy: Any) -> None:
    """Gives an array its values back, and its length.

    Args:
        values: The array.
        copy: A copy of what it held.
    """
    if isinstance(values, (array.array, bytearray)):
        if values != copy:
            values[:] = copy
    elif values.shape != copy.shape or values.tobytes() != copy.tobytes():
        if values.shape != copy.shape:
            values.resize(copy.shape, refcheck=False)
        values[...] = copy
