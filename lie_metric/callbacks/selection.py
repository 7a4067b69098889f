"""Which images of a validation set are measured, by which process, and in which batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from lie_metric.callbacks.trainers import is_testing, number_of_batches
from lie_metric.curves import spread

__all__ = ["Gathering", "Share", "WholeBatches", "described"]


@dataclass(frozen=True)
class Share:
    """Which of the images that a process sees it measures, so that together they measure the chosen ones, each once.

    Args:
        chosen: For the position of each chosen image among those of all processes its number among the chosen ones; or
            how many of the first ones are, where the size of the set is not known.
        processes: Number of processes.
        rank: Number of this one.
        replicated: Whether every process sees the same images, rather than its own.
        total: How many images there are; what samplers give beyond has been seen before.
    """

    chosen: Mapping[int, int] | int
    processes: int
    rank: int
    replicated: bool = False
    total: float = math.inf

    @classmethod
    def of(cls, loader: object, trainer: Trainer, dataloader_idx: int, num_images: int, count: int) -> Share:
        """The share of this process in the images of a loader.

        Args:
            loader: The loader; None for several that run side by side.
            trainer: The trainer.
            dataloader_idx: Number of the loader.
            num_images: How many images all processes measure together.
            count: How many images the loader's first batch holds.

        Returns:
            The share.
        """
        sampler, owner = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        processes, rank = trainer.world_size, trainer.global_rank
        known: float = math.inf
        for candidate in (sampler, getattr(owner, "sampler", None)):
            if isinstance(candidate, DistributedSampler):
                # It deals indices round, and repeats the first ones until all processes have as many.
                processes, rank, replicated = candidate.num_replicas, candidate.rank, False
                known = min(len(candidate.dataset), candidate.total_size)  # type: ignore[arg-type]
                break
        else:
            # Any other loader is taken to hold the process' own images, except one that can only hold the same.
            replicated = processes > 1 and isinstance(sampler, SequentialSampler)
            if isinstance(sampler, Sized):
                known = len(sampler) * (1 if replicated else processes)
        batches, size = number_of_batches(trainer, dataloader_idx), getattr(loader, "batch_size", None) or count
        if loader is None or math.isinf(batches):
            return cls(num_images, processes, rank, replicated, known)
        if owner is None or (count != size and batches > 1):  # an entry of the data set is not one image
            size, known = count, math.inf
        total = int(min(known, batches * size * (1 if replicated else processes)))
        chosen = {position: number for number, position in enumerate(spread(num_images, total))}
        return cls(chosen, processes, rank, replicated, known)

    def __len__(self) -> int:
        return self.chosen if isinstance(self.chosen, int) else len(self.chosen)

    def _number(self, index: int) -> int | None:
        """The number, among the chosen images, of the one that this process sees at an index; None for any other."""
        position = index if self.replicated else index * self.processes + self.rank
        if isinstance(self.chosen, int):
            number = position if position < self.chosen else None
        else:
            number = self.chosen.get(position)
        others = number is not None and self.replicated and number % self.processes != self.rank
        return None if others else number

    def is_complete(self, start: int) -> bool:
        """Whether nothing is left to measure from an index on."""
        position = start if self.replicated else start * self.processes + self.rank
        end = self.chosen if isinstance(self.chosen, int) else max(self.chosen, default=-1) + 1
        return position >= end

    def rows(self, start: int, count: int) -> dict[int, int]:
        """Which rows to measure of a batch of ``count`` images that begins at index ``start``, with their numbers."""
        numbers = {row: self._number(start + row) for row in range(count)}
        return {row: number for row, number in numbers.items() if number is not None}


@dataclass
class Gathering:
    """Chosen images of a loader, gathered to full batches; only chosen rows are kept.

    Args:
        share: Which images are chosen.
        size: Size of a full batch.
    """

    share: Share
    size: int
    seen: int = 0
    _waiting: dict[tuple[torch.Size, torch.dtype], tuple[list[Tensor], list[int]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def is_complete(self) -> bool:
        """Whether no further batch is needed."""
        return self.share.is_complete(self.seen)

    def add(self, images: Tensor, is_last: bool) -> list[tuple[Tensor, list[int]]]:
        """Takes a batch.

        Args:
            images: The batch.
            is_last: Whether no other follows.

        Returns:
            Full batches that are ready to be measured, and all that is left when nothing more is to come; each with the
            numbers of its images.
        """
        rows = self.share.rows(self.seen, len(images))
        self.seen += len(images)
        if rows:
            # Images of another size cannot stand in one batch.
            parts, numbers = self._waiting.setdefault((images.shape[1:], images.dtype), ([], []))
            parts.append(images if len(rows) == len(images) == self.size else images[list(rows)])
            numbers += rows.values()
        # A set of unknown length is taken from its beginning, in batches that are full already.
        ends = is_last or self.is_complete or isinstance(self.share.chosen, int)
        ready = []
        for kind, (parts, numbers) in list(self._waiting.items()):
            full = len(numbers) if ends else len(numbers) - len(numbers) % self.size
            if not full:
                continue
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            for start in range(0, full, self.size):
                part = slice(start, min(start + self.size, full))
                ready.append((joined[part], numbers[part]))
            self._waiting[kind] = ([joined[full:].clone()], numbers[full:])
            if full == len(numbers):
                del self._waiting[kind]
        return ready


class WholeBatches:
    """Chosen batches of a loader, as they come: inputs with several parts are not taken apart.

    Args:
        share: Of it, which process this is; and how many samples are wanted.
        size: Samples of the first batch.
        batches: How many batches the loader has; infinite where it does not say.
        num_samples: How many samples all processes measure together, to a whole batch.
    """

    def __init__(self, share: Share, size: int, batches: float, num_samples: int) -> None:
        self.share, self.size = share, size
        self._each = 1 if share.replicated else share.processes
        wanted = max(1, math.ceil(num_samples / (size * self._each)))
        self.chosen = range(wanted) if math.isinf(batches) else spread(wanted, int(batches))
        self.seen = self._batch = 0

    @property
    def is_complete(self) -> bool:
        """Whether no further batch is needed."""
        return self._batch > max(self.chosen, default=-1)

    def add(self, inputs: Any, count: int) -> list[tuple[Any, list[int]]]:
        """Takes a batch.

        Args:
            inputs: What the model takes of it.
            count: How many samples it holds.

        Returns:
            The batch with the numbers of its samples, if it is chosen and no other process has the same; -1 for a
            sample that a sampler gave twice, to fill up.
        """
        start, batch = self.seen, self._batch
        self.seen, self._batch = start + count, batch + 1
        if batch not in self.chosen:
            return []
        if self.share.replicated:
            if self.chosen.index(batch) % self.share.processes != self.share.rank:
                return []
            return [(inputs, [start + row for row in range(count)])]
        places = [(start + row) * self.share.processes + self.share.rank for row in range(count)]
        return [(inputs, [place if place < self.share.total else -1 for place in places])]


def described(
    loader: object, trainer: Trainer, dataloader_idx: int, num_images: int, size: int, whole_batches: bool
) -> str:
    """Which images of a loader are measured, in words.

    Args:
        loader: The loader; None for several that run side by side.
        trainer: The trainer.
        dataloader_idx: Number of the loader.
        num_images: How many images all processes measure together.
        size: How many images a batch holds.
        whole_batches: Whether batches are taken as they come.

    Returns:
        A part of a sentence.
    """
    share = Share.of(loader, trainer, dataloader_idx, num_images, size)
    batches = number_of_batches(trainer, dataloader_idx)
    counted = f"{len(share)} images"
    if whole_batches:
        whole = WholeBatches(share, size, batches, num_images)
        counted = f"{len(whole.chosen)} batches of {size}"
    where = "at the beginning of" if loader is None or math.isinf(batches) else "spread over"
    return f"{counted} {where} the {'test' if is_testing(trainer) else 'validation'} set"
