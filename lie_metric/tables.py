"""Numbers, tables and paragraphs as text, and the package that frames are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["aligned", "pandas", "short", "wrapped"]


def short(value: float) -> str:
    """A number with three digits.

    Args:
        value: The number.

    Returns:
        Its text.
    """
    return "–" if math.isnan(value) else f"{value:.3g}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first and the last to the left, the others to the right.

    Args:
        lines: The rows.

    Returns:
        Lines.
    """
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k in {0, last} else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def wrapped(text: str, width: int = 110) -> str:
    """A text in lines.

    Args:
        text: The text.
        width: Their length.

    Returns:
        Lines.
    """
    import textwrap

    return textwrap.fill(text, width)


def pandas() -> Any:
    """The package, of which frames are made.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Frames need pandas, which is not installed. Run `pip install 'lie_metric[examples]'`."
        ) from error
    return pandas
