"""Runs a study: models one after the other, each finished one on the disk before the next begins."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lie_metric.records import Record
from lie_metric.study.data import ImageSet, load_data
from lie_metric.study.engines import Resources, run_on, validate_engine
from lie_metric.study.measure import measure_model
from lie_metric.study.models import ModelSpec, resolve_models
from lie_metric.study.settings import Settings
from lie_metric.study.shards import part_of
from lie_metric.study.store import COLUMNS, LAYER_COLUMNS, Lines, StudyError, Table, read_rows, record_settings
from lie_metric.version import __version__

__all__ = ["run_study"]

_T = TypeVar("_T")


def run_study(
    models: Sequence[str | ModelSpec],
    out: Path | str,
    settings: Settings,
    *,
    exclude: Sequence[str] = (),
    shard: str | None = None,
    on: str = "local",
    retries: int = 3,
    resources: Resources | None = None,
    data_root: Path | str = "data",
    device: str = "auto",
    batch_size: int = 8,
    workers: int = 0,
    chunk_size: int | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    families: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Measures models and writes a row for each model and generator into ``out/rows-i-of-n.csv``.

    Models that have their rows, in whichever file of the folder, are skipped, so that a study that was interrupted goes
    on where it was. A model that fails becomes one row with status ``"failed"`` and the reason.

    Args:
        models: Names, see :func:`~lie_metric.study.models.resolve_models`.
        out: The study's folder.
        settings: What every value depends on; refused if the folder was begun with others.
        exclude: Wildcards of models to leave out.
        shard: ``"i/n"``: work on every n-th model, from the i-th. The default is what torchrun or an array of SLURM
            says of this process, see :func:`~lie_metric.study.shards.part_of`.
        on: ``"local"``, this process; ``"ray"``, a task for each model; or ``"slurm"``, an array of jobs by submitit.
            Tasks and jobs read and write the same files: all machines see the folder. They go on when this process
            is killed, or end with it, as the engine has it; either way the same call goes on.
        retries: How often the engine starts a model again whose process died (Ray) or ran out of time (SLURM). If it is
            lost all the same, it has failed.
        resources: What a model needs in the engine's words, see :func:`~lie_metric.study.engines.run_on`. Ray gives a
            GPU to each model where the cluster has any, unless told otherwise.
        data_root: Where torchvision's sets are or go.
        device: ``"auto"``, or a name of a torch device.
        batch_size: Images in a batch.
        workers: Processes that read images.
        chunk_size: Tangents pushed through a model at once; smaller takes less memory.
        retry_failed: Whether models that failed are tried again.
        progress: Whether a progress bar is shown.
        families: Families of models by wildcards of their names. Rows that are there stay; the report takes the same.
        tags: Tags, likewise.

    Returns:
        How many models of this shard were ``measured`` now, ``failed`` now, and ``skipped``.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If the engine is not installed.
        StudyError: If images, settings or files stop the study; finished rows stay.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("chunk_size", chunk_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    validate_engine(on, retries, resources or {})
    part, parts = part_of(shard)
    study = _Study(
        tuple(models) if not isinstance(models, str) else models,
        Path(out),
        settings,
        tuple(exclude),
        data_root,
        device,
        (batch_size, workers, chunk_size),
        retry_failed,
        families,
        tags,
        Path.cwd(),
    )
    if on == "local":
        return study.measure(part, parts, progress=progress)
    return _on_engine(study, part, parts, on, retries, dict(resources or {}), progress)


@dataclass(frozen=True)
class _Study:
    """All that a process needs to know of a study, to work on a part of it."""

    models: Sequence[str | ModelSpec]
    folder: Path
    settings: Settings
    exclude: Sequence[str]
    data_root: Path | str
    device: str
    cost: tuple[int, int, int | None]
    retry_failed: bool
    families: Mapping[str, str] | None
    tags: Mapping[str, str] | None
    place: Path

    def specs(self) -> list[ModelSpec]:
        """The models, not built."""
        return resolve_models(
            self.models,
            pretrained=self.settings.pretrained,
            exclude=self.exclude,
            families=self.families,
            tags=self.tags,
        )

    def begin(self) -> ImageSet:
        """The images; the settings are written down, or compared."""
        settings = self.settings
        images = load_data(settings.data, settings.eval_images, settings.seed, self.data_root)
        if len(images) < 2 or settings.layerwise > len(images):
            raise StudyError(f"`data` must hold at least {max(2, settings.layerwise)} images, got {len(images)}.")
        record_settings(self.folder, settings.record(images.fingerprint))
        return images

    def present(self) -> tuple[set[tuple[str, str]], set[str]]:
        """Models and generators that are measured, and models that nothing is left to do of, by all files there are."""
        rows = read_rows(self.folder)
        there = {(row["model"], row["generator"]) for row in rows if row["status"] == "ok"}
        done = set() if self.retry_failed else {row["model"] for row in rows if row["status"] == "failed"}
        done |= {model for model, _ in there if all((model, name) in there for name in self.settings.names)}
        return there, done

    def table(self, part: int, parts: int, *, wait: bool = False) -> Table:
        """The main table of a part."""
        return Table(self.folder / f"rows-{part}-of-{parts}.csv", COLUMNS, wait=wait)

    def measure(self, part: int, parts: int, *, progress: bool, wait: bool = False) -> dict[str, int]:
        """Works on a part in this process.

        Args:
            part: From 1.
            parts: How many there are.
            progress: Whether a bar is shown.
            wait: Whether to wait for another process that works on it.

        Returns:
            Counts.
        """
        device = _device(self.device)
        specs = self.specs()[part - 1 :: parts]
        images = self.begin()
        counts = {"measured": 0, "failed": 0, "skipped": 0}
        with ExitStack() as opened:
            table = opened.enter_context(self.table(part, parts, wait=wait))
            replicates = opened.enter_context(Lines(self.folder / f"replicates-{part}-of-{parts}.jsonl"))
            if self.settings.layerwise:
                layer_table = opened.enter_context(Table(self.folder / f"layers-{part}-of-{parts}.csv", LAYER_COLUMNS))
            there, done = self.present()
            for spec in _bar(specs, len(specs), progress, lambda spec: spec.name):
                if spec.name in done:
                    counts["skipped"] += 1
                    continue
                try:
                    rows, layers, records = _one(spec, images, self.settings, device, *self.cost)
                    counts["measured"] += 1
                except StudyError as error:
                    raise StudyError(_message(error)) from error
                except Exception as error:
                    rows, layers, records = [_failed(_reason(error))], [], []
                    counts["failed"] += 1
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                # All else first: a model whose main rows are there is finished.
                if layers:
                    layer_table.append({**row, "model": spec.name} for row in layers)
                if records:
                    replicates.append({"model": spec.name, "records": [record.to_json() for record in records]})
                about = _about(spec)
                table.append({**row, **about} for row in rows if (spec.name, row["generator"]) not in there)
        return counts


def _on_engine(
    study: _Study, part: int, parts: int, on: str, retries: int, resources: dict[str, str | float], progress: bool
) -> dict[str, int]:
    """Works on a part by an engine: each model of it is a part of its own, with its own files."""
    specs = study.specs()
    study.begin()
    _, done = study.present()
    mine = range(part, len(specs) + 1, parts)
    left = [number for number in mine if specs[number - 1].name not in done]
    counts = {"measured": 0, "failed": 0, "skipped": len(mine) - len(left)}
    task = _Task(study, len(specs))
    folder = study.folder.absolute() / "jobs"
    with closing(run_on(on, task, left, folder, retries=retries, resources=resources)) as finished:
        for found in _bar(finished, len(left), progress, lambda found: specs[found.part - 1].name):
            if found.error:
                counts["failed"] += 1
                with study.table(found.part, len(specs), wait=True) as table:
                    table.append([_failed(found.error) | _about(specs[found.part - 1])])
            elif isinstance(found.value, str):
                raise StudyError(found.value)
            else:
                counts = {name: count + found.value[name] for name, count in counts.items()}
    return counts


@dataclass(frozen=True)
class _Task:
    """What an engine calls on its machines: counts of one model, or why the study cannot go on."""

    study: _Study
    parts: int

    def __call__(self, part: int) -> dict[str, int] | str:
        # Paths are as they were given; a worker may have been started elsewhere.
        os.chdir(self.study.place)
        try:
            # A job of before, of a study whose own process was killed, may still be at it.
            return self.study.measure(part, self.parts, progress=False, wait=True)
        except (StudyError, ValueError, ModuleNotFoundError) as error:
            return str(error)


def _failed(reason: str) -> dict[str, Any]:
    return {"generator": "", "status": "failed", "reason": reason}


def _about(spec: ModelSpec) -> dict[str, Any]:
    return {"model": spec.name, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **_versions()}


def _one(
    spec: ModelSpec, images: ImageSet, settings: Settings, device: torch.device, *options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Record]]:
    """The rows and records of one model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, family, tag = spec.build(len(images.classes))
    batch_size, workers, chunk_size = options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        rows, layers, records, remarks = measure_model(
            model, images, settings, device=device, batch_size=batch_size, workers=workers, chunk_size=chunk_size
        )
    said = dict.fromkeys(str(one.message) for one in caught if _ours(one.filename))
    # Outputs that match the set's classes are scores, as few as they may be.
    sure = rows[0].get("accuracy") is not None
    remarks += [text for text in said if not (sure and "is taken as invariant" in text)]
    about = {"family": family, "tag": tag, "reason": textwrap.shorten("; ".join(remarks), 1500, placeholder=" ...")}
    return [{**row, **about} for row in rows], layers, records


def _ours(filename: str) -> bool:
    """Whether a warning is of the measurement or of a user's model: torch and timm warn in files of installed packages.

    Those of this library are put down to who started the study, see :mod:`lie_metric.warning`.
    """
    path, library = Path(filename), Path(__file__).parents[1]
    inside = library in path.parents and path.name != "__main__.py"
    return not inside and "site-packages" not in path.parts and "dist-packages" not in path.parts


def _reason(error: Exception) -> str:
    """The error in one line, with the innermost place in a file."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_message(error)}"[:400] + f" ({Path(where.filename).name}:{where.lineno})"


def _message(error: Exception) -> str:
    """The error's text; of one in a process that reads images the last line, without the traceback before it."""
    text = str(error)
    return text.strip().splitlines()[-1].partition(": ")[2] if "in DataLoader worker" in text else text


def _device(name: str) -> torch.device:
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` must be one that torch can use here, got {name!r}: {error}.") from error
    return device


def _versions() -> dict[str, str]:
    found = {"lie_metric": __version__}
    for name in ("torch", "timm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _bar(items: Iterable[_T], count: int, shown: bool, name: Callable[[_T], str]) -> Iterator[_T]:
    """What is gone through, with a progress bar and the time left; without tqdm, a line for each.

    Yields:
        The items.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        for number, item in enumerate(items, 1):
            if shown:
                sys.stderr.write(f"{number}/{count} {name(item)}\n")
            yield item
        return
    with tqdm(items, total=count, disable=not shown, unit="model", smoothing=0.1) as bar:
        for item in bar:
            bar.set_postfix_str(name(item))
            yield item
