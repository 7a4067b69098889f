"""The report of a study: one table, one page that needs neither network nor server, and pictures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lie_metric.figures import UNITS
from lie_metric.study.settings import LIE_MEASURES
from lie_metric.study.statistics import Correlation, spearman
from lie_metric.study.store import COLUMNS, LAYER_COLUMNS, StudyError, read_layers, read_rows

__all__ = ["answers", "correlations", "page_of", "spearman", "summarise", "write_report"]

EVERY = "all"
"""The pseudo-generator of the geometric mean over the generators of a study."""

_AGAINST = ("accuracy", "parameters", "macs")
_SCALARS = (
    "accuracy", "accuracy_se", "consistency", "consistency_se", "parameters", "macs", "seconds_measurement",
    "seconds_evaluation", "images", "evaluation_images",
)  # fmt: skip
_TEXTS = ("family", "tag", "input_size", "method", "stencil", "reason")


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each measured model, from the rows of its generators.

    Args:
        rows: Rows of the main table.

    Returns:
        Dicts with what is common to a model's rows, ``cost`` (time of a measured image over that of a plainly
        evaluated one), and ``values``: {generator: {measure: (value, standard error)}}, with ``"all"`` for the
        geometric mean over generators, if there are several.
    """
    models: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["status"] != "ok":
            continue
        fresh = {"model": row["model"], **{key: row[key] for key in (*_TEXTS, *_SCALARS)}, "values": {}}
        model = models.setdefault(row["model"], fresh)
        if row["generator"]:
            model["values"][row["generator"]] = {
                name: (row[name], row[f"{name}_se"]) for name in LIE_MEASURES if row[name] is not None
            }
    for model in models.values():
        found = list(model["values"].values())
        if len(found) > 1:
            model["values"][EVERY] = {
                name: (_geometric([one[name][0] for one in found]), None)
                for name in LIE_MEASURES
                if all(name in one for one in found)
            }
        plain, measured = model["seconds_evaluation"], model["seconds_measurement"]
        model["cost"] = (
            measured / model["images"] / (plain / model["evaluation_images"]) if model["images"] and plain else None
        )
    return list(models.values())


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if all(value > 0 for value in values) else math.nan


def correlations(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlations of each measure with accuracy and size: of all models, of each family, and of each tag.

    Args:
        models: What :func:`summarise` returns.

    Returns:
        Dicts of ``measure``, ``generator``, ``against``, ``by`` ("all", "family" or "tag"), ``group`` and the fields of
        :class:`~lie_metric.study.statistics.Correlation`.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {("all", "all models"): list(models)}
    for by in ("family", "tag"):
        for model in models:
            groups.setdefault((by, str(model[by])), []).append(model)
    generators = list(dict.fromkeys(name for model in models for name in model["values"]))
    found = []
    for (by, group), members in groups.items():
        if len(members) < 3:
            continue
        for generator in generators:
            for measure in LIE_MEASURES:
                y = [_number(one["values"].get(generator, {}).get(measure, (None,))[0]) for one in members]
                if all(map(math.isnan, y)):
                    continue
                for against in _AGAINST:
                    result = spearman([_number(one[against]) for one in members], y)
                    if result.points > 2:
                        about = {
                            "measure": measure,
                            "generator": generator,
                            "against": against,
                            "by": by,
                            "group": group,
                        }
                        found.append(about | result._asdict())
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


_NAMES = {"relative": "relative error", "lee": "raw LEE", "sensitivity": "response over that to noise"}


def answers(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether more accurate models respond less to transforms, in words, by measure: of all, by family and by tag.

    Args:
        found: What :func:`correlations` returns.

    Returns:
        A sentence for each measure and group.
    """
    generators = {one["generator"] for one in found}
    chosen = EVERY if EVERY in generators else min(generators, default="")
    sentences = []
    for one in found:
        if one["generator"] != chosen or one["against"] != "accuracy":
            continue
        result = Correlation(one["rho"], one["low"], one["high"], one["points"])
        what = "geometric mean over generators" if chosen == EVERY else chosen
        where = {"family": f"in the family {one['group']}", "tag": f"with the tag {one['group']}"}.get(
            one["by"], "over all models"
        )
        if math.isnan(result.rho):
            told = "the correlation with accuracy is not defined (a constant)"
        elif math.isnan(result.low):
            told = f"correlation with accuracy {result.rho:+.2f}, too few models for an interval"
        else:
            clear = result.low > 0 or result.high < 0
            direction = "a lower" if result.rho < 0 else "a higher"
            told = (
                f"correlation with accuracy {result.rho:+.2f} (95 % interval {result.low:+.2f} to {result.high:+.2f}): "
            )
            told += f"more accurate models have {direction} {_NAMES[one['measure']]}" if clear else "no clear relation"
        caution = "; raw LEE grows with confidence too and does not rank models" if one["measure"] == "lee" else ""
        sentences.append(f"{_NAMES[one['measure']]} ({what}), {where} ({result.points}): {told}{caution}.")
    return sentences


def write_report(folder: Path | str, *, pictures: bool = True) -> list[Path]:
    """Merges the shards of a study and writes ``results.csv``, ``report.html``, and pictures.

    Args:
        folder: The study's folder.
        pictures: Whether PNGs are drawn; they need matplotlib.

    Returns:
        The files written.

    Raises:
        StudyError: If the folder holds no study, or no row yet, or cannot be written.
    """
    folder = Path(folder)
    rows, layers = read_rows(folder), read_layers(folder)
    if not rows:
        raise StudyError(f"`folder` must hold the rows of a model, got none in {folder}. Run lie-metric study first.")
    models = summarise(rows)
    found = correlations(models)
    data = {
        "settings": json.loads((folder / "settings.json").read_text()),
        "units": UNITS,
        "models": models,
        "failed": [{"model": row["model"], "reason": row["reason"]} for row in rows if row["status"] != "ok"],
        "correlations": found,
        "answers": answers(found),
        "layers": layers,
    }
    try:
        written = [_table(folder / "results.csv", COLUMNS, rows)]
        if layers:
            written.append(_table(folder / "layers.csv", LAYER_COLUMNS, layers))
        page = folder / "report.html"
        page.write_text(page_of("report.html", data), encoding="utf-8")
        written.append(page)
        if pictures and models:
            from lie_metric.study.figures import draw

            written += draw(folder, models, found, layers)
    except OSError as error:
        raise StudyError(f"`folder` must be writable, got {error}. The rows of the study are kept.") from error
    return written


def _table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def page_of(template: str, data: Mapping[str, Any]) -> str:
    """A page that needs neither network nor server.

    Args:
        template: Name of a page of this package, with a place for data.
        data: What it shows.

    Returns:
        The page.
    """
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    # Inside a script element "</script" and "<!--" would end or change it; "<" in strings only.
    text = text.replace("<", "\\u003c")
    page = files("lie_metric.study").joinpath(template).read_text(encoding="utf-8")
    return page.replace("@DATA@", text)


def _finite(value: Any) -> Any:
    """The same with null for what is not finite, and six digits, which are more than any standard error leaves."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
