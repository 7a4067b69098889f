"""Result files: rows appended one model at a time, safe against interruption, and read back as one table."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self

from lie_metric.records import Record

__all__ = [
    "COLUMNS",
    "LAYER_COLUMNS",
    "Lines",
    "StudyError",
    "Table",
    "read_layers",
    "read_records",
    "read_rows",
    "record_settings",
]

COLUMNS = (
    "model", "generator", "status", "reason", "family", "tag",
    "relative", "relative_se", "lee", "lee_se", "sensitivity", "sensitivity_se",
    "accuracy", "accuracy_se", "consistency", "consistency_se",
    "parameters", "macs", "input_size", "images", "evaluation_images", "method", "stencil",
    "seconds_measurement", "seconds_evaluation", "device", "lie_metric", "torch", "timm", "finished",
)  # fmt: skip
"""Columns of the main table, one row for each model and generator.

``relative``, ``lee``, ``sensitivity``: as in :class:`lie_metric.LocalEquivarianceError`, standard errors over images.
``macs``: multiply-additions of one image. ``seconds_measurement`` of ``images`` and ``seconds_evaluation`` of
``evaluation_images`` are model time, without reading images. An empty cell is a value that was not asked for or could
not be had.
"""

LAYER_COLUMNS = (
    "model",
    "generator",
    "type",
    "squared_norm",
    "standard_error",
    "share",
    "share_se",
    "calls",
    "residual",
)
"""Columns of the table by type of operation, see :class:`lie_metric.layerwise.Contribution`."""

_TEXT = {
    "model", "generator", "status", "reason", "family", "tag", "input_size", "method", "stencil", "device",
    "lie_metric", "torch", "timm", "finished", "type",
}  # fmt: skip


class StudyError(RuntimeError):
    """What stops a study as a whole: data, settings or files. Rows that were finished stay."""


class _Growing:
    """A file that only grows, by blocks that are on the disk when they were added.

    A last line that was torn by an interruption is cut off when the file is opened, and the file is locked while it is.

    Args:
        path: The file.
        header: How it begins.
        wait: Whether to wait until no other process uses it.

    Raises:
        StudyError: If the file begins otherwise, is in use by another process, or cannot be written.
    """

    def __init__(self, path: Path, header: str = "", *, wait: bool = False) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StudyError(_unwritable(path, error)) from error
        try:
            _lock(self._file, path, wait)
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole and not whole.startswith(header.encode()):
                raise StudyError(_other_header(path))
            if len(whole) < len(data):
                os.ftruncate(self._file, len(whole))
            if not whole:
                self._write(header)
        except BaseException:
            self.close()
            raise

    def _write(self, text: str) -> None:
        before = os.fstat(self._file).st_size
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise StudyError(_unwritable(self.path, error)) from error

    def close(self) -> None:
        """Closes the file and frees its lock."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lines(_Growing):
    """A file of JSON objects, one a line, as :class:`Table` is one of rows.

    Args:
        path: The file.
    """

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds an object and waits until it is on the disk.

        Args:
            entry: The object.

        Raises:
            StudyError: If it cannot be written; the file is as before then.
        """
        self._write(json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n")


class Table(_Growing):
    """A CSV file that only grows.

    Args:
        path: The file.
        columns: Its columns.
        wait: Whether to wait until no other process uses it.

    Raises:
        StudyError: If the file has other columns, is in use by another process, or cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, wait: bool = False) -> None:
        self.columns = tuple(columns)
        super().__init__(path, ",".join(columns) + "\n", wait=wait)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows and waits until they are on the disk; None becomes an empty cell.

        Args:
            rows: Mappings from columns to values.

        Raises:
            StudyError: If they cannot be written; the file is as before then.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        # A row is a line: a line break inside a cell would make a torn last line hard to tell.
        writer.writerows(
            {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in row.items()}
            for row in rows
        )
        self._write(text.getvalue())


def _other_header(path: Path) -> str:
    return f"`out` must hold tables of this version, got other columns in {path}. Choose a new folder."


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"`out` must be writable, got {error.strerror or error} at {path}. What was finished is kept: make room and "
        "start the same command again."
    )


def _lock(file: int, path: Path, wait: bool) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # no such locks on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StudyError(
            f"`shard` must be worked on by one process at a time, got a second one for {path}. Wait for the first, or "
            "give each process its own `--shard i/n`."
        ) from error
    except OSError:  # a file system without locks
        return


def record_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``settings.json``, or compares with the one that is there.

    Args:
        folder: The study's folder; made if needed.
        settings: What every value of the study depends on.

    Raises:
        StudyError: If the folder holds a study with other settings, or cannot be written.
    """
    target = folder / "settings.json"
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            # Complete at once and first come, first served: several processes may start together.
            draft = folder / f".settings-{uuid.uuid4().hex}"
            try:
                with draft.open("w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(draft, target)
                except FileExistsError:
                    pass
                except OSError:  # a file system without links
                    os.replace(draft, target)
            finally:
                draft.unlink(missing_ok=True)
        found = json.loads(target.read_text())
    except OSError as error:
        raise StudyError(_unwritable(target, error)) from error
    except json.JSONDecodeError as error:
        raise StudyError(f"`out` must hold readable settings, got {error} in {target}. Choose a new folder.") from error
    wanted = json.loads(text)
    different = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if different:
        told = "; ".join(f"{name}: {wanted.get(name)!r}, there {found.get(name)!r}" for name in different)
        raise StudyError(
            f"`out` must hold a study with the same settings, got other ones for {folder} ({told}). "
            "Repeat the old settings to go on, or choose a new folder."
        )


def _parse(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    text = path.read_bytes()
    # The last line may be torn, or in the course of being written by another process.
    lines = text[: text.rfind(b"\n") + 1].decode().splitlines()
    if not lines:
        return []
    if lines[0] != ",".join(columns):
        raise StudyError(_other_header(path))
    rows = []
    for number, cells in enumerate(csv.reader(lines[1:]), 2):
        try:
            row = {
                name: cell if name in _TEXT else float(cell) if cell else None
                for name, cell in zip(columns, cells, strict=True)
            }
        except ValueError as error:
            raise StudyError(
                f"`out` must hold whole tables, got a damaged line {number} in {path}: {error}."
            ) from error
        rows.append(row)
    return rows


def _refuse_other(folder: Path) -> None:
    if not (folder / "settings.json").exists():
        raise StudyError(f"`out` must be the folder of a study, got {folder} without settings.json.")


def _merge(folder: Path, pattern: str, columns: Sequence[str], key: Sequence[str]) -> list[dict[str, Any]]:
    _refuse_other(folder)
    merged: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.glob(pattern)):
        for row in _parse(path, columns):
            merged.setdefault(tuple(row[name] for name in key), row)
    return list(merged.values())


def read_rows(folder: Path | str) -> list[dict[str, Any]]:
    """All rows of a study, of every shard, each once.

    Args:
        folder: The study's folder.

    Returns:
        Rows with the keys of :data:`COLUMNS`, text or float or None, sorted by model as finished. A model that failed
        once and was measured later has its measured rows only.

    Raises:
        StudyError: If the folder holds no study, or a damaged table.
    """
    rows = _merge(Path(folder), "rows-*.csv", COLUMNS, ("model", "generator", "status"))
    measured = {row["model"] for row in rows if row["status"] == "ok"}
    return [row for row in rows if row["status"] == "ok" or row["model"] not in measured]


def read_layers(folder: Path | str) -> list[dict[str, Any]]:
    """All rows by type of operation, of every shard, each once.

    Args:
        folder: The study's folder.

    Returns:
        Rows with the keys of :data:`LAYER_COLUMNS`.

    Raises:
        StudyError: If the folder holds no study, or a damaged table.
    """
    return _merge(Path(folder), "layers-*.csv", LAYER_COLUMNS, ("model", "generator", "type"))


def read_records(folder: Path | str) -> dict[str, dict[str, Record]]:
    """What comparisons of a study's models need: values without each group of images, of every shard.

    Args:
        folder: The study's folder.

    Returns:
        For each model the record of each measure, which :func:`lie_metric.compare` takes. A model that failed, or whose
        Lie derivatives were not asked for, has none.

    Raises:
        StudyError: If the folder holds no study, or a damaged file.

    Example:
        >>> import tempfile, torch, lie_metric as lm
        >>> from lie_metric.study import ModelSpec, Settings, run_study
        >>> def part(start):  # responds to the upper or the lower rows of the image
        ...     return lambda: lambda x: x.unflatten(2, (4, -1)).mean((1, 3, 4))[:, start : start + 2]
        >>> models = [ModelSpec("upper", part(0)), ModelSpec("lower", part(2))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = Settings("synthetic", 16, 16, ("rotation",), ("relative",))
        ...     counts = run_study(models, folder, settings, progress=False)
        ...     records = read_records(folder)
        >>> lm.compare(records["upper"]["relative"], records["lower"]["relative"])["rotation"].verdict
        'undecided'
    """
    folder = Path(folder)
    _refuse_other(folder)
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.glob("replicates-*.jsonl")):
        text = path.read_bytes()
        # As in tables the last line may be torn.
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].decode().splitlines(), 1):
            try:
                entry = json.loads(line)
                model = entry["model"]
                records = [Record.from_json(one, f"{model}, {path}") for one in entry["records"]]
            except (ValueError, KeyError, TypeError) as error:
                raise StudyError(
                    f"`out` must hold whole files, got a damaged line {number} in {path}: {error}. Remove the line; "
                    "that model is then compared with no other."
                ) from error
            found.setdefault(model, {record.measure: record for record in records})
    return found
