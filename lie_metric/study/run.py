"""Runs a study: models one after the other, each finished one on the disk before the next begins."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lie_metric.records import Record
from lie_metric.study.data import ImageSet, load_data
from lie_metric.study.measure import measure_model
from lie_metric.study.models import ModelSpec, resolve_models
from lie_metric.study.settings import Settings
from lie_metric.study.store import COLUMNS, LAYER_COLUMNS, Lines, StudyError, Table, read_rows, record_settings
from lie_metric.version import __version__

__all__ = ["run_study"]


def run_study(
    models: Sequence[str | ModelSpec],
    out: Path | str,
    settings: Settings,
    *,
    exclude: Sequence[str] = (),
    shard: str = "1/1",
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
        shard: ``"i/n"``: work on every n-th model, from the i-th. Under torchrun each process takes its part of that.
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
        StudyError: If images, settings or files stop the study; finished rows stay.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("chunk_size", chunk_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    part, parts = _shard(shard)
    chosen_device = _device(device)
    chosen = resolve_models(models, pretrained=settings.pretrained, exclude=exclude, families=families, tags=tags)
    specs = chosen[part - 1 :: parts]
    images = load_data(settings.data, settings.eval_images, settings.seed, data_root)
    if len(images) < 2 or settings.layerwise > len(images):
        raise StudyError(f"`data` must hold at least {max(2, settings.layerwise)} images, got {len(images)}.")
    folder = Path(out)
    record_settings(folder, settings.record(images.fingerprint))
    counts = {"measured": 0, "failed": 0, "skipped": 0}
    with ExitStack() as opened:
        table = opened.enter_context(Table(folder / f"rows-{part}-of-{parts}.csv", COLUMNS))
        replicates = opened.enter_context(Lines(folder / f"replicates-{part}-of-{parts}.jsonl"))
        if settings.layerwise:
            layer_table = opened.enter_context(Table(folder / f"layers-{part}-of-{parts}.csv", LAYER_COLUMNS))
        present = read_rows(folder)
        there = {(row["model"], row["generator"]) for row in present if row["status"] == "ok"}
        failed = {row["model"] for row in present if row["status"] == "failed"}
        versions = _versions()
        for spec in _bar(specs, progress):
            done = all((spec.name, name) in there for name in settings.names)
            if done or (spec.name in failed and not retry_failed):
                counts["skipped"] += 1
                continue
            try:
                rows, layers, records = _one(spec, images, settings, chosen_device, batch_size, workers, chunk_size)
                counts["measured"] += 1
            except StudyError as error:
                raise StudyError(_message(error)) from error
            except Exception as error:
                rows = [{"generator": "", "status": "failed", "reason": _reason(error)}]
                layers, records = [], []
                counts["failed"] += 1
            if chosen_device.type == "cuda":
                torch.cuda.empty_cache()
            common = {"model": spec.name, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            # All else first: a model whose main rows are there is finished.
            if layers:
                layer_table.append({**row, "model": spec.name} for row in layers)
            if records:
                replicates.append({"model": spec.name, "records": [record.to_json() for record in records]})
            table.append({**row, **common, **versions} for row in rows if (spec.name, row["generator"]) not in there)
    return counts


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


def _shard(shard: str) -> tuple[int, int]:
    """This process's part and the number of parts, of machines times processes."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"`shard` must be i/n with 1 <= i <= n, got {shard!r}.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0")) if world > 1 else 0
    return (part - 1) * world + rank + 1, parts * world


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


def _bar(specs: Sequence[ModelSpec], shown: bool) -> Iterable[ModelSpec]:
    """The models with a progress bar and the time left; without tqdm, a line for each.

    Yields:
        The models.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        for number, spec in enumerate(specs, 1):
            if shown:
                sys.stderr.write(f"{number}/{len(specs)} {spec.name}\n")
            yield spec
        return
    with tqdm(specs, disable=not shown, unit="model", smoothing=0.1) as bar:
        for spec in bar:
            bar.set_postfix_str(spec.name)
            yield spec
