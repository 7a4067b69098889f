"""Warnings that are put down to the line of the user's that led to them, whatever stands between."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_BETWEEN = {
    "lie_metric",
    "torch",
    "torchmetrics",
    "lightning",
    "lightning_utilities",
    "pytorch_lightning",
    "contextlib",
}


def warn(message: str) -> None:
    """Warns at the first line on the stack that is neither of this library nor of those that call it.

    Python shows a message once for each line, so that a message about a model should name it: otherwise the same about
    a second model, measured in a loop, is not seen.

    Args:
        message: What is said.

    Warns:
        UserWarning: The message.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     warn("the buffer moved")
        >>> str(seen[0].message)
        'the buffer moved'
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
