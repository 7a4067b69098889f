"""What every metric of a model shares: sums over images by group and over processes, and their standard errors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import Self

from lie_metric.functional.sums import GROUPS, Sums, standard_error

__all__ = ["ModelMetric"]


def _gather(result: Tensor, group: Any = None) -> list[Tensor]:
    """Gathers a state; a process without images, whose width is still 1, takes the width of the others."""
    parts = gather_all_tensors(result, group)
    width = torch.broadcast_shapes(*(part.shape for part in parts))
    return [part.expand(width) for part in parts]


def told_apart(value: Any) -> str:
    """Text that two options share only if they are the same: by value what is plain, all else by identity.

    Args:
        value: Any option.

    Returns:
        The text.

    Example:
        >>> one, other = (lambda: 0), (lambda: 0)
        >>> told_apart([1, None]) == told_apart((1, None)), told_apart(one) == told_apart(other)
        (True, False)
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return f"{type(value).__module__}.{type(value).__qualname__}({told_apart(entries)})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(told_apart, value))}]"
    if value is None or isinstance(value, (str, int, float, torch.dtype, torch.device)):
        return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"


class ModelMetric(Metric):
    """A measure of a model on images that is a function of sums over the images.

    The model is passed to ``update``, measured in evaluation mode, left as it was found and never stored. States are
    float64 sums for groups of images, so values over several processes are those of one process over the same images,
    and the jackknife gives standard errors. Metrics whose sums are the same for the same options share one pass in a
    ``MetricCollection``; others never do.

    Args:
        shapes: Names of the sums and their shapes behind the axis of groups; a width that is not known yet is 1, which
            broadcasts.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Attributes:
        given: Names of the arguments that were given to the constructor.
        described: What was measured first: shape of the output, how it transforms and why that is thought; None before.
    """

    full_state_update = False
    higher_is_better: bool | None = False
    is_differentiable = False
    plot_lower_bound: float | None = 0.0

    options: ClassVar[tuple[str, ...]] = ()
    """Attributes on which the sums depend."""

    numbers: list[int] | None = None
    """The running numbers of the images of the next batch, where they are not those of the order in which they come."""

    rounding: Tensor
    fingerprint: Tensor
    given: frozenset[str]
    described: str | None
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keeps what was given, so that another metric can be made of it, see :meth:`inheriting`."""
        made = super().__new__(cls)
        positional = list(inspect.signature(cls.__init__).parameters)[1 : len(args) + 1]
        vars(made)["_arguments"] = (args, kwargs)
        vars(made)["given"] = frozenset(positional) | frozenset(kwargs)
        return made

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], **kwargs: Any) -> None:
        if kwargs.get("dist_sync_fn") is None:
            kwargs["dist_sync_fn"] = _gather
        super().__init__(**kwargs)
        self._names = ("images", *shapes)
        self._seen = 0
        self._continuing = False
        self.described = None
        for name, shape in {"images": (), **shapes}.items():
            self.add_state(f"sum_{name}", torch.zeros(GROUPS, *shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rounding", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")
        # Collections compare states to find out whose are the same; sixteen bytes, exact in every dtype.
        self.add_state("fingerprint", torch.zeros(16, dtype=torch.float64), dist_reduce_fx="max")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values, in the order of all results."""
        raise NotImplementedError

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images of each value, in its units."""
        raise NotImplementedError

    def inheriting(self, **options: Any) -> Self:
        """A new metric with the arguments of this one, and others where none were given.

        Args:
            options: Arguments for those that were not given to this metric. What its class has no argument for, and
                what was given, stays as it is.

        Returns:
            The metric, without images, on the device of this one.

        Example:
            >>> import lie_metric as lm
            >>> metric = lm.PredictionConsistency(seed=3).inheriting(seed=0, output="probabilities", chunk_size=2)
            >>> metric.seed, metric.output
            (3, 'probabilities')
        """
        taken = {name: value for name, value in options.items() if name in _accepted(type(self)) - self.given}
        args, kwargs = self._arguments
        made: Callable[..., Self] = type(self)
        return made(*args, **kwargs, **taken).to(self.device)

    def _given_options(self) -> dict[str, Any]:
        """The attributes on which the sums depend, as arguments of the functions that make these."""
        return {name: getattr(self, name) for name in self.options}

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

    def _add(self, sums: Sums, count: int, described: str) -> None:
        if "total" in self._names:
            before, now = self._state("total").shape[1], sums["total"].shape[1]
            if before not in {1, now} and now != 1:
                raise ValueError(
                    f"`images` must lead to outputs of one width, got {now} means after {before}. Use one Metric for "
                    "each kind of output."
                )
        self._seen += count
        self.described = self.described or described
        for name in self._names:
            # Not in place: a state made in inference mode could not be changed outside of it.
            state = self._state(name)
            setattr(self, f"sum_{name}", state + sums[name].to(state))
        if "rounding" in sums:
            self.rounding = torch.maximum(self.rounding, sums["rounding"].to(self.rounding))
        told = hashlib.blake2b(told_apart(list(self._given_options().items())).encode(), digest_size=16).digest()
        self.fingerprint = torch.tensor(list(told)).to(self.fingerprint)

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
            self.described = None

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plots one value, or a sequence of values over steps, for each name.

        Args:
            val: Results of ``compute`` or ``forward``, one or several; the default is the present one.
            ax: A matplotlib axis.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)


def _accepted(kind: type) -> set[str]:
    """The names of the arguments of a class, of those of its bases too where it passes others on."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {one.name for one in parameters if one.kind in {one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD}}
        if base is ModelMetric or not any(one.kind == one.VAR_KEYWORD for one in parameters):
            break
    return names


def _process() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
