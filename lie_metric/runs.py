"""Curves of finished runs, from the files that the monitor keeps or from those of loggers, with regimes and seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lie_metric.records import Record
from lie_metric.run_files import Point, Run, kind_of, number_of, of_export, of_folder
from lie_metric.tables import pandas

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Point", "Run", "read", "read_record", "read_runs"]

Paths = str | Path | Sequence[str | Path]

_SEED = re.compile(r"(?:(?:^|[-_. ])seed[-_=]?|-s)(\d+)$", re.IGNORECASE)
_VERSION = re.compile(r"(?:^|[-_. ])version[-_=]?(\d+)$", re.IGNORECASE)


def read_runs(paths: Paths, by: str | Sequence[str] = "regime", *, regex: str | None = None) -> DataFrame:
    """Curves of runs as one table.

    Folders are searched with all that is in them. Of each run the first of these is read: the monitor's own
    ``<prefix>.jsonl``, TensorBoard's event files, Lightning's ``metrics.csv``. A CSV file that is given by name may be
    an export of Weights & Biases or MLflow, wide (a column for each key, also ``<run> - <key>`` and ``metrics.<key>``)
    or long (columns ``key`` and ``value``).

    *Regimes* are what the regular expression finds in the path, its group ``regime`` or its first one; else the values
    of the hyperparameters ``by`` (in ``hparams.yaml``, TensorBoard's hyperparameters, the monitor's file, or columns of
    an export); else the name of the folder without a part for the seed. *Seeds* are the hyperparameter ``seed``, the
    group ``seed``, a part of the path such as ``seed_3`` or ``-s3``, the seed of Lightning's ``seed_everything``, or a
    part such as ``version_3``.

    Args:
        paths: Folders or files, one or several.
        by: The hyperparameter that names the regime, or several.
        regex: A regular expression for the path; it takes precedence over ``by``.

    Returns:
        A pandas DataFrame with the columns ``run``, ``regime``, ``seed``, ``key``, ``generator``, ``loader``, ``epoch``
        (epochs completed; 0 is the untrained model), ``step``, ``value``, ``standard_error`` (over images).

    Raises:
        ModuleNotFoundError: If pandas is not installed, or TensorBoard where there are only its files.
        ValueError: If there is nothing to read, or a file cannot be understood.

    Warns:
        UserWarning: If a part of a file was not understood.
    """
    frames = pandas()
    columns = ["run", "regime", "seed", "key", "generator", "loader", "epoch", "step", "value", "standard_error"]
    rows = [
        {"run": run.name, "regime": run.regime, "seed": run.seed, **vars(point)}
        for run in read(paths, by, regex=regex)
        for point in run.points
    ]
    return frames.DataFrame(rows, columns=columns)


def read_record(path: str | Path, key: str = "equivariance", *, epoch: float | None = None, loader: int = 0) -> Record:
    """What :func:`lie_metric.compare` needs of one epoch of a run, from the file that the monitor keeps.

    Args:
        path: The run's folder, or the file ``<prefix>.jsonl``.
        key: The text of the logged keys before the generator: ``"equivariance"`` is the relative error,
            ``"equivariance_lee"`` LEE.
        epoch: Epochs of training that were completed, 0 for the untrained model; the default is the last.
        loader: Number of the validation loader.

    Returns:
        The record.

    Raises:
        ValueError: If there is no such record.
    """
    runs = [run for run in read(path) if run.records]
    if len(runs) != 1:
        raise ValueError(
            f"`path` must hold one run with a file that the monitor keeps, got {len(runs)} in {path}. Give the run's "
            "own folder; runs of earlier versions have no such file."
        )
    kept = runs[0].records
    if (key, loader) not in kept:
        raise ValueError(f"`key` must be one of {sorted({name for name, _ in kept})}, got {key!r} in {path}.")
    found = kept[key, loader]
    if epoch is None:
        return found[-1][1]
    for when, record in reversed(found):
        if when == epoch:
            return record
    raise ValueError(f"`epoch` must be one of {[when for when, _ in found]}, got {epoch!r} in {path}.")


def read(paths: Paths, by: str | Sequence[str] = "regime", *, regex: str | None = None) -> list[Run]:
    """The runs below some paths, see :func:`read_runs`.

    Args:
        paths: Folders or files, one or several.
        by: The hyperparameter that names the regime, or several.
        regex: A regular expression for the path.

    Returns:
        The runs, in the order of their names.

    Raises:
        ValueError: If there is nothing to read.
    """
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    names = (by,) if isinstance(by, str) else tuple(by)
    pattern = _compiled(regex)
    folders: dict[Path, None] = {}
    runs: list[Run] = []
    for path in given:
        if path.is_dir():
            files = (file for file in path.rglob("*") if kind_of(file))
            folders |= dict.fromkeys(sorted({file.parent for file in files}, key=str))
        elif path.is_file() and path.suffix == ".csv" and path.name != "metrics.csv":
            runs += of_export(path, names)
        elif path.is_file() and kind_of(path):
            folders[path.parent] = None
        else:
            what = "is no file of a run" if path.exists() else "does not exist"
            raise ValueError(
                f"`paths` must be folders of runs, or CSV files, got {str(path)!r}, which {what}. Give what the logger "
                "writes to, such as runs/*."
            )
    for folder in folders:
        run = of_folder(folder)
        if run is not None:
            runs.append(run)
    if not any(run.points for run in runs):
        raise ValueError(
            f"`paths` must hold runs with keys such as 'equivariance/rotation', got none in "
            f"{', '.join(str(path) for path in given[:5])}. Add `lie_metric.EquivarianceMonitor()` to the callbacks "
            "of the Trainer, and give it a logger."
        )
    runs = [run for run in runs if run.points]
    for run in runs:
        run.regime, run.seed = _regime(run, names, pattern)
    return runs


def _compiled(regex: str | None) -> re.Pattern[str] | None:
    if regex is None:
        return None
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ValueError(f"`regex` must be a regular expression, got {regex!r}: {error}.") from error
    if not pattern.groups:
        raise ValueError(
            f"`regex` must have a group for the regime, got {regex!r}. Put parentheses around it, such as "
            r"'(?P<regime>\w+)-s(?P<seed>\d+)'."
        )
    return pattern


def _regime(run: Run, by: Sequence[str], pattern: re.Pattern[str] | None) -> tuple[str, int | None]:
    parts = [part for part in Path(run.name).parts if part not in {"/", "."}]
    found = None if pattern is None else pattern.search(run.name)
    groups = {} if found is None else found.groupdict()
    seeds = [run.hyperparameters.get("seed"), groups.get("seed")]
    seeds += [match[1] for match in map(_SEED.search, reversed(parts)) if match]
    seeds.append(run.hyperparameters.get("seed_everything"))
    seeds += [match[1] for match in map(_VERSION.search, reversed(parts)) if match]
    seed = next((int(one) for one in map(number_of, seeds) if math.isfinite(one)), None)
    if pattern is not None:
        if found is None:
            raise ValueError(f"`regex` must match the path of every run, got {pattern.pattern!r} for {run.name}.")
        return groups.get("regime") or next((one for one in found.groups() if one), "") or run.name, seed
    if all(name in run.hyperparameters for name in by):
        return " ".join(str(run.hyperparameters[name]) for name in by), seed
    for part in reversed(parts):
        name = _SEED.sub("", _VERSION.sub("", part))
        if name:
            return name, seed
    return run.name, seed
