"""The options of the pure functions: those given, over the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["chosen_options"]


def chosen_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, and the default of every other one.

    Args:
        options: What was given.
        defaults: Every option there is, with its default.

    Returns:
        A value for each option.

    Raises:
        TypeError: If an option is unknown.

    Example:
        >>> chosen_options({"seed": 1}, {"output": "logits", "seed": 0})
        {'output': 'logits', 'seed': 1}
    """
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise TypeError(f"`options` must be among {sorted(defaults)}, got {unknown}.")
    return {**defaults, **options}
