"""Where the Lie derivative comes from along a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lie_metric.figures.canvas import cycle, matplotlib_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layerwise", "modules_over_epochs"]


def layerwise(
    bars: Mapping[str, Mapping[str, tuple[float, float]]], curves: Mapping[str, Sequence[float]], *, caption: str
) -> Figure:
    """Where the Lie derivative comes from: shares by type, and how they add up along the network.

    Args:
        bars: For each generator the share by type of operation, and its standard error.
        curves: For each generator the share of all operations up to each; its last value is 1.
        caption: Line below the picture.

    Returns:
        A figure of two panels.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.

    Example:
        >>> bars = {"rotation": {"convolution": (0.8, 0.1), "padding": (0.2, 0.1)}}
        >>> figure = layerwise(bars, {"rotation": [0.2, 1.0]}, caption="bspline")
        >>> [axis.get_title() for axis in figure.axes]
        ['by type of operation', 'sum along the network']
    """
    if not bars or not curves:
        raise ValueError("`bars` and `curves` must hold at least one generator, got none.")
    _, Figure, FigureCanvasAgg = matplotlib_parts()
    largest = {kind: max(abs(by_type[kind][0]) for by_type in bars.values()) for kind in next(iter(bars.values()))}
    # Types whose share could not be seen are left to the table.
    kinds = [kind for kind, value in largest.items() if value > 1e-3] or list(largest)
    height = max(3.2, 0.28 * len(kinds) * max(1.0, 0.45 * len(bars)) + 1.2)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    thick = 0.8 / len(bars)
    for k, ((generator, by_type), colour) in enumerate(zip(bars.items(), cycle(len(bars)), strict=True)):
        places = [row + (k - (len(bars) - 1) / 2) * thick for row in range(len(kinds))]
        shares, errors = zip(*(by_type[kind] for kind in kinds), strict=True)
        left.barh(places, shares, thick, xerr=errors, color=colour, error_kw={"lw": 1, "ecolor": "0.3"})
        right.plot(range(1, len(curves[generator]) + 1), list(curves[generator]), color=colour, label=generator)
    left.set_yticks(range(len(kinds)), kinds, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("share of the squared norm (± standard error over images)", fontsize=8)
    left.set_title("by type of operation", fontsize=10)
    right.set_xlabel("operation, from input to output", fontsize=8)
    right.set_ylabel("share of all operations so far", fontsize=8)
    right.set_title("sum along the network", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.supxlabel(caption, fontsize=8, color="0.3")
    return figure


def modules_over_epochs(values: Mapping[int, Mapping[str, float]], *, title: str) -> Figure:
    """A heat map of modules (down, from input to output) over epochs (across): their signed shares.

    Args:
        values: For each epoch the share of every module.
        title: Heading.

    Returns:
        A figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.

    Example:
        >>> figure = modules_over_epochs({0: {"stem": 0.9, "head": 0.1}, 5: {"stem": 1.2, "head": -0.2}}, title="x")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['stem', 'head']
    """
    if not values:
        raise ValueError("`values` must hold at least one epoch, got none.")
    _, Figure, FigureCanvasAgg = matplotlib_parts()
    epochs = sorted(values)
    modules = list(values[epochs[0]])
    table = [[values[epoch].get(module, math.nan) for epoch in epochs] for module in modules]
    largest = max((abs(value) for row in table for value in row if math.isfinite(value)), default=0.0) or 1.0
    figure = Figure(figsize=(7, min(20.0, 1.5 + 0.22 * len(modules))), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    picture = axis.imshow(table, aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest)
    axis.set_yticks(range(len(modules)), [module or "(model itself)" for module in modules], fontsize=7)
    axis.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs], fontsize=7)
    axis.set_xlabel("epoch", fontsize=8)
    axis.set_title(title, fontsize=9)
    figure.colorbar(picture, ax=axis, label="share")
    return figure
