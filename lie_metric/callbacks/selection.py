"""Which images of a validation set each process measures."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler, SequentialSampler

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """Which of the images that a process sees it measures, so that together they measure the first ones, each once.

    Args:
        limit: How many images all processes measure together.
        processes: Number of processes.
        rank: Number of this one.
        replicated: Whether every process sees the same images, rather than its own.
    """

    limit: float
    processes: int
    rank: int
    replicated: bool = False

    @classmethod
    def of(cls, loader: object, trainer: Trainer, num_images: int) -> Share:
        """The share of this process in the first images of a loader."""
        sampler = getattr(loader, "sampler", None)
        nested = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        for candidate in (sampler, nested):
            if isinstance(candidate, DistributedSampler):
                # It deals indices round, and repeats the first ones until all processes have as many.
                total = len(candidate.dataset)  # type: ignore[arg-type]
                return cls(min(num_images, total), candidate.num_replicas, candidate.rank)
        # Any other loader is taken to hold the process' own images, except one that can only hold the same everywhere.
        return cls(num_images, trainer.world_size, trainer.global_rank, isinstance(sampler, SequentialSampler))

    def _position(self, index: int) -> int:
        """Place among the images of all processes of the image that this process sees at an index."""
        return index if self.replicated else index * self.processes + self.rank

    def is_complete(self, start: int) -> bool:
        """Whether nothing is left to measure from an index on."""
        return self._position(start) >= self.limit

    def rows(self, start: int, count: int) -> list[int]:
        """Which rows to measure of a batch of ``count`` images that begins at index ``start``."""
        mine = range(start, start + count)
        return [
            index - start
            for index in mine
            if self._position(index) < self.limit and not (self.replicated and index % self.processes != self.rank)
        ]
