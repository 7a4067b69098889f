"""What the programs share: trainings under the monitor, several at a time, and tables with errors over seeds."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lie_metric.compare import around, over_trainings
from lie_metric.functional.student import quantile
from lie_metric.runs import Run, read

__all__ = [
    "LEVEL",
    "OneCycle",
    "Rates",
    "add_common",
    "at_least",
    "begin",
    "cell",
    "finished",
    "fit",
    "interval",
    "last",
    "listed",
    "of_seeds",
    "over_seeds",
    "prepare",
    "ratio",
    "series",
    "show",
    "write",
]

LEVEL = 0.95
"""Probability of intervals over seeds."""

Task = TypeVar("Task", bound=Hashable)
Found = TypeVar("Found")


def add_common(add: Callable[..., Any], epochs: int, batch_size: int, seeds: int = 3) -> None:
    """The options that every program of trainings has.

    Args:
        add: ``add_argument`` of a parser.
        epochs: Default of ``--epochs``.
        batch_size: Default of ``--batch-size``.
        seeds: Default of ``--seeds``.
    """
    add("--epochs", type=int, default=epochs)
    add("--batch-size", type=int, default=batch_size)
    add("--seeds", type=int, default=seeds, help="trainings of each; errors are over these")
    add("--processes", type=int, default=2, help="trainings at a time")
    add("--threads", type=int, default=1, help="torch threads of each")
    add("--out", type=Path, default=Path("runs"), help="folder for TensorBoard runs, table and picture")


def at_least(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """Ends the program with a message where an option is too small, or where a common one is below 1.

    Args:
        parser: The parser.
        options: What it read.
        least: By name the smallest value that makes sense.
    """
    common = dict.fromkeys(("epochs", "batch_size", "seeds", "processes", "threads"), 1)
    for name, bound in {**common, **least}.items():
        if getattr(options, name) < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {getattr(options, name)}")


class OneCycle(LightningModule):
    """A module whose learning rate goes up to a peak and down again in one cycle over all steps.

    Args:
        learning_rate: The peak.
        settings: What tells the run from others.
    """

    def __init__(self, learning_rate: float, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(dict(settings or {}))
        self.learning_rate = learning_rate

    def optimizer_of(self, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """What moves weights: Adam."""
        return torch.optim.Adam(weights, lr=self.learning_rate)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer and its cycle."""
        optimizer = self.optimizer_of(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rates(OneCycle):
    """Trains rates of change by a loss of pieces of trajectories, which a subclass says.

    Args:
        dynamics: From states to rates, with ``hamiltonian`` where there is an energy.
        scale: Typical changes of states over a piece.
        learning_rate: Peak learning rate.
        settings: What tells the run from others.
    """

    scale: Tensor

    def __init__(
        self, dynamics: nn.Module, scale: Tensor, learning_rate: float, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(learning_rate, settings)
        self.dynamics = dynamics
        self.register_buffer("scale", scale)

    def forward(self, states: Tensor) -> Tensor:
        """Rates of change, of the shape of the states."""
        return self.dynamics(states)

    def hamiltonian(self, states: Tensor) -> Tensor:
        """The learned energy (B,), where there is one."""
        return self.dynamics.hamiltonian(states)

    def loss(self, pieces: Tensor) -> Tensor:
        """How far rollouts are from pieces."""
        raise NotImplementedError

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        loss = self.loss(batch[0])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Logs the loss on systems that are not trained on."""
        self.log("val_loss", self.loss(batch[0]))


def begin(options: argparse.Namespace, name: str) -> tuple[Path, float]:
    """Prepares this process, and makes the folder of a program.

    Args:
        options: The command line.
        name: That of the folder.

    Returns:
        The folder, and the time for :func:`write`.
    """
    started = time.monotonic()
    prepare(options.threads)
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder, started


def prepare(threads: int) -> None:
    """What each process does first: says less, and takes its share of the cores."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*smaller than the logging interval.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(threads)


def prepare_worker(threads: int) -> None:
    """What a process of the pool does first: it also ends with its parent, however that ends, and not before it."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    # Ctrl-C reaches every process of the terminal; the parent decides what becomes of the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()
    prepare(threads)


def finished(
    train: Callable[[Task, argparse.Namespace], Found],
    tasks: Sequence[Task],
    options: argparse.Namespace,
    told: Callable[[Task], str] = str,
) -> Iterator[tuple[Task, Found, float]]:
    """Runs all tasks, as many at a time as there are processes.

    Args:
        train: Does one; a function of a module, with results that can be pickled.
        tasks: What it takes.
        options: The command line, with ``processes`` and ``threads``.
        told: A task in words, and how to see it alone.

    Yields:
        A task with its result and seconds, as it ends.

    Raises:
        RuntimeError: If one fails; those under way are ended.
    """

    def failure(task: Task, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"Every run must finish, got {type(error).__name__} in that of {told(task)}: {error}. See it alone with "
            "`--processes 1`; if a process was killed, memory may be short, and fewer processes need less."
        )

    if options.processes == 1:
        for task in tasks:
            try:
                found, seconds = _timed(train, task, options)
            except Exception as error:
                raise failure(task, error) from error
            yield task, found, seconds
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(options.processes, len(tasks)), multiprocessing.get_context("spawn"), prepare_worker, (options.threads,)
    )
    complete = False
    try:
        futures = {pool.submit(_timed, train, task, options): task for task in tasks}
        for future in as_completed(futures):
            try:
                found, seconds = future.result()
            except Exception as error:
                raise failure(futures[future], error) from error
            yield futures[future], found, seconds
        complete = True
    finally:
        if not complete:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # Lightning takes SIGTERM for a request to stop at the next batch
        pool.shutdown(wait=True)


def _timed(train: Callable[..., Found], task: Any, options: argparse.Namespace) -> tuple[Found, float]:
    started = time.monotonic()
    return train(task, options), time.monotonic() - started


def over_seeds(
    train: Callable[[tuple[str, int], argparse.Namespace], Found],
    names: Sequence[str],
    options: argparse.Namespace,
    told: Callable[[Found], str],
) -> dict[str, list[Found]]:
    """Trains each of some models from every seed, with a line of progress for each.

    Args:
        train: From (name, seed) and the command line to a result.
        names: What is trained.
        options: The command line, with ``seeds``.
        told: A result in a few words.

    Returns:
        By name the results in the order of seeds.

    Raises:
        SystemExit: If it is interrupted; no process is left.
    """
    tasks = [(name, seed) for name in names for seed in range(options.seeds)]
    results: dict[tuple[str, int], Found] = {}
    try:
        for task, found, seconds in finished(train, tasks, options, lambda task: f"{task[0]}, seed {task[1]}"):
            results[task] = found
            count = f"[{len(results):{len(str(len(tasks)))}}/{len(tasks)}]"
            print(f"{count} {task[0]}, seed {task[1]}: {told(found)}, {seconds:.0f} s", flush=True)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first, in this process
        raise SystemExit(
            f"Stopped after {len(results)} of {len(tasks)} trainings; no process is left. The same command starts "
            "again from the first."
        ) from None
    return {name: [results[name, seed] for seed in range(options.seeds)] for name in names}


def fit(
    model: LightningModule,
    loaders: Sequence[DataLoader],
    folder: Path,
    epochs: int,
    callbacks: Sequence[Callback],
    **options: Any,
) -> Run:
    """Trains a model with a TensorBoard run of its own.

    Args:
        model: The model.
        loaders: Of training and of validation.
        folder: Where the curves go; what an earlier job left there goes.
        epochs: How many.
        callbacks: The monitor and others.
        options: Further ones of the ``Trainer``.

    Returns:
        The monitor's curves.
    """
    shutil.rmtree(folder, ignore_errors=True)  # curves of an earlier job would go on in the same files
    trainer = Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": TensorBoardLogger(folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False),
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,  # several at a time would write over one another
            "log_every_n_steps": 1000,
            "num_sanity_val_steps": 0,
            **options,
        }
    )
    trainer.fit(model, *loaders)
    return read(folder)[0]


def series(run: Run, key: str, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a curve."""
    points = [point for point in run.points if (point.key, point.generator) == (key, name)]
    return [point.epoch for point in points], [point.value for point in points]


def last(run: Run, key: str, names: Sequence[str]) -> dict[str, float]:
    """The final values of curves, by name."""
    return {name: series(run, key, name)[1][-1] for name in names}


def cell(values: Sequence[float], rounding: float = 0.0, form: str = ".2g") -> str:
    """Mean ± standard error over seeds; what is below rounding, or of one seed, without an error."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = fmean(values)
    if len(values) < 2 or mean < rounding:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {stdev(values) / math.sqrt(len(values)):.1g}"


def of_seeds(seeds: int) -> str:
    """What stands behind ± in tables, in words."""
    return f"± standard error over {seeds} seeds" if seeds > 1 else "one seed"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds and both ends of its interval by Student's t; the ends are NaN for one seed."""
    mean, error, freedom = over_trainings(values)
    half = quantile(LEVEL, freedom) * error
    return mean, mean - half, mean + half


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of ratios within a seed, with both ends of its interval.

    Args:
        above: By seed.
        below: By seed.

    Returns:
        The ratio and both ends: NaN where a number is not positive and finite, ends of NaN for one seed.
    """
    if not all(0 < one < math.inf for one in (*above, *below)):
        return math.nan, math.nan, math.nan
    return around(*over_trainings([math.log(a / b) for a, b in zip(above, below, strict=True)]), LEVEL)[:3]


def listed(words: Sequence[str]) -> str:
    """Words with commas."""
    return ", ".join(words) if words else "none"


def show(rows: Sequence[Sequence[str]]) -> str:
    """The rows in aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(one.ljust(width) for one, width in zip(row, widths, strict=True)) for row in rows)


def write(
    folder: Path,
    rows: Sequence[Sequence[str]],
    text: str,
    pictures: Mapping[str, Any],
    started: float,
    hint: str = "",
) -> None:
    """Prints what was found and where it is, and writes ``table.csv``, ``summary.txt`` and pictures.

    Args:
        folder: Where to.
        rows: The table.
        text: Tables and sentences as they are read.
        pictures: Figures by file name.
        started: ``time.monotonic()`` at the start.
        hint: What to look at in TensorBoard.
    """
    print(f"\n{text}\n")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "summary.txt").write_text(f"{text}\n")
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110)
        print(f"Picture: {folder / name}")
    print(f"Table: {folder / 'table.csv'}\nCurves: tensorboard --logdir {folder}{hint}")
    print(f"{time.monotonic() - started:.0f} s in all ({sum(os.times()[:4]):.0f} CPU seconds).")
