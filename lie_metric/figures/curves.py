"""Curves of regimes or models, one panel for each generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lie_metric.figures.canvas import cycle, matplotlib_parts
from lie_metric.figures.units import UNITS, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "Regimes", "equivariance_curves", "error_curves", "regime_panels"]


@dataclass(frozen=True)
class Curve:
    """A measure over training.

    Args:
        epochs: When it was measured; 0 is the untrained model.
        values: The measure.
        errors: Its standard errors.

    Raises:
        ValueError: If the three differ in length, or are empty.
    """

    epochs: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float]

    def __post_init__(self) -> None:
        lengths = len(self.epochs), len(self.values), len(self.errors)
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                f"`epochs`, `values` and `errors` must be non-empty and of one length, got {lengths}. "
                "Give one of each for every point."
            )


Regimes = Mapping[str, Mapping[str, Curve]]


def equivariance_curves(axis: Axes, curves: Mapping[str, Curve], generator: str, *, floor: float | None = None) -> None:
    """Draws one generator's curve of every regime, with a band of one standard error.

    Args:
        axis: Where to draw.
        curves: The curves by regime.
        generator: The generator's name, from which title and unit follow.
        floor: The stencil's own error, see :func:`lie_metric.functional.noise_floor`; what lies below is shaded.
    """
    if floor is not None:
        axis.axhspan(0, floor, color="0.9", linewidth=0)
    for (regime, curve), colour in zip(curves.items(), cycle(len(curves)), strict=True):
        low = [value - error for value, error in zip(curve.values, curve.errors, strict=True)]
        high = [value + error for value, error in zip(curve.values, curve.errors, strict=True)]
        axis.fill_between(list(curve.epochs), low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(list(curve.epochs), list(curve.values), color=colour, label=regime, linewidth=1.6)
    axis.set_title(generator.replace("_", " "), fontsize=10)
    axis.set_ylabel(f"output std. per {unit_of(generator)}", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def error_curves(models: Mapping[str, Mapping[str, Curve]], *, caption: str) -> Figure:
    """Draws the errors of finite transforms over the group parameter, one panel for each generator.

    Args:
        models: For each model (or regime) its curve of each generator over t.
        caption: Line below: what was measured, on what, and with which stencil.

    Returns:
        A figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.

    Example:
        >>> figure = error_curves({"cnn": {"rotation": Curve([0.1, 0.2], [0.3, 0.5], [0.0, 0.0])}}, caption="bspline")
        >>> figure.axes[0].get_xlabel()
        't (radian)'
    """
    names = list(dict.fromkeys(name for curves in models.values() for name in curves))
    if not names:
        raise ValueError("`models` must hold at least one curve, got none.")
    _, Figure, FigureCanvasAgg = matplotlib_parts()
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (model, curves), colour in zip(models.items(), cycle(len(models)), strict=True):
            if name in curves:
                curve = curves[name]
                axis.errorbar(curve.epochs, curve.values, curve.errors, color=colour, label=model, capsize=2)
        generator = name.removesuffix(" [px]")
        axis.set_title(generator.replace("_", " "), fontsize=10)
        axis.set_xlabel("displacement (px)" if name != generator else f"t ({unit_of(name)})", fontsize=8)
        axis.set_ylabel("error / (√2 output std.)", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel(caption, fontsize=8, color="0.3")
    return figure


def regime_panels(regimes: Regimes, *, ylabel: str, axis: str = "epochs") -> Figure:
    """The curves of every regime, one panel for each generator, at most three in a row.

    Args:
        regimes: The curves by regime and generator; a regime may lack some.
        ylabel: What is measured.
        axis: What curves are over.

    Returns:
        A figure, as wide as a column of a page.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.

    Example:
        >>> figure = regime_panels({"none": {"scale": Curve([0, 1], [2.0, 1.0], [0.1, 0.1])}}, ylabel="relative error")
        >>> figure.axes[0].get_ylabel()
        'relative error per log factor'
    """
    names = list(dict.fromkeys(name for curves in regimes.values() for name in curves))
    if not names:
        raise ValueError("`regimes` must hold at least one curve, got none.")
    _, Figure, FigureCanvasAgg = matplotlib_parts()
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 4.5), 3.0 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(regimes, cycle(len(regimes)), strict=True))
    handles: dict[str, Any] = {}
    for panel, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        for regime, curves in regimes.items():
            if name in curves:
                equivariance_curves(panel, {regime: curves[name]}, name)
                line = panel.lines[-1]
                line.set_color(colours[regime])
                panel.collections[-1].set_color(colours[regime])
                handles[regime] = line
        panel.set_ylabel(f"{ylabel} per {UNITS[name]}" if name in UNITS else ylabel, fontsize=9)
        panel.set_xlabel("epochs (0: untrained)" if axis == "epochs" else axis, fontsize=9)
    for panel in figure.axes[len(names) :]:
        panel.set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    return figure
