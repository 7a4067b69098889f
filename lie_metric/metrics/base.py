"""What every metric of a model shares: sums over images by group and over processes, and their standard errors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import Self

from lie_metric.binding import by_sample, sample_count
from lie_metric.functional.sums import (
    GROUPS,
    MOMENTS,
    Indices,
    Replicates,
    Sums,
    fingerprints,
    grouped,
    spread,
    standard_error,
    totals,
)
from lie_metric.metrics.arguments import accepted, told_apart, validated_groups
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.records import Record, of_images, plain
from lie_metric.representations import Parts, Representation
from lie_metric.resampling import Resampling, working_precision
from lie_metric.running import process
from lie_metric.warning import warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    and the jackknife gives standard errors. Metrics whose sums are the same for the same options share one pass in a
    ``MetricCollection``; others never do.

    Args:
        shapes: Names of the sums and their shapes behind the axis of groups; a width that is not known yet is 1, which
            broadcasts.
        options: What of a model is measured and how.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Attributes:
        given: Names of the arguments that were given to the constructor.
        described: What was measured first: shape of the output, how it transforms and why that is thought; None before.
        input_shapes: Shapes of the images measured so far.
    """

    full_state_update = False
    higher_is_better: bool | None = False
    is_differentiable = False
    plot_lower_bound: float | None = 0.0

    own: ClassVar[tuple[str, ...]] = ()
    """Attributes on which the sums depend, beside the options that all measures share."""

    output: Output
    function: Function | None
    input_representation: Layout | None
    output_representation: Layout | None
    resampling: Resampling
    method: str
    chunk_size: int | None

    shaping: ClassVar[frozenset[str]] = frozenset({"generators", "orbits", "quantities"})
    """Attributes that fix names and shapes of the sums: they stay as the constructor made them."""

    measure: str
    """What :meth:`compute` returns."""

    numbers: list[int] | None = None
    """The running numbers of the images of the next batch, where they are not those of the order in which they come."""

    rounding: Tensor
    fingerprint: Tensor
    given: frozenset[str]
    described: str | None
    input_shapes: set[tuple[int, ...]]
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _begun: dict[str, Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keeps what was given, so that another metric can be made of it, see :meth:`inheriting`."""
        made = super().__new__(cls)
        positional = list(inspect.signature(cls.__init__).parameters)[1 : len(args) + 1]
        vars(made)["_arguments"] = (args, kwargs)
        vars(made)["given"] = frozenset(positional) | frozenset(kwargs)
        return made

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], options: Options | None = None, **kwargs: Any) -> None:
        if kwargs.get("dist_sync_fn") is None:
            kwargs["dist_sync_fn"] = _gather
        super().__init__(**kwargs)
        chosen = options or Options()
        for name in self._shared():
            setattr(self, name, chosen.stencil if name == "resampling" else getattr(chosen, name))
        self._names = ("images", "hash", *shapes)
        self._seen = 0
        self._grouped = False
        self._continuing = False
        self._begun = None
        self.described, self.input_shapes = None, set()
        for name, shape in {"images": (), "hash": (), **shapes}.items():
            self.add_state(f"sum_{name}", torch.zeros(GROUPS, *shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rounding", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")
        # Collections compare states to find out whose are the same; sixteen bytes, exact in every dtype.
        self.add_state("fingerprint", torch.zeros(16, dtype=torch.float64), dist_reduce_fx="max")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.shaping and name in vars(self):
            got = [getattr(one, "name", one) for one in value] if isinstance(value, (list, tuple)) else plain(value)
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} must stay as they were given to its constructor, got {got!r} for "
                f"{list(self.names)}. Make another metric of them."
            )
        super().__setattr__(name, value)
        if name == "measure" or name in self.own or name in Options.__dataclass_fields__:
            self._computed = None  # what was kept of another measure

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values, in the order of all results."""
        raise NotImplementedError

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images of each value, in its units."""
        raise NotImplementedError

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """By the name of each measure that can be read its values as a function of the sums."""
        raise NotImplementedError

    @property
    def parameter_units(self) -> tuple[str, ...]:
        """For each name the unit of the parameter that a value is per; empty where a value is a number alone."""
        return ("",) * len(self.names)

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one image; None before there are any, and where there are several shapes."""
        return next(iter(self.input_shapes)) if len(self.input_shapes) == 1 else None

    @property
    def decibels(self) -> bool:
        """Whether values are decibels, of which differences count, rather than ratios."""
        return False

    def replicates(self, measure: str | None = None) -> Replicates:
        """The values of a measure, and what they are without each group of images.

        Args:
            measure: The measure; the default is the one of :meth:`compute`.

        Returns:
            Replicates of as many values as there are :attr:`names`, in their order, on the CPU.
        """
        return self.record(measure).replicates

    def record(self, measure: str | None = None) -> Record:
        """All that a comparison needs of a measure; what :func:`lie_metric.compare` takes, and files of runs hold.

        Args:
            measure: The measure; the default is the one of :meth:`compute`.

        Returns:
            The record, over all processes.
        """
        return self.records([self._chosen(measure)])[0]

    def records(self, measures: Sequence[str] | None = None) -> list[Record]:
        """The records of several measures, synchronised over processes once.

        Args:
            measures: The measures; the default is all that can be read.

        Returns:
            A record for each.
        """
        asked = list(self.statistics()) if measures is None else [self._chosen(measure) for measure in measures]
        skipped = {"generators", "orbits", "method", "chunk_size", "with_noise", "seed"}
        settings = {name: plain(value) for name, value in self._given_options().items() if name not in skipped}

        def read(sums: Sums) -> list[Record]:
            found = []
            for measure in asked:
                kept = Replicates.of(sums, self.statistics()[measure]).map(_finite)
                moved = Replicates(*(part.to("cpu", torch.float64) for part in vars(kept).values()))
                varied = variance(sums)
                one = float(varied) if varied.ndim == 0 else math.nan  # parts of the output have one each
                about = (settings, of_images(sums), self.input_shape, one, self.decibels)
                found.append(Record(type(self).__name__, measure, self.names, self.parameter_units, moved, *about))
            return found

        return self._synced(read)

    def interval(self, measure: str | None = None, level: float = 0.95) -> dict[str, tuple[Tensor, Tensor]]:
        r"""A confidence interval over images of each value, :math:`\exp(\log v \pm q\,\mathrm{se} / v)`.

        q is of Student's t with as many degrees of freedom as groups of images, less one: 63 for 64 images and more.
        Decibels, which are logarithms, have :math:`v \pm q\,\mathrm{se}`. Groups given to ``update`` count as one.

        Args:
            measure: The measure; the default is the one of :meth:`compute`.
            level: The probability with which such intervals hold the value of all images.

        Returns:
            For each name the lower and the upper end; NaN for fewer than two images or groups, and for a value that is
            not positive.

        Raises:
            ValueError: If there is no such measure, or the level is no probability.

        Warns:
            UserWarning: If a value has no interval.

        Example:
            >>> import lie_metric as lm
            >>> metric = lm.LocalEquivarianceError("saturation", "lee")
            >>> images = torch.tensor([1.0, 2, 3]).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
            >>> metric.update(lambda x: x.mean((2, 3)), images)
            >>> low, high = metric.interval()["saturation"]  # of the mean of 1, 4, 9
            >>> round(low.item(), 3), round((low * high).item(), 3)
            (0.543, 21.778)
        """
        ends = self.replicates(measure).interval(level, logarithmic=not self.decibels)
        upper = getattr(self, "plot_upper_bound", None)
        low, high = ends if upper is None else (ends[0], ends[1].clamp(max=upper))
        undefined = [name for name, bad in zip(self.names, low.isnan().tolist(), strict=True) if bad]
        if undefined:
            warn(
                f"`interval` is NaN for {undefined}: the value is zero or NaN, or there are fewer than two images or "
                "groups of them."
            )
        return {name: (low[k], high[k]) for k, name in enumerate(self.names)}

    def output_variance(self) -> Tensor:
        """The variance of the output over images, each entry about its own mean, and the mean of it over entries.

        Returns:
            A number; NaN for a metric that does not keep it, and for an output that does not vary.
        """
        return self._synced(variance)

    def images_fingerprint(self) -> str:
        """What tells the measured images from others: of each its bytes and its group, whatever order they came in.

        Returns:
            32 hexadecimal digits.
        """
        return self._synced(of_images)

    def _chosen(self, measure: str | None) -> str:
        known, chosen = self.statistics(), self.measure if measure is None else measure
        if chosen not in known:
            raise ValueError(f"`measure` must be one of {sorted(known)}, got {chosen!r}.")
        return chosen

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
        taken = {
            name: value for name, value in options.items() if name in accepted(type(self), ModelMetric) - self.given
        }
        args, kwargs = self._arguments
        made: Callable[..., Self] = type(self)
        return made(*args, **kwargs, **taken).to(self.device)

    def _given_options(self) -> dict[str, Any]:
        """The attributes on which the sums depend."""
        return {name: getattr(self, name) for name in (*self.own, *self._shared())}

    def _check_unchanged(self) -> None:
        """Refuses to go on with sums, or to read them, under options that they were not begun with."""
        for name, before in (self._begun or {}).items():
            now = getattr(self, name)
            if now is not before and told_apart(now) != told_apart(before):
                raise ValueError(
                    f"`{name}` must stay the same over all images, got {plain(now)!r} after {self._seen} images with "
                    f"{plain(before)!r}. Set it back, call `reset()` to begin anew, or make another metric."
                )

    @property
    def options(self) -> Options:
        """What of a model is measured and how, as the attributes say now."""
        return Options.of({name: getattr(self, name) for name in self._shared()})

    def _own(self) -> dict[str, Any]:
        """Those beside the options, as arguments of the function that makes the sums."""
        return {name: getattr(self, name) for name in self.own}

    @classmethod
    def _shared(cls) -> list[str]:
        """The options that the constructor takes."""
        return [field.name for field in dataclasses.fields(Options) if field.name in accepted(cls, ModelMetric)]

    def _indices(self, images: object, groups: Sequence[int] | Tensor | None = None, layout: Any = None) -> Indices:
        """The running numbers of the samples of a batch, and their groups.

        Under several processes image i of rank r is taken for number i · world + r, which is how samplers deal them
        out, so that groups and noise are those of one process.
        """
        self._check_unchanged()
        count = sample_count(images, layout)
        belonging = None if groups is None else validated_groups(groups, count)
        if self._seen and self._grouped != (groups is not None):
            raise ValueError(
                f"`groups` must be given for all images or for none, got {'none' if groups is None else 'some'} after "
                f"{self._seen} images {'with' if self._grouped else 'without'}. Call `reset()` to begin anew."
            )
        if self.numbers is not None:
            return Indices(self.numbers, belonging)
        rank, world = process()
        return Indices([(self._seen + row) * world + rank for row in range(count)], belonging)

    def _add(
        self, images: Tensor, indices: Indices, sums: Sums, described: str, carrier: Representation | None = None
    ) -> None:
        if "total" in self._names:
            before, now = self._state("total").shape[-1], sums["total"].shape[-1]
            if before not in {1, now} and now != 1:
                raise ValueError(
                    f"`images` must lead to outputs of one width, got {now} means after {before}. Use one Metric for "
                    "each kind of output."
                )
        if len(indices) and self._begun is None:
            told = self._given_options().items()
            self._begun = {name: value for name, value in told if name not in {"method", "chunk_size", "seed"}}
        self._seen += len(indices)
        self._grouped = indices.groups is not None
        self.described = self.described or described
        self.input_shapes = self.input_shapes | {tuple(images.shape[1:])}
        # Images in half precision are measured in float32, and are told apart as these.
        images = working_precision(images)
        hashes = fingerprints(images)
        if isinstance(carrier, Parts):
            hashes = torch.cat([fingerprints(one) for one in by_sample(carrier, images[None])])
        sums = {**sums, "hash": grouped({"hash": hashes}, indices)["hash"]}
        for name in self._names:
            # Not in place: a state made in inference mode could not be changed outside of it.
            state = self._state(name)
            setattr(self, f"sum_{name}", state + sums[name].to(state))
        if "rounding" in sums:
            self.rounding = torch.maximum(self.rounding, sums["rounding"].to(self.rounding))
        digest = hashlib.blake2b(told_apart(list(self._given_options().items())).encode(), digest_size=16).digest()
        self.fingerprint = torch.tensor(list(digest)).to(self.fingerprint)

    def _state(self, name: str) -> Tensor:
        state = getattr(self, f"sum_{name}")
        if not isinstance(state, Tensor):
            raise TypeError(f"state `{name}` must be a tensor")
        return state

    def _sums(self) -> dict[str, Tensor]:
        self._check_unchanged()
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

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Adds a batch and returns the measure of that batch alone, from a single pass over the model."""
        self._check_unchanged()
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
            self._grouped = False
            self._begun = None
            self.described, self.input_shapes = None, set()

    def plot(self, val: Any = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plots one value, or a sequence of values over steps, for each name.

        Args:
            val: Results of ``compute`` or ``forward``, one or several; the default is the present one.
            ax: A matplotlib axis.

        Returns:
            The figure and the axis.
        """
        return cast("tuple[Figure, Axes]", self._plot(val, ax))


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, torch.nan)


def variance(sums: Sums) -> Tensor:
    """The mean variance of the output's entries; NaN where the sums do not tell."""
    if not set(MOMENTS) <= set(sums):
        return torch.tensor(torch.nan)
    total = totals(sums)
    return spread(total) / total["entries"]
