"""Regimes of finished runs side by side, as text, page and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lie_metric.compare import Compared
from lie_metric.figures import Curve, regime_panels, unit_of
from lie_metric.study.report import page_of
from lie_metric.tables import aligned, short, wrapped

__all__ = ["Regimes", "Row", "write_comparison"]


@dataclass(frozen=True)
class Row:
    """A regime's value of one generator, and its ratio to the baseline.

    Args:
        key: The text of the logged key before the generator.
        regime: The regime.
        generator: The generator, orbit or kind.
        value: Its last value; of several trainings the geometric mean.
        error: Its standard error, over trainings where there are several.
        trainings: How many trainings.
        compared: Its ratio to the baseline; None for the baseline itself.
        over: What the interval is over and how values were paired.
    """

    key: str
    regime: str
    generator: str
    value: float
    error: float
    trainings: int
    compared: Compared | None
    over: str


@dataclass
class Regimes:
    """What :func:`~lie_metric.study.comparison.compare_runs` returns; ``str`` shows the tables.

    Args:
        baseline: The regime that others are compared with.
        level: Probability of the intervals.
        rows: A row for each key, regime and generator.
        curves: By key, regime and generator the curve over epochs, with errors as in the rows.
        axis: What curves are over: "epochs" or "steps".
        notes: What a reader must know of errors and of what differs between runs.
        labels: By key what it is, in words.
        runs: By regime the names of its runs.
    """

    baseline: str
    level: float
    rows: list[Row]
    curves: dict[str, dict[str, dict[str, Curve]]]
    axis: str
    notes: list[str]
    labels: dict[str, str]
    runs: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        blocks = []
        for key in dict.fromkeys(row.key for row in self.rows):
            head = (
                "regime",
                "generator",
                "value",
                "±",
                f"/ {self.baseline}",
                "interval",
                "p (Holm)",
                "over",
                "verdict",
            )
            lines: list[tuple[str, ...]] = [head]
            for row in self.rows:
                if row.key != key:
                    continue
                told: tuple[str, ...] = ("", "", "", "", "baseline")
                if row.compared is not None:
                    one = row.compared
                    p = "< 0.0001" if one.p_holm < 1e-4 else short(one.p_holm)
                    told = (short(one.ratio), f"{short(one.low)} to {short(one.high)}", p, row.over, one.verdict)
                lines.append((row.regime, row.generator, short(row.value), short(row.error), *told))
            blocks.append(f"{key}\n{aligned(lines)}")
        return "\n\n".join([*blocks, *(wrapped(note) for note in self.notes)])


def write_comparison(folder: Path | str, found: Regimes, *, pictures: bool = True) -> list[Path]:
    """Writes ``comparison.html``, which needs neither network nor server, a text, and a picture for each measure.

    Args:
        folder: Where they go.
        found: What :func:`~lie_metric.study.comparison.compare_runs` returned.
        pictures: Whether PNGs are drawn; they need matplotlib.

    Returns:
        The files written.

    Raises:
        ValueError: If the folder cannot be written.
    """
    folder = Path(folder)
    data = {
        "baseline": found.baseline,
        "axis": found.axis,
        "notes": found.notes,
        "labels": found.labels,
        "runs": found.runs,
        "units": {row.generator: unit_of(row.generator) for row in found.rows},
        "rows": [{**vars(row), "compared": None if row.compared is None else vars(row.compared)} for row in found.rows],
        "curves": {
            key: {
                regime: {name: vars(curve) for name, curve in by_name.items()} for regime, by_name in by_regime.items()
            }
            for key, by_regime in found.curves.items()
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "comparison.html", folder / "comparison.txt"]
        written[0].write_text(page_of("comparison.html", data), encoding="utf-8")
        written[1].write_text(f"{found}\n", encoding="utf-8")
        if pictures:
            for key, regimes in found.curves.items():
                figure = regime_panels(regimes, ylabel=found.labels[key].replace("_", " "), axis=found.axis)
                written.append(folder / f"{key}.png")
                figure.savefig(written[-1], dpi=110)
    except OSError as error:
        raise ValueError(f"`out` must be a folder that can be written, got {error}. Choose another one.") from error
    return written
