r"""Any two models of a study against each other, over the same images.

The logarithm of a ratio is a difference, and so is the deviation of its pseudo-values of the jackknife. A model's
deviations, kept once, therefore give the standard error of its ratio to any other model,

.. math:: \mathrm{se}(\log v_a - \log v_b) = \| e_a - e_b \|, \qquad
    e_j = \frac{\tilde\theta_j - \bar\theta}{\sqrt{G (h_j - 1)}}

with :math:`\theta = \log v` and :math:`\tilde\theta_j, h_j, G` as in
:meth:`~lie_metric.functional.sums.Replicates.standard_error`: the errors of :func:`lie_metric.compare`, for all pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lie_metric.compare import Compared, around, judged
from lie_metric.figures import unit_of
from lie_metric.functional.student import quantile
from lie_metric.records import Record, differences

__all__ = ["ALL", "PAIR_COLUMNS", "Deviations", "deviations", "kinds", "means_of", "pairs", "steps"]

LEVEL = 0.95
ALL = "mean of all"
"""The geometric mean over all generators, of what has no unit."""

PAIR_COLUMNS = ("measure", "generator", "a", "b", "ratio", "low", "high", "p", "p_holm", "verdict", "reason")
"""Columns of the table of pairs: ratio a / b, 95 % interval over images, verdict after Holm's correction over all pairs
of a measure and generator; where two models cannot be compared, the reason."""

Records = Mapping[str, Mapping[str, Record]]


def means_of(generators: Sequence[str], measure: str) -> dict[str, list[str]]:
    """What geometric means are over: generators of one unit, and all of them for what has no unit.

    Args:
        generators: Names.
        measure: The measure.

    Returns:
        By the name of the mean its generators, two or more.

    Example:
        >>> means_of(["translation_x", "translation_y", "rotation"], "relative")
        {'mean per half side': ['translation_x', 'translation_y']}
    """
    found: dict[str, list[str]] = {}
    for name in generators:
        if unit_of(name) != unit_of(""):  # what is not named may be of any unit
            found.setdefault(f"mean per {unit_of(name)}", []).append(name)
    if measure == "sensitivity":
        found[ALL] = list(generators)
    return {label: names for label, names in found.items() if len(names) > 1}


class Deviations(NamedTuple):
    """A value and the deviations that errors follow from.

    Attributes:
        logarithm: Of the value.
        parts: One for each group of images, see the module.
    """

    logarithm: float
    parts: tuple[float, ...]

    @property
    def error(self) -> float:
        """The standard error of the logarithm over images; NaN for fewer than two groups of them."""
        return math.hypot(*self.parts) if len(self.parts) > 1 else math.nan


def deviations(record: Record) -> dict[str, Deviations]:
    """The deviations of each generator, and of the geometric means.

    Args:
        record: A model's record of a measure.

    Returns:
        By name of the generator or mean; NaN where a value is not positive.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.LocalEquivarianceError("saturation", "lee")
        >>> metric.update(lambda x: x.mean((2, 3)), torch.rand(9, 1, 8, 8))
        >>> found = deviations(metric.record())["saturation"]
        >>> wanted = metric.replicates().map(torch.log).standard_error().item()
        >>> abs(found.error - wanted) < 1e-9
        True
    """
    kept = record.ratios()
    used = kept.images > 0
    share = (kept.images.sum() / kept.images[used])[:, None]
    pseudo = share * kept.value.log() - (share - 1) * kept.left_out[used].log()
    parts = (pseudo - pseudo.mean(0)) / ((share - 1) * len(share)).sqrt()
    found = {
        name: Deviations(
            float(kept.value[k].log()), tuple(parts[:, k].nan_to_num(math.nan, math.nan, math.nan).tolist())
        )
        for k, name in enumerate(record.names)
    }
    for label, names in means_of(record.names, record.measure).items():
        members = [found[name] for name in names]
        mean = tuple(sum(parts) / len(members) for parts in zip(*(one.parts for one in members), strict=True))
        found[label] = Deviations(sum(one.logarithm for one in members) / len(members), mean)
    return found


def kinds(records: Records) -> tuple[dict[str, int], list[list[str]]]:
    """Which models can be compared with which.

    Args:
        records: Records by model and measure.

    Returns:
        For each model the number of its kind, and for each two kinds what keeps them apart; empty for one and the same.
    """
    of: dict[str, int] = {}
    examples: list[Record] = []
    for model, found in records.items():
        record = next(iter(found.values()))
        for number, other in enumerate(examples):
            if not differences(other, record):
                of[model] = number
                break
        else:
            of[model] = len(examples)
            examples.append(record)
    return of, [[_reason(one, other) for other in examples] for one in examples]


def _reason(one: Record, other: Record) -> str:
    found = [(what.removeprefix("option ").strip("`"), here, there) for what, here, there, _ in differences(one, other)]
    told = [f"other {what}, {here} and {there}" for what, here, there in found]
    framed = {"frame", "size of images"} & {what for what, *_ in found}
    return "; ".join(told) + (" (--input-size gives all models one frame)" if framed else "")


def steps(count: int, freedom: float) -> list[float]:
    """How many standard errors each of Holm's steps asks for.

    Args:
        count: How many comparisons are made together.
        freedom: Degrees of freedom.

    Returns:
        For the largest ratio first.

    Example:
        >>> [round(one, 3) for one in steps(2, math.inf)]
        [2.241, 1.96]
    """
    return [quantile(1 - (1 - LEVEL) / (count - step), freedom) for step in range(count)]


def pairs(records: Records, against: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The table of pairs.

    Args:
        records: Records by model and measure, see :func:`lie_metric.study.read_records`.
        against: Models that all others are compared with; None compares every two.

    Returns:
        Rows with the keys of :data:`PAIR_COLUMNS`.

    Raises:
        ValueError: If a model is not among them.

    Example:
        >>> import torch, lie_metric as lm
        >>> images, records = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {}
        >>> for name, pool in (("mean", lambda x: x.mean((2, 3))), ("peak", lambda x: x.amax((2, 3)))):
        ...     metric = lm.LocalEquivarianceError("saturation", "lee")
        ...     metric.update(pool, images)
        ...     records[name] = {"lee": metric.record()}
        >>> [(row["a"], row["b"], row["verdict"]) for row in pairs(records)]
        [('mean', 'peak', 'a is less')]
    """
    asked = None if against is None else list(against)
    for name in asked or ():
        if name not in records:
            raise ValueError(
                f"`against` must name models with Lie derivatives in the study, got {name!r}. There are e.g. "
                f"{', '.join(list(records)[:3])}."
            )
    of, reasons = kinds(records)
    chosen = (
        list(itertools.combinations(records, 2))
        if asked is None
        else [(a, b) for place, b in enumerate(asked) for a in records if a not in asked[: place + 1]]
    )
    rows: list[dict[str, Any]] = []
    for measure in dict.fromkeys(measure for found in records.values() for measure in found):
        known = {model: deviations(found[measure]) for model, found in records.items() if measure in found}
        names = dict.fromkeys(name for found in known.values() for name in found)
        apart = [(a, b) for a, b in chosen if reasons[of[a]][of[b]]]
        together = [(a, b) for a, b in chosen if not reasons[of[a]][of[b]]]
        rows += [{"measure": measure, "a": a, "b": b, "reason": reasons[of[a]][of[b]]} for a, b in apart]
        for name in names:
            compared = [_compared(name, known[a][name], known[b][name]) for a, b in together]
            for (a, b), one in zip(together, judged(compared, LEVEL), strict=True):
                about = {"measure": measure, "generator": name, "a": a, "b": b}
                rows.append(about | {key: getattr(one, key) for key in PAIR_COLUMNS[4:10]})
    return rows


def _compared(name: str, a: Deviations, b: Deviations) -> Compared:
    error = math.dist(a.parts, b.parts) if len(a.parts) > 1 else math.nan
    found = around(a.logarithm - b.logarithm, error, len(a.parts) - 1, LEVEL)
    return Compared(name, math.exp(a.logarithm), math.exp(b.logarithm), *found, math.nan, "", error, math.nan)
