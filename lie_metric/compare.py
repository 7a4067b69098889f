"""Which of two models responds less: ratios over the same images or over trainings, with intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lie_metric.functional.student import quantile, two_sided
from lie_metric.functional.sums import Replicates, validated_level
from lie_metric.metrics.base import ModelMetric
from lie_metric.records import Record, refuse_different
from lie_metric.tables import aligned, pandas, short, wrapped
from lie_metric.warning import warn

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Compared", "Comparison", "around", "compare", "holm", "judged", "over_trainings"]

Side = ModelMetric | Record | Sequence[ModelMetric] | Sequence[Record]


@dataclass(frozen=True)
class Compared:
    """The comparison of one generator, orbit or kind.

    Args:
        name: Its name.
        a: The value of a; of several trainings the geometric mean.
        b: That of b.
        ratio: a / b.
        low: Lower end of the interval of the ratio.
        high: Upper end.
        p: Probability of a ratio at least as far from 1, on the scale of logarithms, if the two were alike.
        p_holm: The same, corrected for as many comparisons as were made together (Holm 1979).
        verdict: ``"a is less"``, ``"a is more"``, ``"undecided"``, or ``"undefined"`` where there is no ratio.
        over_images: Standard error over images of the logarithm of the ratio.
        over_trainings: Standard error over trainings of the same; NaN for one training each.
    """

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    p: float
    p_holm: float
    verdict: str
    over_images: float
    over_trainings: float

    @property
    def standard_error(self) -> float:
        """The standard error of the logarithm of the ratio from which interval and verdict follow."""
        return self.over_images if math.isnan(self.over_trainings) else self.over_trainings


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns: rows, and what they are of; ``str`` shows them as a table.

    Args:
        rows: One for each name.
        measure: What is compared.
        level: Probability of the intervals; verdicts are at the level of significance 1 - level.
        trainings: How many pairs of trainings.
        images: Over how many images.
        decibels: Whether a and b are decibels.

    Example:
        >>> row = Compared("rotation", 1.0, 2.0, 0.5, 0.4, 0.625, 0.001, 0.001, "a is less", 0.1, math.nan)
        >>> print(Comparison((row,), "relative", 0.95, 1, 256))
        relative  a  b  a / b  95 % interval      p  verdict
        rotation  1  2    0.5   0.4 to 0.625  0.001  a is less
        Errors are over 256 images, the same for both, of one training each: they do not cover the spread between
        trainings. Standard error of log(a / b): over images 0.1.
    """

    rows: tuple[Compared, ...]
    measure: str
    level: float
    trainings: int
    images: int
    decibels: bool = False

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Compared:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"`name` must be one of {[row.name for row in self.rows]}, got {name!r}.")

    @property
    def over(self) -> str:
        """What the intervals, p values and verdicts are over: ``"images"`` or ``"trainings"``."""
        return "trainings" if self.trainings > 1 else "images"

    @property
    def caption(self) -> str:
        """What the errors are over, and what was done to the verdicts, in words."""

        def spelled(values: Sequence[float]) -> str:
            texts = [f"{value:.2g}" for value in values]
            return texts[0] if len(set(texts)) == 1 else ", ".join(texts)  # in the order of the rows

        images = spelled([row.over_images for row in self.rows])
        if self.over == "trainings":
            told = (
                f"Errors are over {self.trainings} pairs of trainings (Student's t on logarithms of ratios). Standard "
                f"error of log(a / b): over trainings {spelled([row.over_trainings for row in self.rows])}; over the "
                f"{self.images} images, the same for all, {images}."
            )
        else:
            told = (
                f"Errors are over {self.images} images, the same for both, of one training each: they do not cover the "
                f"spread between trainings. Standard error of log(a / b): over images {images}."
            )
        if len(self.rows) > 1:
            told += (
                f" Verdicts are corrected for {len(self.rows)} comparisons (Holm) at {1 - self.level:.2g}; p values "
                "and intervals are of one each."
            )
        if self.decibels:
            told += " Values are decibels; a / b is the ratio of the mean squared errors behind them."
        return told

    def __str__(self) -> str:
        head = (self.measure, "a", "b", "a / b", f"{100 * self.level:g} % interval", "p", "verdict")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            numbers = (row.a, row.b, row.ratio)
            p = "< 0.0001" if row.p < 1e-4 else f"{row.p:.2g}"
            lines.append((row.name, *map(short, numbers), f"{short(row.low)} to {short(row.high)}", p, row.verdict))
        return f"{aligned(lines)}\n{wrapped(self.caption)}"

    def to_frame(self) -> DataFrame:
        """The rows as a pandas DataFrame.

        Returns:
            A frame with the fields of :class:`Compared` as columns.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        return pandas().DataFrame([vars(row) for row in self.rows], columns=[one.name for one in fields(Compared)])


def compare(a: Side, b: Side, measure: str | None = None, level: float = 0.95) -> Comparison:
    r"""Whether a responds less than b: ratios of a measure, with errors that are paired over the same images.

    .. math:: d = \log v_a - \log v_b, \qquad d_{(j)} = \log v_{a(j)} - \log v_{b(j)}

    The standard error of d is the grouped jackknife over the differences without each group of images (Busing, Meijer &
    van der Leeden 1999, Eq. 2.3), so that what makes some images harder for both cancels; the interval is
    :math:`\exp(d \pm q\,\mathrm{se})` with q of Student's t with as many degrees of freedom as groups, less one.

    Of sequences, one training each, entries are paired in their order (give the same seeds in the same order):
    interval and p value are those of Student's t on the m logarithms of ratios, with m - 1 degrees of freedom. Both
    errors are in the result; that over images is the jackknife of the mean of the logarithms.

    Verdicts are at the level of significance 1 - level after Holm's correction (1979, Scand. J. Statist. 6) for as many
    comparisons as there are names.

    Args:
        a: A metric, a record (:meth:`~lie_metric.LocalEquivarianceError.record`, :func:`lie_metric.read_record`), or a
            sequence of them, one for each training.
        b: What to compare with: of the same class and generators, over the same images in the same groups.
        measure: Which measure; the default is the one that the metrics compute.
        level: Probability of the intervals.

    Returns:
        The comparison, a row for each name.

    Raises:
        TypeError: If something else is given.
        ValueError: If the two cannot be compared: other images, stencil, units, generators or options; if fewer than
            two pairs of trainings, or not as many of one as of the other, are given.

    Warns:
        UserWarning: If a value is zero or not finite, so that there is no ratio.

    Example:
        >>> import lie_metric as lm
        >>> images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> a, b = lm.LocalEquivarianceError("rotation"), lm.LocalEquivarianceError("rotation")
        >>> a.update(lambda x: x[..., 2:6, 2:6].mean((2, 3)), images)
        >>> b.update(lambda x: x[..., 4:, 4:].mean((2, 3)), images)
        >>> compare(a, b)["rotation"].verdict
        'a is less'
    """
    validated_level(level)
    sides = [_records(side, name, measure) for side, name in ((a, "a"), (b, "b"))]
    several = [not isinstance(side, (ModelMetric, Record)) for side in (a, b)]
    if several[0] != several[1]:
        raise TypeError(
            "`a` and `b` must be both single or both sequences, got one of each. Pass `compare([a1, a2], [b1, b2])`, "
            "with one metric or record for each training."
        )
    left, right = sides
    if len(left) != len(right):
        raise ValueError(
            f"`b` must hold as many trainings as `a`, got {len(right)} and {len(left)}. Pair the same seeds."
        )
    if several[0] and len(left) < 2:
        raise ValueError(
            f"`a` and `b` must hold at least 2 pairs of trainings, got {len(left)}: a spread between trainings needs "
            "two. Pass single metrics for errors over images, or train with further seeds."
        )
    first = left[0]
    for other in (*left[1:], *right):
        refuse_different(first, other)
    logs = [_logarithms(one, two) for one, two in zip(left, right, strict=True)]
    mean = _mean(logs)
    over_images = mean.standard_error()
    means = [torch.stack([record.ratios().value.log() for record in side]).mean(0) for side in sides]
    # Decibels are shown as they are.
    shown = [-10 * m / math.log(10) if first.decibels else m.exp() for m in means]
    rows = []
    for k, name in enumerate(first.names):
        found = [one.value[k].item() for one in logs]
        if len(logs) > 1:
            centre, error, freedom = over_trainings(found)
        else:
            centre, error, freedom = found[0], over_images[k].item(), mean.groups - 1
        rows.append(
            Compared(
                name,
                shown[0][k].item(),
                shown[1][k].item(),
                *around(centre, error, freedom, level),
                math.nan,
                "",
                over_images[k].item(),
                error if len(logs) > 1 else math.nan,
            )
        )
    undefined = [row.name for row in rows if math.isnan(row.p)]
    if undefined:
        warn(
            f"`ratio` or its error is NaN for {undefined}: a value is zero or NaN in one of the two, perhaps only "
            "without one of the groups of images, or there are fewer than two groups."
        )
    return Comparison(judged(rows, level), first.measure, level, len(logs), first.images, first.decibels)


def around(centre: float, error: float, freedom: float, level: float) -> tuple[float, float, float, float]:
    """Ratio, ends of its interval, and p value, from a logarithm and its standard error.

    Args:
        centre: The logarithm.
        error: Its standard error.
        freedom: Degrees of freedom.
        level: Probability of the interval.

    Returns:
        Ratio, lower end, upper end, p.

    Example:
        >>> around(0.0, 0.1, math.inf, 0.95)[3]
        1.0
    """
    margin = quantile(level, freedom) * error
    p = 1.0 if centre == error == 0 else two_sided(centre / error if error else math.inf, freedom)
    p = math.nan if math.isnan(centre) or math.isnan(error) else p
    return math.exp(centre), _exp(centre - margin), _exp(centre + margin), p


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def over_trainings(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired logarithms of ratios, its standard error over trainings, and the degrees of freedom.

    Args:
        values: One for each pair of trainings.

    Returns:
        Mean, standard error, degrees of freedom.

    Example:
        >>> over_trainings([1.0, 2.0])
        (1.5, 0.5, 1)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan, 0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count), count - 1


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for several comparisons by Holm's step-down method, which keeps the familywise error.

    Args:
        p: P values; NaN is no comparison.

    Returns:
        As many, in their order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((k for k, one in enumerate(p) if not math.isnan(one)), key=lambda k: p[k])
    found, largest = list(p), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[k]))
        found[k] = largest
    return found


def judged(rows: Sequence[Compared], level: float) -> tuple[Compared, ...]:
    """The rows with corrected p values and verdicts.

    Args:
        rows: Rows that are judged together.
        level: Verdicts are at the level of significance 1 - level.

    Returns:
        As many rows.
    """

    def verdict(row: Compared, p: float) -> str:
        if math.isnan(p):
            return "undefined"
        return "undecided" if p > 1 - level else "a is less" if row.ratio < 1 else "a is more"

    corrected = holm([row.p for row in rows])
    return tuple(replace(row, p_holm=p, verdict=verdict(row, p)) for row, p in zip(rows, corrected, strict=True))


def _records(side: Side, name: str, measure: str | None) -> list[Record]:
    given: list[Any] = list(side) if isinstance(side, (tuple, list)) else [side]
    if not all(isinstance(one, (ModelMetric, Record)) for one in given):
        raise TypeError(
            f"`{name}` must be a metric of this library, a record, or a list of them, got {side!r}. Pass e.g. a "
            "`LocalEquivarianceError` that was updated, or `lie_metric.read_record(path)`."
        )
    found = []
    for one in given:
        if isinstance(one, ModelMetric):
            found.append(one.record(measure))
        elif measure is not None and one.measure != measure:
            raise ValueError(
                f"`measure` must be that of the records, got {measure!r} for a record of {one.measure!r}. Leave it "
                "out, or read the other record."
            )
        else:
            found.append(one)
    return found


def _logarithms(one: Record, two: Record) -> Replicates:
    a, b = one.ratios(), two.ratios()

    def difference(x: Tensor, y: Tensor) -> Tensor:
        found = x.log() - y.log()
        return torch.where(torch.isfinite(found), found, torch.nan)

    return Replicates(difference(a.value, b.value), difference(a.left_out, b.left_out), a.images)


def _mean(parts: Sequence[Replicates]) -> Replicates:
    count = len(parts)
    value = sum((part.value for part in parts), torch.zeros(())) / count
    return Replicates(value, sum((part.left_out for part in parts), torch.zeros(())) / count, parts[0].images)
