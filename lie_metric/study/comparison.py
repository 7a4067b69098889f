"""Regimes of finished runs against a baseline, from whatever files the runs left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lie_metric.compare import Compared, around, compare, judged, over_trainings
from lie_metric.figures import Curve
from lie_metric.functional.sums import validated_level
from lie_metric.records import IMAGES, SIZES, Record, decibels_to_ratios, differences
from lie_metric.runs import Point, Run, read
from lie_metric.study.regimes import Regimes, Row, write_comparison

__all__ = ["Regimes", "compare_runs", "write_comparison"]

_BASELINES = ("baseline", "none", "no_augmentation", "plain", "default", "control")


def compare_runs(
    paths: Sequence[str | Path],
    by: Sequence[str] = ("regime",),
    *,
    regex: str | None = None,
    baseline: str | None = None,
    measures: Sequence[str] = ("relative",),
    level: float = 0.95,
    loader: int = 0,
) -> Regimes:
    """Compares the last values of every regime with those of a baseline.

    Errors are over trainings where both have two seeds or more: paired (Student's t on logarithms of ratios) where at
    least two are common, otherwise Welch's t. With one training each they are over images: paired by the jackknife
    where both kept replicates of the same images, otherwise of the two standard errors as if they were independent.
    Verdicts are corrected for all comparisons of a measure (Holm).

    Args:
        paths: Folders of runs, or files, see :func:`lie_metric.read_runs`.
        by: Hyperparameters that name the regime.
        regex: A regular expression for the path instead.
        baseline: The regime to compare with; by default one called "none", "baseline" or alike, else the first.
        measures: "relative", or what stands behind the prefix in the keys, as "lee" or the name of a companion.
        level: Probability of the intervals.
        loader: Number of the validation loader.

    Returns:
        Rows, curves and notes.

    Raises:
        ValueError: If there are fewer than two regimes, no such baseline or measure, or two runs of one seed.
    """
    validated_level(level)
    runs = read(paths, by, regex=regex)
    regimes: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.regime, math.inf if run.seed is None else run.seed)):
        regimes.setdefault(run.regime, []).append(run)
    _refuse_alike(regimes, by)
    if baseline is None:
        baseline = next((name for name in _BASELINES if name in regimes), next(iter(regimes)))
    if baseline not in regimes:
        raise ValueError(f"`baseline` must be one of {list(regimes)}, got {baseline!r}.")
    regimes = {baseline: regimes[baseline]} | {name: found for name, found in regimes.items() if name != baseline}
    known = list(dict.fromkeys(point.key for run in runs for point in run.points))
    keys = [_key(measure, known) for measure in measures]
    notes: list[str] = []
    rows: list[Row] = []
    for key in keys:
        rows += _rows(regimes, key, loader, level, notes)
    if not rows:
        raise ValueError(f"`loader` must be the number of a validation loader, got {loader} for {keys}.")
    axis = "steps" if any(math.isnan(p.epoch) for run in runs for p in run.points if p.key in keys) else "epochs"
    curves = {key: _curves(regimes, key, loader, axis) for key in keys}
    notes = [*_explained(rows, regimes, level), *dict.fromkeys(notes), *_flags(regimes, keys, loader)]
    return Regimes(
        baseline,
        level,
        rows,
        curves,
        axis,
        notes,
        {key: "relative error" if measure == "relative" else key for key, measure in zip(keys, measures, strict=True)},
        {name: [run.name for run in found] for name, found in regimes.items()},
    )


def _refuse_alike(regimes: Mapping[str, Sequence[Run]], by: Sequence[str]) -> None:
    runs = [run for found in regimes.values() for run in found]
    told: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.hyperparameters.items():
            told.setdefault(name, set()).add(str(value))
    differing = [name for name, values in told.items() if len(values) > 1 and name not in {"seed", "seed_everything"}]
    advice = (
        f"Hyperparameters that differ between the runs: {', '.join(differing) or 'none'}. Name one or several with "
        "`--by NAME ...`, or tell regimes by their folders, `--by-regex '(?P<regime>...)-s(?P<seed>\\d+)'`."
    )
    if len(regimes) < 2:
        raise ValueError(
            f"`paths` must hold runs of at least two regimes, got {len(runs)} runs of {list(regimes)} by "
            f"{' '.join(by)}. {advice}"
        )
    for name, found in regimes.items():
        seeds = [run.seed for run in found]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            names = [run.name for run in found if run.seed == twice]
            raise ValueError(
                f"`paths` must hold one run for each regime and seed, got {len(names)} of {name!r} with seed {twice}: "
                f"{', '.join(names[:4])}. Leave out all but one, save a hyperparameter `seed`, or tell them "
                f"apart. {advice}"
            )


def _key(measure: str, known: Sequence[str]) -> str:
    prefixes = [key for key in known if not any(key != other and key.startswith(f"{other}_") for other in known)]
    for prefix in prefixes:
        for key in (prefix if measure == "relative" else f"{prefix}_{measure}", measure):
            if key in known:
                return key
    names = ["relative" if key in prefixes else key for key in known]
    raise ValueError(f"`measure` must be one of {names}, got {measure!r}.")


@dataclass(frozen=True)
class _Last:
    """The last value of a run: its logarithm on a scale of ratios, its relative standard error, and its record."""

    run: Run
    point: Point
    record: Record | None
    logarithm: float
    error: float


def _last(run: Run, key: str, generator: str, loader: int) -> _Last | None:
    points = [p for p in run.points if (p.key, p.generator, p.loader) == (key, generator, loader)]
    if not points:
        return None
    point = points[-1]
    kept = run.records.get((key, loader))
    record = kept[-1][1] if kept else None
    if record is not None and record.decibels:
        ratio = decibels_to_ratios(torch.tensor(point.value)).item()
        return _Last(run, point, record, math.log(ratio), point.standard_error * math.log(10) / 10)
    if not point.value > 0:
        return _Last(run, point, record, math.nan, math.nan)
    return _Last(run, point, record, math.log(point.value), point.standard_error / point.value)


def _rows(regimes: Mapping[str, Sequence[Run]], key: str, loader: int, level: float, notes: list[str]) -> list[Row]:
    generators = dict.fromkeys(
        p.generator
        for runs in regimes.values()
        for run in runs
        for p in run.points
        if (p.key, p.loader) == (key, loader)
    )
    rows: list[Row] = []
    for generator in generators:
        base: list[_Last] = []
        for index, (regime, runs) in enumerate(regimes.items()):
            found = [one for one in (_last(run, key, generator, loader) for run in runs) if one is not None]
            if index == 0:
                base = found
            if not found:
                notes.append(f"{regime} has no {key}/{generator}.")
                continue
            value, error = _summary(found)
            one, over = (None, "") if index == 0 else _against(generator, found, base, level, notes)
            rows.append(Row(key, regime, generator, value, error, len(found), one, over))
            if one is not None and math.isnan(one.ratio):
                notes.append(f"{key}/{generator} of {regime} or the baseline is zero, NaN or missing: no ratio.")
    rows.sort(key=lambda row: list(regimes).index(row.regime))
    asked = [k for k, row in enumerate(rows) if row.compared is not None]
    for k, one in zip(asked, judged([rows[k].compared for k in asked], level), strict=True):  # type: ignore[misc]
        words = {"a is less": "less", "a is more": "more"}
        verdict = "not comparable" if rows[k].over == "not comparable" else words.get(one.verdict, one.verdict)
        rows[k] = replace(rows[k], compared=replace(one, verdict=verdict))
    return rows


def _summary(found: Sequence[_Last]) -> tuple[float, float]:
    """Value and standard error of a regime, over trainings if there are several."""
    if len(found) == 1:
        return found[0].point.value, found[0].point.standard_error
    if any(one.record is not None and one.record.decibels for one in found):
        mean, error, _ = over_trainings([one.point.value for one in found])
        return mean, error
    mean, error, _ = over_trainings([one.logarithm for one in found])
    return math.exp(mean), math.exp(mean) * error


def _against(
    generator: str, found: Sequence[_Last], base: Sequence[_Last], level: float, notes: list[str]
) -> tuple[Compared, str]:
    """The ratio of a regime to the baseline with the best error that can be had."""
    nothing = Compared(
        generator, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, "", *[math.nan] * 2
    )
    if not base:
        return nothing, ""
    reasons = [
        what
        for one in found
        for other in base
        if one.record is not None and other.record is not None
        for what, *_ in differences(one.record, other.record)
    ]
    pairs = [
        (one, other) for one in found for other in base if one.run.seed == other.run.seed and one.run.seed is not None
    ]
    over_images = math.nan
    if len(pairs) > 1:
        centre, error, freedom = over_trainings([one.logarithm - other.logarithm for one, other in pairs])
        over = f"{len(pairs)} trainings, paired"
    elif len(found) > 1 and len(base) > 1:
        centre, error, freedom = _welch([one.logarithm for one in found], [one.logarithm for one in base])
        over = f"{len(found)} and {len(base)} trainings"
    else:
        one, other = pairs[0] if pairs else (found[0], base[0])
        centre, error, freedom, over = _over_images(generator, one, other, reasons, level)
        over_images = error
        if len(found) > 1 or len(base) > 1:
            notes.append(
                f"{one.run.regime}: fewer than two trainings on one side; compared is one pair ({one.run.name} and "
                f"{other.run.name})."
            )
    if set(reasons) - {"images"}:
        over = "not comparable"
    row = replace(
        nothing,
        a=_summary(found)[0],
        b=_summary(base)[0],
        over_images=over_images,
        over_trainings=math.nan if math.isfinite(over_images) else error,
    )
    ratio, low, high, p = around(centre, error, freedom, level)
    return replace(row, ratio=ratio, low=low, high=high, p=math.nan if over == "not comparable" else p), over


def _over_images(
    generator: str, one: _Last, other: _Last, reasons: Sequence[str], level: float
) -> tuple[float, float, float, str]:
    if one.record is not None and other.record is not None and not reasons:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zero and NaN are noted
            row = compare(one.record, other.record, level=level)[generator]
        return one.logarithm - other.logarithm, row.over_images, one.record.replicates.groups - 1, "images, paired"
    return one.logarithm - other.logarithm, math.hypot(one.error, other.error), math.inf, "images, not paired"


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of means, its standard error, and Welch's degrees of freedom."""
    (one, s, m), (other, t, n) = over_trainings(a), over_trainings(b)
    total = s * s + t * t
    freedom = total**2 / (s**4 / m + t**4 / n) if total > 0 else float(m + n)
    return one - other, math.sqrt(total), freedom


def _curves(regimes: Mapping[str, Sequence[Run]], key: str, loader: int, axis: str) -> dict[str, dict[str, Curve]]:
    found: dict[str, dict[str, Curve]] = {}
    for regime, runs in regimes.items():
        by_generator: dict[str, list[dict[float, Point]]] = {}
        for run in runs:
            own: dict[str, dict[float, Point]] = {}
            for p in run.points:
                if (p.key, p.loader) == (key, loader) and math.isfinite(p.value):
                    own.setdefault(p.generator, {})[p.step if axis == "steps" else p.epoch] = p
            for generator, points in own.items():
                by_generator.setdefault(generator, []).append(points)
        for generator, series in by_generator.items():
            common = sorted(set.intersection(*(set(one) for one in series)))
            rows = [[one[when] for one in series] for when in common]
            if not common:
                continue
            means = [over_trainings([p.value for p in points]) for points in rows]
            errors = [
                m[1] if len(points) > 1 else points[0].standard_error for m, points in zip(means, rows, strict=True)
            ]
            curve = Curve(common, [m[0] for m in means], [0.0 if math.isnan(e) else e for e in errors])
            found.setdefault(regime, {})[generator] = curve
    return found


def _explained(rows: Sequence[Row], regimes: Mapping[str, Sequence[Run]], level: float) -> list[str]:
    ways = dict.fromkeys(row.over for row in rows if row.compared is not None)
    told = [
        f"Baseline: {next(iter(regimes))}. Values are the last of each run (of several trainings their geometric "
        f"mean), intervals of ratios {100 * level:g} %. Verdicts are corrected for the comparisons of each measure "
        f"(Holm), at {1 - level:.2g}."
    ]
    if any("training" in way for way in ways):
        told.append(
            "Errors over trainings: the spread between seeds, which no number of images makes smaller (Student's t on "
            "logarithms; without common seeds Welch's)."
        )
    if any(way.startswith("2 trainings") for way in ways):
        told.append(
            "Two seeds hardly settle anything: intervals reach 12.7 standard errors to each side; with three seeds "
            "4.3, with five 2.8."
        )
    if any("images" in way for way in ways):
        told.append(
            "Errors over images: of one training each. They do not cover the spread between trainings, which is often "
            "several times as large: train further seeds before you believe a verdict."
        )
    if "images, not paired" in ways:
        told.append(
            "Not paired: without replicates of the same images errors are taken as independent, which makes intervals "
            "wider than they need be."
        )
    return told


def _flags(regimes: Mapping[str, Sequence[Run]], keys: Sequence[str], loader: int) -> list[str]:
    """What differs between runs that are set side by side."""
    runs = [run for found in regimes.values() for run in found]
    notes = []
    for key in keys:
        kept = [(run, run.records[key, loader][-1][1]) for run in runs if (key, loader) in run.records]
        told: dict[str, tuple[str, str]] = {}
        for (run, record), (first, reference) in ((pair, kept[0]) for pair in kept[1:]):
            for what, there, here, _ in differences(reference, record):
                told.setdefault(what, (f"{there} in {first.name}", f"{here} in {run.name}"))
        for what, (there, here) in told.items():
            advice = {"images": f" {IMAGES}", "size of images": f" {SIZES}"}.get(what, "")
            notes.append(f"Attention, other {what} ({key}): {there}, {here}.{advice}")
        lacking = [run.name for run in runs if (key, loader) not in run.records]
        if lacking and kept:
            notes.append(f"No replicates of {key} in {', '.join(lacking[:4])}: what they measured is not known.")
        elif lacking:
            notes.append(
                f"No run has replicates of {key}: whether images, sizes and stencils are the same cannot be told from "
                "what their loggers kept."
            )
        ends = {
            max((p.step if math.isnan(p.epoch) else p.epoch) for p in run.points if (p.key, p.loader) == (key, loader))
            for run in runs
            if any((p.key, p.loader) == (key, loader) for p in run.points)
        }
        if len(ends) > 1:
            notes.append(
                f"Attention, runs end at different times ({key}): {', '.join(f'{e:g}' for e in sorted(ends))}."
            )
    return notes
