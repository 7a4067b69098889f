"""Files that runs leave: the monitor's own, TensorBoard's, Lightning's tables, and exports of trackers."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lie_metric.records import VERSION, Record
from lie_metric.warning import warn

__all__ = ["Point", "Run", "kind_of", "number_of", "of_export", "of_folder"]


_LOADER = re.compile(r"^(?P<key>.*?)(?:/dataloader_idx_(?P<loader>\d+))?$")
_NAMED = ("run_name", "tags.mlflow.runname", "name", "run", "run_id", "run id")
_STEPS = ("step", "_step", "trainer/global_step", "global_step")


@dataclass(frozen=True)
class Point:
    """A value of a curve.

    Args:
        key: The text of the logged key before the generator.
        generator: The generator, orbit or kind.
        loader: Number of the validation loader.
        epoch: Epochs of training that were completed, 0 for the untrained model; NaN if it is not known.
        step: The step at which it was logged; NaN if it is not known.
        value: The value.
        standard_error: Its standard error over images; NaN if it is not known.
    """

    key: str
    generator: str
    loader: int
    epoch: float
    step: float
    value: float
    standard_error: float


@dataclass
class Run:
    """One training.

    Args:
        name: Its folder, or its name in an export.
        source: The kind of file that was read: "records", "tensorboard", "csv" or "export".
        points: Values of all curves, in the order of steps.
        hyperparameters: Those that were saved, as one level.
        regime: What tells it from other runs, apart from its seed.
        seed: Its seed; None if it is not known.
        records: For each key and loader the records of the epochs, in the order of the points.
    """

    name: str
    source: str
    points: list[Point] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    regime: str = ""
    seed: int | None = None
    records: dict[tuple[str, int], list[tuple[float, Record]]] = field(default_factory=dict)


def kind_of(file: Path) -> str:
    """What kind of file of a run it is.

    Args:
        file: The file.

    Returns:
        "records", "tensorboard" or "csv"; empty for another.
    """
    if file.suffix == ".jsonl":
        return "records"
    if ".tfevents." in file.name:
        return "tensorboard"
    return "csv" if file.name == "metrics.csv" else ""


def of_folder(folder: Path) -> Run | None:
    """The run of a folder, from the best of its files.

    Args:
        folder: The folder.

    Returns:
        The run; None if none of its files has points.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        files.setdefault(kind_of(file), []).append(file)
    run = Run(str(folder), "")
    run.hyperparameters = _yaml(folder / "hparams.yaml")
    for source, reader in (("records", _records), ("tensorboard", _events), ("csv", _metrics)):
        if source in files:
            reader(files[source], run)
            if run.points:
                run.source = source
                return run
    return None


def _records(files: Sequence[Path], run: Run) -> None:
    for file in files:
        lines = file.read_bytes().decode("utf-8", "replace").split("\n")
        found: dict[tuple[float, float, bool], Mapping[str, Any]] = {}
        broken = []
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                version = line["version"]
            except (json.JSONDecodeError, KeyError, TypeError):
                broken.append(number)
                continue
            if version > VERSION:
                raise ValueError(
                    f"`paths` must hold files of version {VERSION} or lower, got version {version} in {file}. Upgrade "
                    "lie_metric."
                )
            if "records" not in line:
                run.hyperparameters = {**line.get("hyperparameters", {}), **run.hyperparameters}
                if "seed" in line:
                    run.hyperparameters.setdefault("seed_everything", line["seed"])
                continue
            # A resumed run may measure an epoch again.
            found[float(line["step"]), float(line["epoch"]), bool(line["baseline"])] = line
        if len(broken) == len([text for text in lines if text.strip()]):
            continue  # someone else's
        if broken:
            warn(f"Lines {broken} of {file} are torn; what they held of the run is missing.")
        for (step, epoch, baseline), line in sorted(found.items(), key=lambda item: (not item[0][2], item[0])):
            completed = 0.0 if baseline else epoch + 1
            for entry in line["records"]:
                record = Record.from_json(entry, f"{file.parent}, epoch {completed:g}")
                errors = record.replicates.standard_error().tolist()
                where = entry["key"], int(entry["loader"])
                run.records.setdefault(where, []).append((completed, record))
                values = record.replicates.value.tolist()
                run.points += [
                    Point(where[0], name, where[1], completed, step, value, error)
                    for name, value, error in zip(record.names, values, errors, strict=True)
                ]


def _events(files: Sequence[Path], run: Run) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoard's files need tensorboard, which is not installed. Run `pip install 'lie_metric[examples]'`."
        ) from error
    accumulator = EventAccumulator(str(files[0].parent), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    epochs = {event.step: event.value for event in accumulator.Scalars("epoch")} if "epoch" in tags else {}
    columns = {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}
    run.points = _points(columns, epochs)
    run.hyperparameters = _declared(accumulator) | run.hyperparameters


def _declared(accumulator: Any) -> dict[str, Any]:
    """Hyperparameters in TensorBoard's own files."""
    try:
        from tensorboard.plugins.hparams import plugin_data_pb2

        content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        declared = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        kinds = ("string_value", "number_value", "bool_value")
        return {
            name: getattr(value, kind) for name, value in declared.items() for kind in kinds if value.HasField(kind)
        }
    except (KeyError, ImportError):
        return {}


def _metrics(files: Sequence[Path], run: Run) -> None:
    with files[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns, epochs = _columns(rows)
    run.points = _points(columns, epochs)


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[float, float]], dict[float, float]]:
    """By key the values at each step, and the epoch of each step, of rows as loggers write them."""
    columns: dict[str, dict[float, float]] = {}
    epochs: dict[float, float] = {}
    for number, row in enumerate(rows):
        told = {name.strip().lower(): value for name, value in row.items() if name}
        steps = (number_of(told.get(name)) for name in _STEPS)
        step = next((one for one in steps if not math.isnan(one)), float(number))
        if not math.isnan(epoch := number_of(told.get("epoch"))):
            epochs[step] = epoch
        for name, text in row.items():
            if name and not math.isnan(value := number_of(text)):
                columns.setdefault(name, {})[step] = value
    return columns, epochs


def number_of(text: Any) -> float:
    """A number from a cell of a table.

    Args:
        text: The cell.

    Returns:
        The number; NaN if it is none.
    """
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _points(columns: Mapping[str, Mapping[float, float]], epochs: Mapping[float, float]) -> list[Point]:
    """Points of those columns that are keys of a monitor: each has a partner with its standard errors."""
    found = []
    for tag, values in columns.items():
        matched = _LOADER.match(tag)
        if matched is None or "/" not in matched["key"]:
            continue
        key, _, generator = matched["key"].partition("/")
        partner = tag.replace(f"{key}/", f"{key}_se/", 1)
        # Exports may be of chosen keys, without their errors.
        if key.endswith("_se") or not (partner in columns or key.startswith("equivariance")):
            continue
        errors = columns.get(partner, {})
        for step, value in values.items():
            # The untrained model stands at step 0.
            epoch = 0.0 if step == 0 else epochs.get(step, math.nan) + 1
            loader = int(matched["loader"] or 0)
            found.append(Point(key, generator, loader, epoch, step, value, errors.get(step, math.nan)))
    return sorted(found, key=lambda point: point.step)


def of_export(path: Path, by: Sequence[str]) -> list[Run]:
    """The runs of a CSV file from elsewhere.

    Args:
        path: The file.
        by: Hyperparameters that name the regime.

    Returns:
        The runs.

    Raises:
        ValueError: If it is empty, or has no keys of a monitor.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"`paths` must hold tables with rows, got none in {path}.")
    lower = {name.strip().lower(): name for name in rows[0] if name}
    long = next((lower[name] for name in ("key", "metric", "tag") if name in lower), None)
    if long is not None and "value" in lower:
        rows = [{**row, str(row[long]): row[lower["value"]]} for row in rows]
    named = [lower[name] for name in _NAMED if name in lower]
    by_run: dict[str, list[dict[str, Any]]] = {}
    unknown: dict[str, None] = {}
    for row in rows:
        own = str(row[named[0]]) if named else path.stem
        plain: dict[str, Any] = {}
        for name, value in row.items():
            # Weights & Biases: "<run> - <key>", with the extremes of each point beside it.
            apart = re.match(r"^(?P<run>.+) - (?P<key>[^/]+/.+?)(?P<end>__MIN|__MAX)?$", name or "")
            if apart is None:
                plain[(name or "").removeprefix("metrics.")] = value
            elif apart["end"] is None:
                shared = {step: row[lower[step]] for step in (*_STEPS, "epoch") if step in lower}
                by_run.setdefault(apart["run"].removeprefix("Group: "), []).append({**shared, apart["key"]: value})
        if any("/" in name for name in plain):
            by_run.setdefault(own, []).append(plain)
    runs = []
    for name, found in by_run.items():
        columns, epochs = _columns(found)
        run = Run(name, "export", _points(columns, epochs))
        understood = {f"{point.key}/{point.generator}" for point in run.points}
        known = {*_NAMED, *_STEPS, "epoch", "seed", "regime", "key", "metric", "tag", "value", *by}
        for row in found:
            for column, value in row.items():
                plain_name = column.removeprefix("params.").removeprefix("config.")
                key = _LOADER.match(column)["key"].replace("_se/", "/", 1)  # type: ignore[index]
                if "/" not in column and value not in {None, ""}:
                    run.hyperparameters.setdefault(plain_name, value)
                if key not in understood and plain_name.lower() not in known:
                    unknown[column] = None
        runs.append(run)
    if not any(run.points for run in runs):
        raise ValueError(
            f"`paths` must hold tables with keys such as 'equivariance/rotation', got the columns "
            f"{list(lower.values())[:12]} in {path}. Export the monitor's keys, as columns, as '<run> - <key>', or as "
            "columns 'key' and 'value'."
        )
    if unknown:
        warn(f"Not understood in {path}, and left out: {', '.join(list(unknown)[:12])}{' ...' * (len(unknown) > 12)}.")
    return runs


def _yaml(path: Path) -> dict[str, Any]:
    """Hyperparameters as one level; objects are left out."""
    if not path.is_file():
        return {}
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads what is plain, and None for what is not."""

    Loader.add_multi_constructor("", lambda *_: None)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return {}
    return dict(_flat(found)) if isinstance(found, dict) else {}


def _flat(found: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
