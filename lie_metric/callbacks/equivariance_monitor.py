"""Equivariance curves of the model under training, in every logger, each validation epoch."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lie_metric import algebra
from lie_metric.algebra import Generator
from lie_metric.callbacks import tensorboard
from lie_metric.callbacks.batches import images_of
from lie_metric.callbacks.selection import Share
from lie_metric.callbacks.trainers import refuse_sharded, validation_loaders
from lie_metric.callbacks.weights import exchange, tensors_of
from lie_metric.jacobian import Method
from lie_metric.metrics import LocalEquivarianceError
from lie_metric.metrics.base import ModelMetric
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling

__all__ = ["EquivarianceMonitor"]

Measure = Literal["relative", "lee", "sensitivity"]

_FAMILIES: dict[str, tuple[str, str]] = {
    "relative": ("", "relative error: output standard deviations per unit of t"),
    "lee": ("_lee", "LEE: mean squared Lie derivative"),
    "sensitivity": ("_sensitivity", "error relative to noise of the same size: 1 = nothing learned"),
}


class EquivarianceMonitor(Callback):
    r"""Measures Lie derivatives of the model under training on validation images, and logs them as curves.

    Each validation epoch the module's ``forward`` is measured in evaluation mode on the first ``num_images`` images of
    each validation loader (see :class:`~lie_metric.LocalEquivarianceError`), and for each generator is logged

    ======================================  ==========================================================================
    key                                     value
    ======================================  ==========================================================================
    ``equivariance/<generator>``            ``relative``: sqrt(Σ‖L_X f‖² / Σ‖f - E f‖²) of the output, in output
                                            standard deviations per unit of t; 0 = equivariant
    ``equivariance_se/<generator>``         its standard error over images
    ``equivariance_lee/<generator>``        ``lee``: E‖L_X f‖² / dim f, of the class probabilities of a classifier, of
                                            the plain output otherwise
    ``equivariance_lee_se/<generator>``     its standard error
    ``equivariance_sensitivity/<gener.>``   ``sensitivity`` and, with ``_se``, its standard error; only if asked for
    ``equivariance_<metric>/<name>``        each of ``metrics`` and, with ``_se``, its standard error, for each orbit
    ======================================  ==========================================================================

    Units of t: half of the shorter side (translation), radian (rotation), log factor or slope (scale, stretch, shear).
    Read ``equivariance``, and ``equivariance_lee`` beside it: the latter rewards a model for low confidence.

    The values are logged at the step of the other validation metrics, and are in ``trainer.callback_metrics`` in time
    for ``ModelCheckpoint`` and ``EarlyStopping``, wherever these stand in the list of callbacks. With more than one
    validation loader every key ends in ``/dataloader_idx_<index>``.

    In TensorBoard the tab Custom Scalars shows one chart for each family of curves, and the tab HPARAMS the final
    values of every run.

    Note:
        *Training is not changed*: weights, optimizer states, random states, buffers and losses are the same bit for bit
        with and without the monitor (on GPUs if kernels are deterministic and not benchmarked). The model is left as
        it was found, also when the measurement fails.

        *Several epochs between measurements* (``every_n_epochs=n``): epochs n, 2n, ... are measured, counted from 1 as
        in ``check_val_every_n_epoch``; in between ``trainer.callback_metrics`` keeps the old value. Monitor a key only
        with ``every_n_epochs=1``.

        *Several processes*: ``num_images`` is the total. Each process measures its share of the first images, the
        padding of a distributed sampler is left out, and the sums are added up; the values are those of one process
        over the same images. Sharded modules (FSDP, DeepSpeed, model parallel) are refused.

        *The baseline* is the curve's point at step 0. The weights of the untrained model are kept (in main memory)
        until the first validation, and measured then on the same images as the trained ones: no pass over the data is
        added, which could touch random states or workers. It goes to the loggers only, and none is measured when
        training is resumed.

    Args:
        generators: Names, groups or :class:`~lie_metric.Generator` objects, as in :func:`~lie_metric.generators`.
        num_images: How many images of each validation loader to measure, over all processes. The cost is proportional
            to it; the standard errors fall with its square root.
        every_n_epochs: Measure every n-th epoch. With ``fast_dev_run`` and ``trainer.validate()`` it is always
            measured.
        measures: Which of ``"relative"``, ``"lee"`` and ``"sensitivity"`` to log. All come from the same pass;
            ``"sensitivity"`` adds one tangent to it.
        metrics: Companions to measure on the same images, such as :class:`~lie_metric.PredictionConsistency`,
            :class:`~lie_metric.LatticeEquivarianceError` or :class:`~lie_metric.FiniteEquivarianceError`: a sequence of
            them, logged under the name of their class, or a mapping from names of one's own. Each brings its own
            options and costs passes of its own, one for each transform.
        images: Where the images are in a batch: a callable from the batch to the tensor, or a key or index. By default
            the batch itself if it is a tensor, the first entry of a tuple or list, or the one key of ``"image"``,
            ``"images"``, ``"pixel_values"``, ``"x"``, ``"input"``, ``"inputs"`` of a mapping.
        output: What is measured: ``"logits"``, what the module returns (a tensor; ``logits`` of a mapping or object;
            the first of a tuple), ``"probabilities"``, its softmax, or a callable from what it returns to a tensor.
        lee_output: What ``lee`` is taken of: ``"probabilities"``, the softmax of ``output``; ``"output"``, the same as
            the other measures; or ``"auto"``, probabilities for a classifier, i.e. for an invariant output of shape
            (B, C) with C > 1.
        input_representation: How the input carries the action; an image by default.
        output_representation: How the output does; by default inferred where its shape leaves no choice.
        resampling: The stencil with which images are differentiated; ``Resampling()`` by default.
        method: How the Jacobian products are computed, as in :func:`~lie_metric.lie_derivative`.
        chunk_size: How many tangents to push through the model at a time; it bounds the memory. By default all, or half
            of them where tensors are large.
        seed: Seed of the noise of ``"sensitivity"``.
        baseline: Whether to measure the untrained model too.
        on_error: What to do when the model cannot be measured: ``"warn"``, log NaN for this epoch and go on training
            (``EarlyStopping`` with ``check_finite=True`` stops at a NaN that it monitors), or ``"raise"``. A batch in
            which no images are found is always an error.
        prefix: First word of the keys. Give each its own when several monitors are in use.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or names something unknown.

    Example:
        >>> import lie_metric as lm
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[lm.EquivarianceMonitor(("rotation", "scale"))], logger=False)

    """

    _curves: list[_Measurement]
    _starts: list[_Measurement]
    _untrained: dict[str, Tensor] | None

    def __init__(
        self,
        generators: str | Generator | Sequence[str | Generator] = ("translation", "rotation", "scale"),
        num_images: int = 256,
        every_n_epochs: int = 1,
        *,
        measures: Sequence[Measure] = ("relative", "lee"),
        metrics: Sequence[ModelMetric] | Mapping[str, ModelMetric] = (),
        images: Callable[[Any], Any] | int | str | None = None,
        output: Literal["logits", "probabilities"] | Callable[[Any], Any] = "logits",
        lee_output: Literal["auto", "output", "probabilities"] = "auto",
        input_representation: Representation | None = None,
        output_representation: Representation | None = None,
        resampling: Resampling | None = None,
        method: Method = "auto",
        chunk_size: int | None = None,
        seed: int = 0,
        baseline: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        prefix: str = "equivariance",
    ) -> None:
        super().__init__()
        _check_positive("num_images", num_images, "256 images give standard errors of some per cent.")
        _check_positive("every_n_epochs", every_n_epochs, "1 measures every epoch.")
        if on_error not in {"warn", "raise"}:
            raise ValueError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
        if isinstance(measures, str) or not measures or not set(measures) <= set(get_args(Measure)):
            raise ValueError(f"`measures` must be a sequence of some of {get_args(Measure)}, got {measures!r}.")
        if images is not None and not callable(images) and not isinstance(images, (str, int)):
            raise TypeError(
                f"`images` must be a callable, a key or an index, got {images!r}. Pass e.g. `lambda batch: batch[0]`."
            )
        if not isinstance(prefix, str) or not prefix or "/" in prefix:
            raise ValueError(
                f"`prefix` must be a non-empty string without '/', got {prefix!r}. "
                "Loggers group curves by the text before '/'."
            )
        self.generators = algebra.generators(generators)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.measures = tuple(measures)
        self.metrics = _by_name(metrics)
        self.images = images
        self.baseline = baseline
        self.on_error = on_error
        self.prefix = prefix
        self.resampling = resampling or Resampling()
        self._options: dict[str, Any] = {
            "output": output,
            "lee_output": lee_output,
            "input_representation": input_representation,
            "output_representation": output_representation,
            "resampling": self.resampling,
            "method": method,
            "chunk_size": chunk_size,
            "seed": seed,
        }
        self._metric()  # refuses bad options now rather than after the first epoch
        self._forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses trainers under which nothing could be measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage about to begin.

        Raises:
            MisconfigurationException: If the strategy shards the module, or training has no validation.
        """
        self._forget()
        refuse_sharded(self, trainer, stage)
        if stage == "fit" and not trainer.enable_validation:
            raise MisconfigurationException(
                "`EquivarianceMonitor` must have validation images, got a run without validation "
                f"(limit_val_batches={trainer.limit_val_batches}). Pass `trainer.fit(model, train_loader, val_loader)` "
                "and define a `validation_step`, or remove the callback."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares TensorBoard; the Trainer logs hyperparameters right after this hook.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if not trainer.is_global_zero:
            return
        families = self._families()
        settings = {
            f"{self.prefix}_resampling": str(self.resampling),
            f"{self.prefix}_num_images": self.num_images,
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tensorboard.write_layout(logger, self.prefix, families)
                tags = [f"{family}/{name}" for family, names in families.values() for name in names]
                tensorboard.write_hyperparameters(trainer, logger, settings, tags)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses empty validation loaders, which nothing before this hook complains about.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            MisconfigurationException: If no validation loader has a batch.
        """
        batches = trainer.num_val_batches
        if batches and not any(batches):
            raise MisconfigurationException(
                f"`EquivarianceMonitor` must have validation images, got validation loaders of {batches} batches. "
                "Check the length of the validation set, `drop_last` and `limit_val_batches`."
            )
        self._measuring_start = self.baseline and trainer.global_step == 0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the weights of the untrained model; every hook that may still set them has run.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._measuring_start and self._untrained is None:
            tensors = tensors_of(pl_module)
            if any(map(is_lazy, tensors.values())):
                self._give_up_baseline("it has lazy modules that have not been called yet")
            else:
                self._untrained = {name: tensor.data.to("cpu", copy=True) for name, tensor in tensors.items()}

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides whether this epoch is measured, and on which images.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        fitting = trainer.state.fn == TrainerFn.FITTING
        skip = (
            fitting
            and not getattr(trainer, "fast_dev_run", False)
            and (trainer.current_epoch + 1) % self.every_n_epochs != 0
        )
        self._measuring = not trainer.sanity_checking and not skip
        if self._measuring or self._untrained is not None:
            loaders = validation_loaders(trainer)
            self._curves, self._starts = (
                [
                    _Measurement(self._metrics(pl_module.device), Share.of(each, trainer, self.num_images))
                    for each in loaders
                ]
                for _ in range(2)
            )

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures the images of the batch that are among the first ``num_images``.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What ``validation_step`` returned; not used.
            batch: The batch, on the module's device.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        if trainer.sanity_checking:
            images_of(
                batch, self.images
            )  # a batch without images shall be an error before the first epoch, not after it
        if self._measuring and not self._curves[dataloader_idx].is_complete:
            self._measure(trainer, pl_module, self._curves[dataloader_idx], batch)
        if self._untrained is not None and not self._starts[dataloader_idx].is_complete:
            with self._exchanged_weights(pl_module):
                if self._untrained is not None:
                    self._measure(trainer, pl_module, self._starts[dataloader_idx], batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up over processes and logs.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._untrained is not None:
            self._untrained, self._measuring_start = None, False
            start = {key: value.item() for key, value in self._values(trainer, pl_module, self._starts).items()}
            self._starts = []
            for logger in trainer.loggers:
                logger.log_metrics(start, step=0)
        if self._measuring:
            # Every process holds the same values: the mean over processes is no change, and asking for it keeps
            # Lightning from warning that values might differ.
            values = self._values(trainer, pl_module, self._curves)
            pl_module.log_dict(values, sync_dist=True, batch_size=1, add_dataloader_idx=False)
        self._measuring = False

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Frees what was kept.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage that ends.
        """
        self._forget()

    def _forget(self) -> None:
        """Frees what was kept; also called first, because an interrupted run is not torn down."""
        self._curves, self._starts, self._untrained = [], [], None
        self._measuring = self._measuring_start = False

    def _metric(self) -> LocalEquivarianceError:
        return LocalEquivarianceError(self.generators, with_noise="sensitivity" in self.measures, **self._options)

    def _metrics(self, device: torch.device) -> dict[str, ModelMetric]:
        """Empty metrics, the Lie derivatives under no name and the companions under theirs."""
        found: dict[str, ModelMetric] = {"": self._metric()}
        for name, metric in self.metrics.items():
            found[name] = copy.deepcopy(metric)
            found[name].reset()
        # The sums are float64, which MPS has not: there they stay in main memory.
        return found if device.type == "mps" else {name: metric.to(device) for name, metric in found.items()}

    def _families(self) -> dict[str, tuple[str, Sequence[str]]]:
        """For the title of each family of curves the text before the slash of its keys, and what stands behind."""
        generators = [generator.name for generator in self.generators]
        found: dict[str, tuple[str, Sequence[str]]] = {
            _FAMILIES[measure][1]: (self.prefix + _FAMILIES[measure][0], generators) for measure in self.measures
        }
        for name, metric in self.metrics.items():
            found[name.replace("_", " ")] = (f"{self.prefix}_{name}", metric.names)
        return found

    def _measure(self, trainer: Trainer, pl_module: LightningModule, measurement: _Measurement, batch: Any) -> None:
        images = images_of(batch, self.images)
        rows = measurement.share.rows(measurement.seen, len(images))
        measurement.seen += len(images)
        if not rows:
            return
        try:
            chosen = images if len(rows) == len(images) else images[rows]
            for metric in measurement.metrics.values():
                metric.update(pl_module, chosen)
        except Exception as error:
            # The other processes learn of it when all meet at the end of the epoch: raising here would leave them
            # waiting.
            if self.on_error == "raise" and trainer.world_size == 1:
                raise
            measurement.error = error
        else:
            measurement.images += len(rows)

    def _values(
        self, trainer: Trainer, pl_module: LightningModule, measurements: Sequence[_Measurement]
    ) -> dict[str, Tensor]:
        """The values under their keys, alike on all processes; NaN for what could not be measured."""
        # Always the same collective operations on every process, whatever failed where.
        outcomes = torch.tensor(
            [[m.error is not None, m.images] for m in measurements], device=pl_module.device
        ).float()
        outcomes = trainer.strategy.reduce(outcomes, reduce_op="sum")
        values: dict[str, Tensor] = {}
        for index, (measurement, (failures, images)) in enumerate(zip(measurements, outcomes.tolist(), strict=True)):
            measured: dict[str, Mapping[str, Tensor]] = {}
            if failures:
                self._report(measurement.error)
            elif images:
                measured = self._read(measurement)
            else:
                warnings.warn(f"No image of validation loader {index} was seen: its equivariance is NaN.", stacklevel=2)
            suffix = f"/dataloader_idx_{index}" if len(measurements) > 1 else ""
            for family, names in self._families().values():
                for key in (family, f"{family}_se"):
                    for name in names:
                        value = torch.as_tensor(measured.get(key, {}).get(name, torch.nan), dtype=torch.float32)
                        values[f"{key}/{name}{suffix}"] = value.to(pl_module.device)
        return values

    def _read(self, measurement: _Measurement) -> dict[str, Mapping[str, Tensor]]:
        """All values and standard errors of a loader, by the text before the slash of their keys."""
        local, *_ = measurement.metrics.values()
        found: dict[str, Mapping[str, Tensor]] = {}
        if isinstance(local, LocalEquivarianceError):
            for kind, by_name in local.measures().items():
                measure = kind.removesuffix("_standard_error")
                found[self.prefix + _FAMILIES[measure][0] + ("_se" if kind != measure else "")] = by_name
        for name in self.metrics:
            metric = measurement.metrics[name]
            found[f"{self.prefix}_{name}"] = metric.compute()
            found[f"{self.prefix}_{name}_se"] = metric.standard_error()
        return found

    def _report(self, error: Exception | None) -> None:
        reason = "on another process" if error is None else f"with {type(error).__name__}: {error}"
        message = f"The equivariance of the model could not be measured, it failed {reason}"
        if self.on_error == "raise":
            raise RuntimeError(message) from error
        warnings.warn(
            f"{message} This epoch is logged as NaN and training goes on; `on_error='raise'` stops it.", stacklevel=2
        )

    def _give_up_baseline(self, reason: str) -> None:
        self._untrained, self._measuring_start = None, False
        warnings.warn(f"No baseline: the untrained model cannot be kept, because {reason}.", stacklevel=2)

    @contextlib.contextmanager
    def _exchanged_weights(self, pl_module: LightningModule) -> Iterator[None]:
        """The untrained weights in the module, bit for bit its own again afterwards."""
        kept, tensors = self._untrained or {}, tensors_of(pl_module)
        if {name: t.shape for name, t in kept.items()} != {name: t.shape for name, t in tensors.items()}:
            self._give_up_baseline("its parameters or buffers were replaced in training")
            yield
            return
        exchange(tensors, kept)
        try:
            yield
        finally:
            exchange(tensors, kept)


@dataclass
class _Measurement:
    """A loader's metrics in one validation epoch."""

    metrics: dict[str, ModelMetric]
    share: Share
    seen: int = 0
    images: int = 0
    error: Exception | None = field(default=None, repr=False)

    @property
    def is_complete(self) -> bool:
        """Whether no further batch is to be measured."""
        return self.error is not None or self.share.is_complete(self.seen)


def _by_name(metrics: Sequence[ModelMetric] | Mapping[str, ModelMetric]) -> dict[str, ModelMetric]:
    """Metrics under their names, which become a part of keys."""
    if isinstance(metrics, Mapping):
        found = dict(metrics)
    elif isinstance(metrics, (tuple, list)):
        names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(metric).__name__).lower() for metric in metrics]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"`metrics` must be a mapping from names when two are of one kind, got {repeated} more than once. Pass "
                "e.g. {'small': ..., 'large': ...}."
            )
        found = dict(zip(names, metrics, strict=True))
    else:
        raise TypeError(f"`metrics` must be a sequence or a mapping of metrics, got {metrics!r}. Put it into a list.")
    taken = {suffix.strip("_") for suffix, _ in _FAMILIES.values()} | {"se"}
    for name, metric in found.items():
        if not isinstance(metric, ModelMetric):
            raise TypeError(
                f"`metrics` must be metrics of this library, got {metric!r} for {name!r}. Pass e.g. "
                "`lie_metric.PredictionConsistency()`."
            )
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name in taken or name.endswith("_se"):
            raise ValueError(
                f"`metrics` must have names of letters, digits and '_', that are not among {sorted(taken)} and do not "
                f"end in '_se', got {name!r}. They become a part of the logged keys."
            )
    return found


def _check_positive(name: str, value: object, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. {advice}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}. {advice}")
