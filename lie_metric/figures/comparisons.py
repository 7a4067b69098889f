"""Regimes side by side: curves over epochs, and the table of final values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lie_metric.figures.canvas import matplotlib_parts
from lie_metric.figures.curves import Regimes, equivariance_curves
from lie_metric.functional.noise_floor import below_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison", "heat_map"]


def heat_map(
    axis: Axes,
    regimes: Regimes,
    generators: Sequence[str],
    *,
    floors: Mapping[str, Mapping[str, float]] | Mapping[str, float] | None = None,
) -> None:
    """Draws the last value of each curve, regimes down and generators across, with its standard error.

    Colours compare regimes within a column, against the first regime; columns have different units. A value at or below
    its floor is grey on a neutral ground and marked "≤ floor", whatever the first regime has.

    Args:
        axis: Where to draw.
        regimes: The curves by regime and generator.
        generators: The columns.
        floors: For each generator the stencil's own error, or that for each regime: see
            :func:`lie_metric.functional.stencil_error`.
    """
    rows = list(regimes)
    values = [[regimes[row][column].values[-1] for column in generators] for row in rows]
    errors = [[regimes[row][column].errors[-1] for column in generators] for row in rows]
    ratio = [[value / first if first else 1.0 for value, first in zip(line, values[0], strict=True)] for line in values]
    hidden = [
        list(below_floor(dict(zip(generators, line, strict=True)), _floors_of(floors, row)).values())
        for row, line in zip(rows, values, strict=True)
    ]
    # 1 is the neutral colour.
    shown = [[1.0 if h else r for h, r in zip(*lines, strict=True)] for lines in zip(hidden, ratio, strict=True)]
    axis.imshow(shown, cmap="PuOr_r", vmin=0, vmax=2, aspect="auto")
    for i in range(len(rows)):
        for j in range(len(generators)):
            second = "≤ floor" if hidden[i][j] else f"±{errors[i][j]:.2f}"
            colour = "0.55" if hidden[i][j] else "white" if abs(ratio[i][j] - 1) > 0.5 else "black"
            axis.text(j, i, f"{values[i][j]:.2f}\n{second}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(generators)), [name.replace("_", "\n") for name in generators], fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(f"after training (colour: against {rows[0]!r})", fontsize=10)


def comparison(
    panels: Mapping[str, Regimes],
    *,
    title: str,
    caption: str,
    floors: Mapping[str, Mapping[str, Mapping[str, float]]] | Mapping[str, float] | None = None,
) -> Figure:
    """Curves of every regime and generator over epochs, and the table of final values, one row for each panel.

    Args:
        panels: For each row's title (a model, say) the curves by regime and generator.
        title: Heading of the picture.
        caption: Line below it: what is measured, on what, and with which stencil.
        floors: For each generator the stencil's own error, or that for each row's title and regime: values at or below
            it are marked, and the least of a panel is drawn. See :func:`lie_metric.functional.stencil_error`.

    Returns:
        A figure; save it with ``figure.savefig(path)``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or regimes differ in their generators.

    Example:
        >>> from lie_metric.figures import Curve
        >>> curve = Curve([0, 1], [2.0, 1.0], [0.1, 0.1])
        >>> figure = comparison({"cnn": {"none": {"rotation": curve}}}, title="Rotation", caption="bspline")
        >>> [axis.get_title() for axis in figure.axes]
        ['rotation', "after training (colour: against 'none')"]
    """
    sets = {tuple(curves) for regimes in panels.values() for curves in regimes.values()}
    if len(sets) != 1:
        raise ValueError(f"`panels` must hold the same generators for every regime, got {sorted(sets)}.")
    (generators,) = sets
    _, Figure, FigureCanvasAgg = matplotlib_parts()
    columns = len(generators) + 1
    below = 0.55 + 0.16 * len(caption.splitlines())  # inches: the epochs, and the caption's lines
    height = 3.0 * len(panels) + 0.25 + below
    figure = Figure(figsize=(2.5 * len(generators) + 1.1 * len(generators) + 1.6, height))
    FigureCanvasAgg(figure)
    widths = [2.5] * len(generators) + [1.1 * len(generators) + 1.0]
    grid = figure.add_gridspec(
        len(panels), columns, width_ratios=widths, hspace=0.5, wspace=0.42, left=0.07, right=0.99,
        top=1 - 0.75 / height, bottom=below / height,
    )  # fmt: skip
    for row, (name, regimes) in enumerate(panels.items()):
        for column, generator in enumerate(generators):
            axis = figure.add_subplot(grid[row, column])
            chosen = {regime: curves[generator] for regime, curves in regimes.items()}
            known = [_floors_of(_floors_of(floors, name), regime).get(generator) for regime in regimes]
            floor = min((each for each in known if each is not None), default=None)
            equivariance_curves(axis, chosen, generator, floor=floor)
            axis.set_xlabel("epoch (0: untrained)", fontsize=8)
            if column == 0:
                axis.annotate(
                    name, (-0.38, 0.5), xycoords="axes fraction", rotation=90, va="center", fontsize=11, weight="bold"
                )
        heat_map(figure.add_subplot(grid[row, columns - 1]), regimes, generators, floors=_floors_of(floors, name))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper right",
        ncols=len(labels),
        fontsize=9,
        frameon=False,
        title="augmentation in training",
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    figure.text(0.01, 0.012, caption, fontsize=8, color="0.3", va="bottom", linespacing=1.4)
    return figure


def _floors_of(floors: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What of floors is for one name, where they are told apart by it; all of them otherwise."""
    told_apart = any(isinstance(each, Mapping) for each in (floors or {}).values())
    return (floors or {}).get(name, {}) if told_apart else floors or {}
