"""Which samples of a set are measured, and how they are had from a loader without a trainer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset

from lie_metric.binding import sample_count
from lie_metric.curves.batches import inputs_of
from lie_metric.options import Layout
from lie_metric.running import random_state

__all__ = ["chosen_samples", "spread"]

_GOLDEN = (math.sqrt(5) - 1) / 2


def spread(count: int, total: int) -> list[int]:
    """Positions spread evenly over a set: one in each of as many equal parts.

    Where in its part a position lies follows the golden ratio, so that a set whose classes take turns is not met in
    step, and processes to which images are dealt in turn have about as many each.

    Args:
        count: How many positions.
        total: Size of the set.

    Returns:
        The positions, ascending; all of the set if it is not larger than ``count``.

    Example:
        >>> spread(4, 12), spread(5, 3)
        ([0, 4, 6, 11], [0, 1, 2])
    """
    count = min(count, total)
    starts = [part * total // count for part in range(count + 1)] if count else []
    return [
        start + int(part * _GOLDEN % 1 * (end - start)) for part, (start, end) in enumerate(itertools.pairwise(starts))
    ]


def chosen_samples(
    loader: Iterable[Any],
    num_samples: int,
    inputs: Callable[[Any], Any] | int | str | None,
    layout: Layout | None,
    owner: str,
) -> list[Any]:
    """The samples that the monitor would measure of a loader, in batches of the loader's size.

    Args:
        loader: Gives batches. Only the chosen samples are made of a plain one that takes a data set in its order; any
            other is gone through as far as it is needed. No random state is changed.
        num_samples: How many.
        inputs: Where what the model takes is in a batch, as of :func:`inputs_of`.
        layout: How inputs move. Of inputs with named parts whole batches are taken, as many as hold the samples.
        owner: Whose arguments these are, for messages.

    Returns:
        Batches of what the model takes; none of an empty loader.

    Example:
        >>> found = chosen_samples(DataLoader(torch.arange(12.0).reshape(12, 1), 5), 4, None, None, "Recorder")
        >>> [batch[:, 0].tolist() for batch in found]
        [[0.0, 4.0, 6.0, 11.0]]
    """
    whole = isinstance(layout, Mapping)

    def taken(batch: Any) -> Any:
        return inputs_of(batch, inputs, layout, owner)

    with random_state():
        few = None if whole else _only_chosen(loader, num_samples)
        if few is not None:
            found = [taken(batch) for batch in few]
            if sum(map(len, found)) == len(few.dataset):  # type: ignore[arg-type]
                return found  # and otherwise an entry of the set is not one sample
        found, start, size = [], 0, 1
        chosen: frozenset[int] = frozenset()
        for batch in loader:
            given = taken(batch)
            count = sample_count(given, layout)
            if not start:
                size = max(1, count)
                chosen = frozenset(_positions(loader, num_samples, size, whole))
            step = 1 if whole else count
            rows = [row for row in range(step) if start + row in chosen]
            if rows:
                found.append(given if whole else given[rows])
            start += step
            if start > max(chosen, default=-1):
                break
    alike = not whole and len({(images.shape[1:], images.dtype) for images in found}) == 1
    return list(torch.cat(found).split(size)) if alike else found


def _positions(loader: Iterable[Any], count: int, size: int, whole: bool) -> Sequence[int]:
    """Which samples are chosen, or which batches, as the monitor has it of a trainer's loaders."""
    try:
        batches = len(loader) if hasattr(loader, "sampler") else math.inf  # type: ignore[arg-type]
    except TypeError:  # of a stream
        batches = math.inf
    if whole:
        count = max(1, math.ceil(count / size))
        return range(count) if math.isinf(batches) else spread(count, int(batches))
    if math.isinf(batches):
        return range(count)
    sampler, usual = getattr(loader, "sampler", None), getattr(loader, "batch_size", None) or size
    known = len(sampler) if isinstance(sampler, Sized) else math.inf
    if getattr(loader, "batch_sampler", None) is None or (size != usual and batches > 1):
        usual, known = size, math.inf  # an entry of the data set is not one sample
    return spread(count, int(min(known, batches * usual)))


def _only_chosen(loader: Iterable[Any], count: int) -> DataLoader[Any] | None:
    """A loader of the chosen entries of a set, alone; None where another is not known to give the same."""
    if (
        type(loader) is not DataLoader
        or isinstance(loader.dataset, IterableDataset)
        or type(loader.sampler) is not SequentialSampler
        or type(loader.batch_sampler) is not BatchSampler
        or loader.batch_size is None
    ):
        return None
    chosen = spread(count, min(len(loader.sampler), len(loader) * loader.batch_size))
    return DataLoader(
        Subset(loader.dataset, chosen),
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
