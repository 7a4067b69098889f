"""Files of replicates, from which runs are compared afterwards: one line for each measured epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lie_metric.metrics.base import ModelMetric

__all__ = ["append", "entries_of"]


def entries_of(
    name: str, metric: ModelMetric, prefix: str, measures: Sequence[str], loader: int | None = None
) -> list[dict[str, Any]]:
    """What is kept of a metric, synchronised over processes.

    Args:
        name: That of a companion; none for the Lie derivatives.
        metric: The metric.
        prefix: First word of the keys.
        measures: Which measures of the Lie derivatives are logged; of a companion the one that it computes.
        loader: Number of the validation loader, where there are several.

    Returns:
        Entries by key; none of "linearity", a ratio of two metrics, which has no replicates of its own.
    """
    if name == "linearity":
        return []
    found = []
    records = metric.records([metric.measure] if name else measures)
    for part, record in [pair for each in records for pair in each.by_part()]:
        middle = name or ("" if record.measure == "relative" else record.measure)
        entry = {
            "key": "_".join(filter(None, (prefix, part, middle))),
            "suffix": "" if loader is None else f"/dataloader_idx_{loader}",
            "loader": loader or 0,
        }
        found.append(entry | record.to_json())
    return found


def append(path: Path, lines: Iterable[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
    """Adds lines to a file; a line that an interruption has torn ends where it is.

    Args:
        path: The file; made with its folders if needed.
        lines: The lines.
        header: The first line of a new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        texts = [json.dumps(line, allow_nan=False, separators=(",", ":")) for line in lines]
        if not size:
            texts.insert(0, json.dumps(header))
        file.write((("\n" if size and torn else "") + "".join(f"{text}\n" for text in texts)).encode())
