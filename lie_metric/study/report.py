"""The report of a study: tables, one page that needs neither network nor server, and pictures.

The page draws its one plot itself, in some sixty lines: of the kept libraries that embed into one file uPlot (51 kB)
leaves error bars, hovering over scattered points and choosing one to its user, and Plotly, which has them, makes every
report megabytes large.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lie_metric.figures import UNITS
from lie_metric.records import Record
from lie_metric.study.models import labelled
from lie_metric.study.pairs import LEVEL, PAIR_COLUMNS, deviations, kinds, means_of, pairs, steps
from lie_metric.study.settings import LIE_MEASURES
from lie_metric.study.statistics import Correlation, spearman
from lie_metric.study.store import COLUMNS, LAYER_COLUMNS, StudyError, read_layers, read_records, read_rows
from lie_metric.warning import warn

__all__ = ["answers", "correlations", "page_of", "spearman", "summarise", "write_report"]

AXES = ("accuracy", "consistency", "parameters", "macs", "cost")
"""What errors are drawn against, the first that there is."""

_MOST_PAIRS = 100
"""Models of which every two are in the table of pairs: 5000 pairs for each generator and measure."""

_AGAINST = ("accuracy", "parameters", "macs")
_SCALARS = (
    "accuracy", "accuracy_se", "consistency", "consistency_se", "parameters", "macs", "seconds_measurement",
    "seconds_evaluation", "images", "evaluation_images",
)  # fmt: skip
_TEXTS = ("family", "tag", "input_size", "method", "stencil", "reason")


def summarise(
    rows: Iterable[Mapping[str, Any]], records: Mapping[str, Mapping[str, Record]] | None = None
) -> list[dict[str, Any]]:
    """One entry for each measured model, from the rows of its generators.

    Args:
        rows: Rows of the main table.
        records: Records by model and measure, from which geometric means have their errors.

    Returns:
        Dicts with what is common to a model's rows, ``cost`` (time of a measured image over that of a plainly
        evaluated one), and ``values``: {generator: {measure: (value, standard error)}}, also for the geometric means
        over the generators of one unit, and of what has no unit over all of them, see
        :func:`~lie_metric.study.pairs.means_of`.
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
        _add_means(model["values"], (records or {}).get(model["model"], {}))
        plain, measured = model["seconds_evaluation"], model["seconds_measurement"]
        model["cost"] = (
            measured / model["images"] / (plain / model["evaluation_images"]) if model["images"] and plain else None
        )
    return list(models.values())


def _add_means(values: dict[str, dict[str, Any]], records: Mapping[str, Record]) -> None:
    generators = list(values)
    for measure in LIE_MEASURES:
        known = deviations(records[measure]) if measure in records else {}
        for label, names in means_of(generators, measure).items():
            found = [values[name][measure][0] for name in names if measure in values[name]]
            if len(found) == len(names):
                mean = _geometric(found)
                error = mean * known[label].error if label in known else None
                values.setdefault(label, {})[measure] = (mean, error)


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
    generators = _generators(models)
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
    """Whether more accurate models respond less to transforms, in words: of all models by unit, by family and by tag.

    Args:
        found: What :func:`correlations` returns.

    Returns:
        A sentence for each measure and unit over all models; for each family and tag of the first unit alone.
    """
    sentences = []
    for measure in dict.fromkeys(one["measure"] for one in found):
        generators = dict.fromkeys(one["generator"] for one in found if one["measure"] == measure)
        chosen = _by_unit(list(generators), measure)
        for one in found:
            if (one["measure"], one["against"]) != (measure, "accuracy") or one["generator"] not in chosen:
                continue
            if one["by"] == "all" or one["generator"] == chosen[0]:
                sentences.append(_sentence(one, measure))
    return sentences


def _by_unit(generators: Sequence[str], measure: str) -> list[str]:
    """One name for each unit: the geometric mean of its generators, or the only one."""
    means = {label: names for label, names in means_of(generators, measure).items() if label in generators}
    if measure == "sensitivity" and means:  # a number without unit: the mean over all of them, the last
        return list(means)[-1:]
    held = {name for names in means.values() for name in names}
    return [*means, *(name for name in generators if name not in held and name not in means)]


def _sentence(one: Mapping[str, Any], measure: str) -> str:
    result = Correlation(one["rho"], one["low"], one["high"], one["points"])
    what = f"geometric {one['generator']}" if one["generator"].startswith("mean ") else one["generator"]
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
        told = f"correlation with accuracy {result.rho:+.2f} (95 % interval {result.low:+.2f} to {result.high:+.2f}): "
        told += f"more accurate models have {direction} {_NAMES[measure]}" if clear else "no clear relation"
    caution = "; raw LEE grows with confidence too and does not rank models" if measure == "lee" else ""
    return f"{_NAMES[measure]} ({what}), {where} ({result.points}): {told}{caution}."


def write_report(
    folder: Path | str,
    *,
    pictures: bool = True,
    x: str | None = None,
    against: Sequence[str] | None = None,
    families: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> list[Path]:
    """Merges the shards of a study and writes ``results.csv``, ``pairs.csv``, ``report.html``, and pictures.

    Args:
        folder: The study's folder.
        pictures: Whether PNGs are drawn; they need matplotlib.
        x: What errors are drawn against: ``"accuracy"``, ``"consistency"``, ``"parameters"``, ``"macs"`` or ``"cost"``;
            by default the first of them that was measured.
        against: Models that all others are compared with in ``pairs.csv``; by default every two of up to 100 models.
        families: Families of models by wildcards of their names, instead of what the study wrote down.
        tags: Tags, likewise.

    Returns:
        The files written.

    Raises:
        StudyError: If the folder holds no study, or no row yet, or cannot be written.
        ValueError: If no model has what errors shall be drawn against, or a name or wildcard is of no model.

    Warns:
        UserWarning: If there are too many models for a table of pairs.
    """
    folder = Path(folder)
    rows, layers, records = read_rows(folder), read_layers(folder), read_records(folder)
    if not rows:
        raise StudyError(f"`folder` must hold the rows of a model, got none in {folder}. Run lie-metric study first.")
    names = [row["model"] for row in rows]
    new = {"family": labelled(names, families or {}, "families"), "tag": labelled(names, tags or {}, "tags")}
    for row in rows:
        row |= {key: found[row["model"]] for key, found in new.items() if row["model"] in found}
    models = summarise(rows, records)
    axis = _axis(models, x)
    measured = {one["model"]: records[one["model"]] for one in models if one["model"] in records}
    compared = pairs(measured, against) if against or len(measured) <= _MOST_PAIRS else None
    if compared is None:
        warn(
            f"No pairs.csv: {len(measured)} models are more than {_MOST_PAIRS}. The page compares any two; "
            "`--against MODEL ...` writes the pairs of some."
        )
    found = correlations(models)
    data = {
        "settings": json.loads((folder / "settings.json").read_text()),
        "units": UNITS,
        "means": {
            label: names
            for measure in LIE_MEASURES
            for label, names in means_of([name for name in _generators(models) if " " not in name], measure).items()
        },
        "x": axis,
        "models": models,
        "failed": [{"model": row["model"], "reason": row["reason"]} for row in rows if row["status"] != "ok"],
        "correlations": found,
        "answers": answers(found),
        "layers": layers,
        "pairs": _paired(measured),
    }
    try:
        written = [_table(folder / "results.csv", COLUMNS, rows)]
        if layers:
            written.append(_table(folder / "layers.csv", LAYER_COLUMNS, layers))
        if compared:
            written.append(_table(folder / "pairs.csv", PAIR_COLUMNS, compared))
        page = folder / "report.html"
        page.write_text(page_of("report.html", data), encoding="utf-8")
        written.append(page)
        if pictures and models:
            from lie_metric.study.figures import draw

            written += draw(folder, models, found, layers, axis)
    except OSError as error:
        raise StudyError(f"`folder` must be writable, got {error}. The rows of the study are kept.") from error
    return written


def _generators(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model["values"]))


def _axis(models: Sequence[Mapping[str, Any]], x: str | None) -> str:
    there = [name for name in AXES if any(one[name] is not None for one in models)]
    if x is None:
        return there[0] if there else AXES[0]
    if x not in there:
        raise ValueError(f"`x` must be what was measured of a model, one of {there}, got {x!r}.")
    return x


def _paired(records: Mapping[str, Mapping[str, Record]]) -> dict[str, Any]:
    """What the page compares models from: deviations in millionths, each of which an error can do without."""
    of, reasons = kinds(records)
    freedom = {model: next(iter(found.values())).replicates.groups - 1 for model, found in records.items()}
    return {
        "level": LEVEL,
        "kind": of,
        "reasons": reasons,
        "freedom": freedom,
        "steps": {f"{nu}": steps(len(records) - 1, nu) for nu in sorted(set(freedom.values())) if len(records) > 1},
        "deviations": {
            model: {
                measure: {
                    name: [round(1e6 * part) if math.isfinite(part) else None for part in one.parts]
                    for name, one in deviations(record).items()
                }
                for measure, record in found.items()
            }
            for model, found in records.items()
        },
    }


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
