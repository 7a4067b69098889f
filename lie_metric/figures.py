"""Every picture: curves over epochs, regimes against generators, contributions along a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lie_metric.algebra import Generator, flow_rows, velocity
from lie_metric.functional.noise_floor import below_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "UNITS",
    "Curve",
    "comparison",
    "equivariance_curves",
    "error_curves",
    "heat_map",
    "layerwise",
    "modules_over_epochs",
    "regime_panels",
    "vector_field",
]

UNITS: dict[str, str] = {
    "translation_x": "half side",
    "translation_y": "half side",
    "rotation": "radian",
    "hyperbolic_rotation": "rapidity",
    "scale": "log factor",
    "shear_x": "slope",
    "shear_y": "slope",
    "stretch_x": "log factor",
    "stretch_y": "log factor",
    "perspective_x": "inverse half side",
    "perspective_y": "inverse half side",
    "saturation": "log factor",
}
"""The unit of the group parameter of each named generator."""

# Okabe and Ito's palette, distinguishable with every kind of colour vision.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


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


def _matplotlib() -> Any:
    try:
        import matplotlib.colors
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need matplotlib, which is not installed. Run `pip install 'lie_metric[examples]'`."
        ) from error
    return matplotlib, Figure, FigureCanvasAgg


def unit_of(generator: str, *, pixels: bool = True) -> str:
    """The unit of a generator's parameter, in words.

    Args:
        generator: Its name.
        pixels: Whether it moves images, whose unit of length is half of a side; points have a unit of their own.

    Returns:
        The unit; ``"unit of t"`` for a generator that is not named by this library.

    Example:
        >>> unit_of("translation_x"), unit_of("translation_x", pixels=False), unit_of("rotation_z"), unit_of("spiral")
        ('half side', 'unit of length', 'radian', 'unit of t')
    """
    kind = generator.split("_")[0]
    if not pixels and kind in _OF_LENGTH:
        return _OF_LENGTH[kind]
    return UNITS.get(generator) or _UNITS_IN_SPACE.get(kind, "unit of t")


_OF_LENGTH = {"translation": "unit of length", "perspective": "inverse unit of length"}

_UNITS_IN_SPACE = {
    "translation": "half side",
    "rotation": "radian",
    "hyperbolic": "rapidity",
    "shear": "slope",
    "stretch": "log factor",
    "boost": "unit of velocity",
    "brightness": "range of values",
    "contrast": "log factor",
    "chroma": "log factor",
    "hue": "radian",
    "blur": "squared pixel",
}


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
    for (regime, curve), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
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
    _, Figure, FigureCanvasAgg = _matplotlib()
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (model, curves), colour in zip(models.items(), _cycle(len(models)), strict=True):
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
    _, Figure, FigureCanvasAgg = _matplotlib()
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 4.5), 3.0 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(regimes, _cycle(len(regimes)), strict=True))
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
        >>> curve = Curve([0, 1], [2.0, 1.0], [0.1, 0.1])
        >>> figure = comparison({"cnn": {"none": {"rotation": curve}}}, title="Rotation", caption="bspline")
        >>> [axis.get_title() for axis in figure.axes]
        ['rotation', "after training (colour: against 'none')"]
    """
    sets = {tuple(curves) for regimes in panels.values() for curves in regimes.values()}
    if len(sets) != 1:
        raise ValueError(f"`panels` must hold the same generators for every regime, got {sorted(sets)}.")
    (generators,) = sets
    _, Figure, FigureCanvasAgg = _matplotlib()
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


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


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
    _, Figure, FigureCanvasAgg = _matplotlib()
    largest = {kind: max(abs(by_type[kind][0]) for by_type in bars.values()) for kind in next(iter(bars.values()))}
    # Types whose share could not be seen are left to the table.
    kinds = [kind for kind, value in largest.items() if value > 1e-3] or list(largest)
    height = max(3.2, 0.28 * len(kinds) * max(1.0, 0.45 * len(bars)) + 1.2)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    thick = 0.8 / len(bars)
    for k, ((generator, by_type), colour) in enumerate(zip(bars.items(), _cycle(len(bars)), strict=True)):
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
    _, Figure, FigureCanvasAgg = _matplotlib()
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


def vector_field(
    generators: Generator | Sequence[Generator], image: Tensor | None = None, *, titles: Sequence[str] | None = None
) -> Figure:
    """The velocities with which generators move the content of an image, one panel for each.

    Convention:
        T_t reads the image at exp(tA)p, so the content at p moves with the velocity -Ap: the arrows (of projective
        generators -Ap + (w·p) p). x points right, y points down, the origin is the image centre and 1 is half of the
        shorter side. Arrows of different panels are not to one scale.

    Args:
        generators: One or several, e.g. ``lm.Generator.combination("least", metric.generators, directions[0])``.
        image: Shape (C, H, W) or (H, W), drawn below the arrows; the first channel unless there are three. The default
            is an empty square.
        titles: Headings; the default are the generators' names.

    Returns:
        A figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, the image has other axes, or the titles are not one for each.

    Example:
        >>> from lie_metric import generators
        >>> figure = vector_field(generators("rotation", "saturation"), torch.rand(1, 8, 12))
        >>> [axis.get_title() for axis in figure.axes]
        ['rotation', 'saturation']
    """
    asked = (generators,) if isinstance(generators, Generator) else tuple(generators)
    headings = [generator.name for generator in asked] if titles is None else list(titles)
    if not asked or len(headings) != len(asked):
        raise ValueError(
            f"`generators` must hold at least one, and `titles` one for each, got {len(asked)} and {len(headings)}."
        )
    if image is not None and image.ndim not in {2, 3}:
        raise ValueError(f"`image` must have axes (C, H, W) or (H, W), got shape {tuple(image.shape)}.")
    _, Figure, FigureCanvasAgg = _matplotlib()
    picture = torch.zeros(1, 1, 1) if image is None else image.detach().cpu().float().reshape(-1, *image.shape[-2:])
    height, width = picture.shape[-2:]
    half_width, half_height = width / min(height, width), height / min(height, width)
    count = 15
    x = torch.linspace(-1, 1, count) * half_width * (1 - 1 / count)
    y = torch.linspace(-1, 1, count) * half_height * (1 - 1 / count)
    points = torch.stack([x.expand(count, count), y[:, None].expand(count, count), torch.ones(count, count)], dim=-1)
    figure = Figure(figsize=(3.2 * len(asked) * half_width / half_height, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, generator, heading in zip(figure.subplots(1, len(asked), squeeze=False)[0], asked, headings, strict=True):
        if image is not None:
            low, high = picture.min(), picture.max()
            shown = (picture - low) / (high - low).clamp(min=1e-12)
            shown = shown.movedim(0, -1) if len(shown) == 3 else shown[0]
            extent = (-half_width, half_width, half_height, -half_height)
            axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, alpha=0.6)
        arrows = -velocity(torch.tensor(flow_rows(generator)), points)
        if bool(arrows.any()):
            axis.quiver(*points[..., :2].unbind(-1), *arrows.unbind(-1), angles="xy", color=_COLOURS[2], pivot="mid")
        axis.set(xlim=(-half_width, half_width), ylim=(half_height, -half_height), aspect="equal")
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel(f"intensities × exp({generator.intensity:.2g} t)" if generator.intensity else "", fontsize=8)
        axis.tick_params(labelsize=7)
    return figure
