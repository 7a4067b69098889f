"""Pictures of a study."""

from __future__ import annotations

import colorsys
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lie_metric.figures import UNITS
from lie_metric.figures.canvas import cycle, matplotlib_parts

__all__ = ["draw"]

_LABELS = {
    "relative": "relative error\n(output std. per {unit})",
    "lee": "raw LEE (per {unit} squared;\ngrows with scale and confidence)",
    "sensitivity": "response over\nthat to noise",
}
_AXES = {
    "accuracy": "accuracy",
    "consistency": "consistency of predictions under shifts",
    "parameters": "parameters",
    "macs": "multiply-additions of one image",
    "cost": "time of a measured image over that of a plain evaluation",
}
Models = Sequence[Mapping[str, Any]]

_MOST = 12
"""Families, the largest ones, in pictures where each has its own place; the page has all of them."""


def draw(
    folder: Path,
    models: Models,
    correlations: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, Any]],
    x: str = "accuracy",
) -> list[Path]:
    """Draws error against accuracy, size or cost by generator, correlations, and contributions by type of operation.

    Args:
        folder: Where the pictures go.
        models: Measured models, see :func:`lie_metric.study.report.summarise`.
        correlations: See :func:`lie_metric.study.report.correlations`.
        layers: Rows by type of operation.
        x: What errors are drawn against; models without it are named below.

    Returns:
        The files written; what was not measured is not drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    _, figure_type, canvas = matplotlib_parts()
    figures = {f"{measure}.png": _scatter(figure_type, models, measure, x) for measure in _LABELS}
    figures["correlations.png"] = _forest(figure_type, [one for one in correlations if one["against"] == "accuracy"])
    figures["layers.png"] = _layers(figure_type, models, layers)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            canvas(figure)
            figure.savefig(folder / name, dpi=110)
            written.append(folder / name)
    return written


def _scatter(figure_type: Any, models: Models, measure: str, x_name: str) -> Any:
    generators = [
        name
        for name in dict.fromkeys(name for one in models for name in one["values"])
        if any(measure in one["values"].get(name, {}) for one in models)
    ]
    if not generators or all(one[x_name] is None for one in models):
        return None
    columns = min(len(generators), 5)
    rows = math.ceil(len(generators) / columns)
    figure = figure_type(figsize=(3.1 * columns + 1.6, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    families = sorted({one["family"] for one in models})
    for axis, generator in zip(axes, generators, strict=False):
        heights: list[float] = []
        for family, colour in zip(families, _colours(len(families)), strict=True):
            points = [
                (one[x_name], one.get(f"{x_name}_se"), *one["values"][generator][measure])
                for one in models
                if one["family"] == family
                and measure in one["values"].get(generator, {})
                and one[x_name] is not None
                and one["values"][generator][measure][0]
            ]
            if points:
                x, x_error, y, y_error = (list(column) for column in zip(*points, strict=True))
                x_error, y_error = ([_bar(one) for one in errors] for errors in (x_error, y_error))
                heights += y
                axis.errorbar(
                    x, y, y_error, x_error, "o", color=colour, markersize=4, linewidth=0.7, alpha=0.8, label=family
                )
        axis.set_yscale("log")
        if heights:  # bars that reach far down end at the frame, which is that of the points
            room = max((max(heights) / min(heights)) ** 0.08, 1.05)
            axis.set_ylim(min(heights) / room, max(heights) * room)
        if x_name in {"parameters", "macs", "cost"}:
            axis.set_xscale("log")
        per = "" if generator in UNITS and measure == "sensitivity" else f" (per {UNITS.get(generator, 'unit of t')})"
        axis.set_title(f"geometric {generator}" if generator.startswith("mean ") else f"{generator}{per}")
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    for axis in axes[len(generators) :]:
        axis.remove()
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    left_out = [one["model"] for one in models if one[x_name] is None]
    named = ", ".join(left_out[:6]) + (", ..." if len(left_out) > 6 else "")
    figure.supxlabel(_AXES[x_name] + (f"\n{len(left_out)} without it are not drawn: {named}" if left_out else ""))
    figure.supylabel(_LABELS[measure].format(unit="unit of t"))
    return figure


def _bar(error: float | None) -> float:
    return 0.0 if error is None or math.isnan(error) else error


def _forest(figure_type: Any, found: Sequence[Mapping[str, Any]]) -> Any:
    largest = sorted({(-one["points"], one["group"]) for one in found if one["by"] == "family"})[:_MOST]
    groups = ["all models", *(group for _, group in largest)]
    found = [one for one in found if one["by"] != "tag" and one["group"] in groups]
    generators = list(dict.fromkeys(one["generator"] for one in found))
    measures = [name for name in _LABELS if any(one["measure"] == name for one in found)]
    if not found:
        return None
    figure = figure_type(
        figsize=(4 * len(measures) + 1, 0.16 * len(groups) * len(generators) + 1.8), layout="constrained"
    )
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for axis, measure in zip(axes, measures, strict=True):
        for place, (group, colour) in enumerate(zip(groups, _colours(len(groups)), strict=True)):
            chosen = [one for one in found if one["measure"] == measure and one["group"] == group]
            y = [generators.index(one["generator"]) + 0.8 * (place / len(groups) - 0.4) for one in chosen]
            axis.hlines(y, [one["low"] for one in chosen], [one["high"] for one in chosen], colors=colour, linewidth=1)
            axis.plot([one["rho"] for one in chosen], y, "o", color=colour, markersize=3, label=group)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(xlim=(-1.05, 1.05), title=measure)
    axes[0].set_yticks(
        range(len(generators)), [f"geometric {one}" if one.startswith("mean ") else one for one in generators]
    )
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.supxlabel("Spearman correlation with accuracy, 95 % bootstrap interval over models")
    return figure


def _layers(figure_type: Any, models: Models, layers: Sequence[Mapping[str, Any]]) -> Any:
    family_of = {one["model"]: one["family"] for one in models}
    # Signed shares of each model, means over its generators; types that add nothing in any family are left out.
    of_model: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in layers:
        if row["model"] in family_of and row["share"] is not None and math.isfinite(row["share"]):
            of_model[row["model"]][row["type"]].append((row["share"], _bar(row["share_se"])))
    members: dict[str, list[str]] = defaultdict(list)
    for model in of_model:
        members[family_of[model]].append(model)
    families = sorted(members, key=lambda name: -len(members[name]))[:_MOST]
    kinds = dict.fromkeys(kind for found in of_model.values() for kind in found)
    shares = {kind: [_mean_share([of_model[one] for one in members[f]], kind) for f in families] for kind in kinds}
    types = sorted(kind for kind, values in shares.items() if max((abs(v) for v, _ in values), default=0) > 0.01)
    if not types:
        return None
    figure = figure_type(figsize=(8, 0.25 * len(types) * max(len(families), 2) + 1.5), layout="constrained")
    axis = figure.subplots()
    for place, (family, colour) in enumerate(zip(families, _colours(len(families)), strict=True)):
        y = [number + 0.8 * ((place + 0.5) / len(families) - 0.5) for number in range(len(types))]
        widths, errors = zip(*(shares[kind][place] for kind in types), strict=True)
        axis.barh(y, widths, 0.8 / len(families), color=colour, label=family, xerr=errors, error_kw={"linewidth": 0.8})
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(types)), types)
    axis.invert_yaxis()
    axis.set_xlabel(
        "signed share of the Lie derivative, mean over generators and models;\n"
        "bars: standard error over models, of a single one over images"
    )
    axis.legend(fontsize="small")
    return figure


def _mean_share(models: Sequence[Mapping[str, Sequence[tuple[float, float]]]], kind: str) -> tuple[float, float]:
    """The mean share of a type and its standard error: over models, of a single one over images.

    Generators are measured on the same images: errors of their mean are taken as if they were one and the same, which
    they are at most.
    """
    generators = [max(len(found) for found in model.values()) for model in models]
    shares = [sum(v for v, _ in model.get(kind, ())) / count for model, count in zip(models, generators, strict=True)]
    mean = sum(shares) / len(shares)
    if len(models) > 1:
        return mean, math.sqrt(sum((one - mean) ** 2 for one in shares) / (len(shares) - 1) / len(shares))
    return mean, sum(error for _, error in models[0].get(kind, ())) / generators[0]


def _colours(count: int) -> list[Any]:
    """The house's palette; where it is too short, hues at the golden angle."""
    if count <= len(set(cycle(count))):
        return list(cycle(count))
    return [colorsys.hsv_to_rgb(index * 0.618 % 1, 0.75, 0.5 + 0.15 * (index % 3)) for index in range(count)]
