"""What every metric of a model shares: sums over images by group and over processes, and their standard errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lie_metric.functional.sums import GROUPS, Sums, standard_error

__all__ = ["ModelMetric"]


def _gather(result: Tensor, group: Any = None) -> list[Tensor]:
    """Gathers a state; a process without images, whose width is still 1, takes the width of the others."""
    parts = gather_all_tensors(result, group)
    width = torch.broadcast_shapes(*(part.shape for part in parts))
    return [part.expand(width) for part in parts]


class ModelMetric(Metric):
    """A measure of a model on images that is a function of sums over the images.

    The model is passed to ``update``, measured in evaluation mode, left as it was found and never stored. States are
    float64 sums for groups of images, so values over several processes are those of one process over the same images,
    and the jackknife gives standard errors.

    Args:
        shapes: Names of the sums and their shapes behind the axis of groups; a width that is not known yet is 1, which
            broadcasts.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better: bool | None = False
    is_differentiable = False
    plot_lower_bound: float | None = 0.0

    numbers: list[int] | None = None
    """The running numbers of the images of the next batch, where they are not those of the order in which they come."""

    rounding: Tensor

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], **kwargs: Any) -> None:
        if kwargs.get("dist_sync_fn") is None:
            kwargs["dist_sync_fn"] = _gather
        super().__init__(**kwargs)
        self._names = ("images", *shapes)
        self._seen = 0
        self._continuing = False
        for name, shape in {"images": (), **shapes}.items():
            self.add_state(f"sum_{name}", torch.zeros(GROUPS, *shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rounding", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values, in the order of all results."""
        raise NotImplementedError

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images of each value, in its units."""
        raise NotImplementedError

    def _indices(self, images: object) -> list[int]:
        """The running numbers of the images of a batch.

        Under several processes image i of rank r is taken for number i · world + r, which is how samplers deal them
        out, so that groups and noise are those of one process.
        """
        if self.numbers is not None:
            return self.numbers
        rank, world = _process()
        count = len(images) if isinstance(images, Tensor) and images.ndim else 0
        return [(self._seen + row) * world + rank for row in range(count)]

    def _add(self, sums: Sums, count: int) -> None:
        if "total" in self._names:
            before, now = self._state("total").shape[1], sums["total"].shape[1]
            if before not in {1, now} and now != 1:
                raise ValueError(
                    f"`images` must lead to outputs of one width, got {now} means after {before}. Use one Metric for "
                    "each kind of output."
                )
        self._seen += count
        for name in self._names:
            # Not in place: a state made in inference mode could not be changed outside of it.
            state = self._state(name)
            setattr(self, f"sum_{name}", state + sums[name].to(state))
        if "rounding" in sums:
            self.rounding = torch.maximum(self.rounding, sums["rounding"].to(self.rounding))

    def _state(self, name: str) -> Tensor:
        state = getattr(self, f"sum_{name}")
        if not isinstance(state, Tensor):
            raise TypeError(f"state `{name}` must be a tensor")
        return state

    def _sums(self) -> dict[str, Tensor]:
        return {name: self._state(name) for name in self._names} | {"rounding": self.rounding}

    def _synced(self, read: Callable[[Mapping[str, Tensor]], Any]) -> Any:
        """A function of the sums over all processes, as in ``compute``."""
        if self._is_synced:
            return read(self._sums())
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return read(self._sums())

    def _errors(self, statistic: Callable[[Sums], Tensor]) -> Tensor:
        return self._synced(lambda sums: standard_error(sums, statistic))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns the measure of that batch alone, from a single pass over the model."""
        self._continuing = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._continuing = False

    def reset(self) -> None:
        """Forgets all images."""
        super().reset()
        if not getattr(self, "_continuing", False):
            self._seen = 0

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plots one value, or a sequence of values over steps, for each name.

        Args:
            val: Results of ``compute`` or ``forward``, one or several; the default is the present one.
            ax: A matplotlib axis.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)


def _process() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
