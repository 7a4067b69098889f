"""Pictures of a study."""

from __future__ import annotations

import colorsys
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lie_metric.figures import UNITS, _cycle, _matplotlib

__all__ = ["draw"]

_LABELS = {
    "relative": "relative error (output standard deviations per {unit})",
    "lee": "raw LEE (per {unit} squared; grows with scale and confidence)",
    "sensitivity": "response over that to noise",
}
Models = Sequence[Mapping[str, Any]]

_MOST = 12
"""Families, the largest ones, in pictures where each has its own place; the page has all of them."""


def draw(
    folder: Path, models: Models, correlations: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Draws error against accuracy by generator, correlations, and contributions by type of operation.

    Args:
        folder: Where the pictures go.
        models: Measured models, see :func:`lie_metric.study.report.summarise`.
        correlations: See :func:`lie_metric.study.report.correlations`.
        layers: Rows by type of operation.

    Returns:
        The files written; what was not measured is not drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    _, figure_type, canvas = _matplotlib()
    figures = {f"{measure}.png": _scatter(figure_type, models, measure) for measure in _LABELS}
    figures["correlations.png"] = _forest(figure_type, [one for one in correlations if one["against"] == "accuracy"])
    figures["layers.png"] = _layers(figure_type, models, layers)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            canvas(figure)
            figure.savefig(folder / name, dpi=110)
            written.append(folder / name)
    return written


def _scatter(figure_type: Any, models: Models, measure: str) -> Any:
    generators = [
        name
        for name in dict.fromkeys(name for one in models for name in one["values"])
        if any(measure in one["values"].get(name, {}) for one in models)
    ]
    if not generators or all(one["accuracy"] is None for one in models):
        return None
    columns = min(len(generators), 5)
    rows = math.ceil(len(generators) / columns)
    figure = figure_type(figsize=(3.1 * columns + 1.6, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    families = sorted({one["family"] for one in models})
    for axis, generator in zip(axes, generators, strict=False):
        for family, colour in zip(families, _colours(len(families)), strict=True):
            points = [
                (one["accuracy"], one["accuracy_se"], *one["values"][generator][measure])
                for one in models
                if one["family"] == family
                and measure in one["values"].get(generator, {})
                and one["accuracy"] is not None
                and one["values"][generator][measure][0]
            ]
            if points:
                x, x_error, y, y_error = (list(column) for column in zip(*points, strict=True))
                y_error = [0.0 if error is None or math.isnan(error) else error for error in y_error]
                axis.errorbar(
                    x, y, y_error, x_error, "o", color=colour, markersize=4, linewidth=0.7, alpha=0.8, label=family
                )
        axis.set_yscale("log")
        axis.set_title(
            "geometric mean" if generator == "all" else f"{generator} (per {UNITS.get(generator, 'unit of t')})"
        )
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    for axis in axes[len(generators) :]:
        axis.remove()
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.supxlabel("accuracy")
    figure.supylabel(_LABELS[measure].format(unit="unit of t"))
    return figure


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
    axes[0].set_yticks(range(len(generators)), ["geometric mean" if one == "all" else one for one in generators])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.supxlabel("Spearman correlation with accuracy, 95 % bootstrap interval over models")
    return figure


def _layers(figure_type: Any, models: Models, layers: Sequence[Mapping[str, Any]]) -> Any:
    family_of = {one["model"]: one["family"] for one in models}
    # Signed shares, of each model and generator; types that add nothing in any family are left out.
    shares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    parts: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in layers:
        family = family_of.get(row["model"])
        if family is not None and row["share"] is not None and math.isfinite(row["share"]):
            shares[row["type"]][family] += row["share"]
            parts[family].add((row["model"], row["generator"]))
    families = sorted(parts, key=lambda name: -len(parts[name]))[:_MOST]
    means = {kind: [found[name] / len(parts[name]) for name in families] for kind, found in shares.items()}
    types = sorted(kind for kind, values in means.items() if max(map(abs, values), default=0) > 0.01)
    if not types:
        return None
    figure = figure_type(figsize=(8, 0.25 * len(types) * max(len(families), 2) + 1.5), layout="constrained")
    axis = figure.subplots()
    for place, (family, colour) in enumerate(zip(families, _colours(len(families)), strict=True)):
        y = [number + 0.8 * ((place + 0.5) / len(families) - 0.5) for number in range(len(types))]
        axis.barh(y, [means[kind][place] for kind in types], 0.8 / len(families), color=colour, label=family)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(types)), types)
    axis.invert_yaxis()
    axis.set_xlabel("signed share of the Lie derivative, mean over models and generators")
    axis.legend(fontsize="small")
    return figure


def _colours(count: int) -> list[Any]:
    """The house's palette; where it is too short, hues at the golden angle."""
    if count <= len(set(_cycle(count))):
        return list(_cycle(count))
    return [colorsys.hsv_to_rgb(index * 0.618 % 1, 0.75, 0.5 + 0.15 * (index % 3)) for index in range(count)]
