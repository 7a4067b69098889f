"""What every picture is made with: matplotlib, loaded when it is asked for, and one palette."""

from __future__ import annotations

from typing import Any

__all__ = ["COLOURS", "cycle", "matplotlib_parts"]


# Okabe and Ito's palette, distinguishable with every kind of colour vision.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def cycle(count: int) -> list[str]:
    """Colours, from the beginning again where there are not enough.

    Args:
        count: How many.

    Returns:
        Their codes.
    """
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def matplotlib_parts() -> Any:
    """What pictures are made with.

    Returns:
        The module, its class of figures, and the canvas that they are drawn on without a screen.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        import matplotlib.colors
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need matplotlib, which is not installed. Run `pip install 'lie_metric[examples]'`."
        ) from error
    return matplotlib, Figure, FigureCanvasAgg
