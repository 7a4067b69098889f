"""Equivariance curves of the model under training, in every logger, each validation epoch.

One class, a third of it the reference of its keys and arguments, which stands where users look it up: hence the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lie_metric.algebra import Generator
from lie_metric.binding import sample_count
from lie_metric.callbacks import tensorboard
from lie_metric.callbacks.baseline import Untrained
from lie_metric.callbacks.loaders import LoaderMeasurements, Step
from lie_metric.callbacks.monitor import Function, Monitor
from lie_metric.callbacks.records import keep
from lie_metric.callbacks.selection import Gathering, Share, WholeBatches, described
from lie_metric.callbacks.trainers import is_a, is_fitting, measured_loaders, number_of_batches, outermost
from lie_metric.curves import Measurement, Program, strides_of
from lie_metric.curves.batches import inputs_of
from lie_metric.functional.local_equivariance import Measure
from lie_metric.jacobian import Method
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Layout, Options
from lie_metric.resampling import Resampling
from lie_metric.running import unsharded

__all__ = ["EquivarianceMonitor"]


class EquivarianceMonitor(Monitor):
    r"""Measures Lie derivatives of the model under training on validation images, and logs them as curves.

    Each validation epoch the module's ``forward`` is measured in evaluation mode on ``num_images`` images spread over
    each validation loader (see :class:`~lie_metric.LocalEquivarianceError`), and for each generator is logged

    ======================================  ==========================================================================
    key                                     value
    ======================================  ==========================================================================
    ``equivariance/<generator>``            ``relative``: sqrt(Σ‖L_X f‖² / Σ‖f - E f‖²) of the output, in output
                                            standard deviations per unit of t; 0 = equivariant
    ``equivariance_se/<generator>``         its standard error over images
    ``equivariance_lee/<generator>``        ``lee``: E‖L_X f‖² / dim f of the output
    ``equivariance_lee_se/<generator>``     its standard error
    ``equivariance_rms/<generator>``        its root, in units of the output per unit of t (eV/rad), and ``_se``; only
                                            if asked for
    ``equivariance_sensitivity/<gener.>``   ``sensitivity`` and, with ``_se``, its standard error; only if asked for
    ``equivariance_finite/<generator>``     what a transform by ``displacement`` pixels does to the output: 0 =
                                            equivariant, 1 = as far away as another image; and with ``_se`` its error
    ``equivariance_linearity/<generator>``  what is left of the first order after one pixel: 1 = all; and ``_se``
    ``equivariance_floor/<generator>``      what two stencils disagree about, in units of ``equivariance``: values at or
                                            below it cannot be told from 0; and ``_se``
    ``equivariance_<metric>/<name>``        each of ``metrics`` and, with ``_se``, its standard error, for each orbit
    ======================================  ==========================================================================

    Units of t: half of the shorter side (translation) or its inverse (perspective), radian (rotation), log factor or
    slope (scale, stretch, shear).
    ``equivariance`` tells how the function bends at the image, ``equivariance_finite`` what a moved image meets; where
    ``equivariance_linearity`` is far from 1 the first says little of the second. ``equivariance_lee`` grows with the
    square of the outputs, and with
    ``lee_output="probabilities"``, as in the paper, it rewards a classifier for low confidence.

    The values are logged at the step of the other validation metrics, and are in ``trainer.callback_metrics`` in time
    for ``ModelCheckpoint`` and ``EarlyStopping``, wherever these stand in the list of callbacks. With more than one
    validation loader every key ends in ``/dataloader_idx_<index>``.

    In TensorBoard the tab Custom Scalars shows one chart for each family of curves, and the tab HPARAMS the final
    values of every run.

    Note:
        *Training is not changed*: weights, optimizer states, random states, buffers and losses are the same bit for bit
        with and without the monitor (on GPUs if kernels are deterministic and not benchmarked). The model is left as
        it was found, also when the measurement fails. Logged values are not changed either: while the monitor measures,
        ``log`` and ``log_dict`` of the module do nothing, and what its torchmetrics objects see is undone.

        *Which images*: one from each of ``num_images`` equal parts of the validation set, in the order of the loader,
        so that a set sorted by class is measured as a whole. They are the same in each epoch (if the loader does not
        shuffle) and for any number of processes, are chosen among those that ``limit_val_batches`` leaves, and are
        gathered to full batches before they are measured. Of loaders whose length is not known, and of several that
        are run side by side, the first images are taken.

        *Misuse shows at once*: in the sanity check, or without one before the first training step, two images go
        through the whole measurement. A TypeError or ValueError there, such as a batch without images or an output
        whose representation has to be given, is raised whatever ``on_error`` is. Where a validation set cannot be
        indexed by numbers, or its loader is made later (``check_val_every_n_epoch``), the first validation batch shows
        it. Then one line says what is measured: function, output and representation, method and its check, stencil and
        number of images.

        *How many images*: the finite error is measured on every fourth image; linearity on every eighth and the floor
        on every sixteenth, at the first, second, fourth, eighth, ... epoch that is measured. Of fewer than 256 images
        at least sixteen are taken, if there are so many. Shifts are by whole pixels: two crops of one image are
        compared where the model takes images smaller by as much, and mirrored images otherwise.

        *Several epochs between measurements* (``every_n_epochs=n``): epochs n, 2n, ... are measured, counted from 1 as
        in ``check_val_every_n_epoch``; in between ``trainer.callback_metrics`` keeps the old value. Monitor a key only
        with ``every_n_epochs=1``.

        *Several processes*: ``num_images`` is the total. Each process measures its share of the images, the
        padding of a distributed sampler is left out, and the sums are added up; the values are those of one process
        over the same images. Of modules sharded by FSDP (``FSDPStrategy``, and ``fully_shard`` under
        ``ModelParallelStrategy``) the whole weights are gathered once in each measured epoch, see
        :func:`lie_metric.unsharded`; tensor parallel ones and DeepSpeed's are refused.

        *Comparisons*: with a logger that has a directory, ``<log_dir>/<prefix>.jsonl`` keeps of each measured epoch
        what :func:`lie_metric.compare`, :func:`lie_metric.read_runs` and ``lie-metric compare`` need: values without
        each group of images, settings, and what tells the images from others.

        *Tests*: with ``test=True`` the test loaders are measured in ``trainer.test()`` as validation loaders are, and
        logged under keys with ``test_`` before them: ``test_equivariance/rotation``. Without it nothing is measured
        there, which a warning says. ``trainer.validate()`` measures its loaders under the keys of training.

        *The baseline* is the curve's point at step 0. The weights of the untrained model are kept (in main memory)
        until the first validation, and measured then on the same images as the trained ones: no pass over the data is
        added, which could touch random states or workers. It goes to the loggers only, and none is measured when
        training is resumed.

    Args:
        generators: Names, groups or :class:`~lie_metric.Generator` objects, as in :func:`~lie_metric.generators`.
        num_images: How many images of each validation loader to measure, over all processes. The cost is proportional
            to it; the standard errors fall with its square root.
        every_n_epochs: Measure every n-th epoch. With ``fast_dev_run``, ``trainer.validate()`` and ``trainer.test()``
            it is always measured.
        measures: Which of ``"relative"``, ``"lee"``, ``"rms"`` and ``"sensitivity"`` to log. All come from the same
            pass; ``"sensitivity"`` adds one tangent to it.
        displacement: By how many pixels, in the root mean square over the frame, images are moved for
            ``equivariance_finite``; None for neither that nor ``equivariance_linearity``. Intensities move none, and
            inputs that stand on no grid have no pixels: of these there are none.
        floor: Whether to measure ``equivariance_floor``.
        metrics: Companions to measure on the same images, such as :class:`~lie_metric.PredictionConsistency`,
            :class:`~lie_metric.LatticeEquivarianceError` or :class:`~lie_metric.FiniteEquivarianceError`: a sequence of
            them, logged under the name of their class, or a mapping from names of one's own. ``output``, ``function``,
            representations, ``resampling`` and ``seed`` are those of the monitor where they were not given their own.
            Each costs passes of its own, one for each transform. One that fails is logged as NaN alone.
        images: Where the images are in a batch: a callable from the batch to the tensor, or a key or index. By default
            the batch itself if it is a tensor, the first entry of a tuple or list, or the one key of ``"image"``,
            ``"images"``, ``"pixel_values"``, ``"x"``, ``"input"``, ``"inputs"`` of a mapping.
        output: What is measured: ``"logits"``, what the module returns (a tensor; ``logits`` of a mapping or object;
            the first of a tuple), ``"probabilities"``, its softmax, or a callable from what it returns to a tensor.
        function: What is called: None for the module's ``forward``, the name of another of its methods, or a callable
            from the module and the images to what ``output`` selects from, such as ``lambda module, images:
            module.encode(images, mask=None)``.
        lee_output: What ``lee`` is taken of: ``"output"``, the same as the other measures; ``"probabilities"``, the
            softmax of ``output``; or ``"auto"``, probabilities for any invariant output of shape (B, C) with C > 1.
        inputs: Another name of ``images``, for inputs that are none. With an ``input_representation`` of named parts it
            gives what holds them: a mapping, an object such as a batch of graphs, or a tuple of the module's arguments.
            By default that is the batch itself, or its first entry if it is a tuple or list. Whole batches are
            measured then, spread over the validation set, as many as hold ``num_images`` samples.
        input_representation: How the input carries the action; an image by default. A mapping says it of named parts,
            see :func:`~lie_metric.lie_derivative`.
        output_representation: How the output does; by default inferred where its shape leaves no choice. A mapping
            measures several parts at once, each logged under its name: ``equivariance_forces/rotation_x``.
        resampling: The stencil with which images are differentiated; ``Resampling()`` by default.
        method: How the Jacobian products are computed, as in :func:`~lie_metric.lie_derivative`.
        chunk_size: How many tangents to push through the model at a time; it bounds the memory. By default all, or half
            of them where tensors are large.
        seed: Seed of the noise of ``"sensitivity"``, and of the random transforms of ``metrics``.
        baseline: Whether to measure the untrained model too.
        on_error: What to do when the model cannot be measured: ``"warn"``, log NaN for this epoch and go on training
            (``EarlyStopping`` with ``check_finite=True`` stops at a NaN that it monitors), or ``"raise"``. A misuse
            that shows on the first images is always an error.
        prefix: First word of the keys. Each monitor in a Trainer must have its own.
        test: Whether to measure the test loaders too, in ``trainer.test()``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or names something unknown.

    Example:
        >>> import lie_metric as lm
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[lm.EquivarianceMonitor(("rotation", "scale"))], logger=False)

    """

    failure = "The equivariance of the model could not be measured"
    _loaders: list[LoaderMeasurements]

    def __init__(
        self,
        generators: str | Generator | Sequence[str | Generator] = ("translation", "rotation", "scale"),
        num_images: int = 256,
        every_n_epochs: int = 1,
        *,
        measures: Sequence[Measure] = ("relative", "lee"),
        displacement: float | None = 2.0,
        floor: bool = True,
        metrics: Sequence[ModelMetric] | Mapping[str, ModelMetric] = (),
        images: Callable[[Any], Any] | int | str | None = None,
        inputs: Callable[[Any], Any] | int | str | None = None,
        output: Literal["logits", "probabilities"] | Callable[[Any], Any] = "logits",
        function: Function | None = None,
        lee_output: Literal["auto", "output", "probabilities"] = "output",
        input_representation: Layout | None = None,
        output_representation: Layout | None = None,
        resampling: Resampling | None = None,
        method: Method = "auto",
        chunk_size: int | None = None,
        seed: int = 0,
        baseline: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        prefix: str = "equivariance",
        test: bool = False,
    ) -> None:
        if images is not None and inputs is not None:
            raise ValueError("`inputs` and `images` must not both be given: they are two names of one argument.")
        super().__init__(
            images=images if inputs is None else inputs,
            function=function,
            input_representation=input_representation,
            on_error=on_error,
            prefix=prefix,
            test=test,
        )
        _check_positive("num_images", num_images, "256 images give standard errors of some per cent.")
        _check_positive("every_n_epochs", every_n_epochs, "1 measures every epoch.")
        options = Options(output, function, input_representation, output_representation, resampling, method, chunk_size)
        self.program = Program(
            generators,
            options,
            measures=measures,
            displacement=displacement,
            floor=floor,
            metrics=metrics,
            lee_output=lee_output,
            seed=seed,
            prefix=prefix,
        )
        self.generators, self.metrics, self._keys = self.program.generators, self.program.metrics, self.program.keys
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.measures = self.program.measures
        self.resampling = options.stencil
        self.baseline = baseline
        self.displacement, self.floor = displacement, floor
        self._untrained = Untrained()
        self._forget()

    @override
    def words(self) -> set[str]:
        """The texts before the slash of the keys, those of tests aside."""
        families = {family for family, _ in self._keys.families().values()}
        return {self.prefix} | families | {f"{family}_se" for family in families}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses trainers under which nothing could be measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage about to begin.

        Raises:
            MisconfigurationException: If the strategy is DeepSpeed's, training has no validation, or another monitor
                writes the same keys.
        """
        self._forget()
        super().setup(trainer, pl_module, stage)
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
        families = self._keys.families()
        settings = {
            f"{self.prefix}_resampling": str(self.resampling),
            f"{self.prefix}_num_images": self.num_images,
        }
        for logger in trainer.loggers:
            if is_a(logger, "TensorBoardLogger"):
                monitors = [each for each in trainer.callbacks if isinstance(each, EquivarianceMonitor)]  # type: ignore[attr-defined]
                tensorboard.write_layout(logger, {each.prefix: each._keys.families() for each in monitors})
                tags = [f"{family}/{name}" for family, names in families.values() for name in names]
                tensorboard.write_hyperparameters(trainer, logger, settings, tags)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses empty validation loaders, which nothing before this hook complains about, and rehearses.

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
        self._untrained.wanted = self.baseline and trainer.global_step == 0
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the weights of the untrained model; every hook that may still set them has run.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._untrained.wanted and not self._untrained.is_kept:
            try:
                with unsharded(outermost(trainer, pl_module)):
                    self._untrained.keep(pl_module)
            except Exception as error:
                self._untrained.give_up(str(error))
            # Whether it is measured decides what processes exchange: all of them keep it, or none does.
            lacking = torch.tensor(float(not self._untrained.is_kept), device=pl_module.device)
            if trainer.strategy.reduce(lacking, reduce_op="sum") and self._untrained.is_kept:
                self._untrained.give_up("another process could not keep it")

    @override
    def measures_now(self, trainer: Trainer) -> bool:
        """Whether something is measured in this validation epoch.

        Args:
            trainer: The trainer.

        Returns:
            Whether it is.
        """
        return bool(self._loaders)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides whether this epoch is measured, and on which images.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._measuring = not self.skips(trainer, self.every_n_epochs)
        self._loaders = []
        count = max((trainer.current_epoch + 1) // self.every_n_epochs, 1)
        if self._measuring or self._untrained.is_kept:
            left_out = self.program.seldom(count) if is_fitting(trainer) else frozenset()
            curve = partial(self.program.measurement, pl_module.device, left_out)
            start = partial(self.program.measurement, pl_module.device)
            self._loaders = [
                LoaderMeasurements(
                    each, curve() if self._measuring else None, start() if self._untrained.is_kept else None
                )
                for each in measured_loaders(trainer)
            ]

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
        """Gathers the chosen images of the batch, and measures them when there are enough for a full batch.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What ``validation_step`` returned; not used.
            batch: The batch, on the module's device.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if not self._loaders or self._loaders[dataloader_idx].is_complete:
            return
        loader = self._loaders[dataloader_idx]
        try:
            images = inputs_of(batch, self.images, self._input_representation)
            count, batches = (
                sample_count(images, self._input_representation),
                number_of_batches(trainer, dataloader_idx),
            )
            if loader.gathering is None:
                share = Share.of(loader.loader, trainer, dataloader_idx, self.num_images, count)
                for measurement in loader.measurements:
                    measurement.strides = strides_of(len(share))
                loader.gathering = Gathering(share, max(1, count))
                if isinstance(self._input_representation, Mapping):
                    loader.gathering = WholeBatches(share, max(1, count), batches, self.num_images)
            if isinstance(loader.gathering, WholeBatches):
                ready = loader.gathering.add(images, count)
            else:
                ready = loader.gathering.add(images, batch_idx + 1 >= batches)
        except Exception as error:
            loader.fail(error)
            return
        for chosen, numbers in ready:
            self._measure(trainer, pl_module, loader, methodcaller("update", pl_module, chosen, numbers))

    def _measure(self, trainer: Trainer, pl_module: LightningModule, loader: LoaderMeasurements, measure: Step) -> None:
        # Failures are told when all processes meet at the end of the epoch: raising here would leave others waiting.
        try:
            with self.measuring(trainer, pl_module):
                loader.measure(pl_module, self._untrained, measure)
        except Exception as error:
            loader.fail(error)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up over processes and logs.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        super().on_validation_epoch_end(trainer, pl_module)
        for loader in self._loaders:
            self._measure(trainer, pl_module, loader, methodcaller("finish", pl_module))
        baseline = self._untrained.is_kept
        if baseline:
            self._untrained.forget()
            starts = [loader.start for loader in self._loaders]
            values = self._values(trainer, pl_module, starts)
            start = {key: value.item() for key, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics({**start, "epoch": 0}, step=0)
        if self._measuring:
            # Every process holds the same values: the mean over processes is no change, and asking for it keeps
            # Lightning from warning that values might differ.
            curves = [loader.curve for loader in self._loaders]
            values = self._values(trainer, pl_module, curves)
            pl_module.log_dict(values, sync_dist=True, batch_size=1, add_dataloader_idx=False)
        keep(trainer, pl_module, self.prefix, self.measures, self._loaders, baseline=baseline)
        self._measuring, self._loaders = False, []

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
        self._loaders, self._measuring = [], False
        self._untrained.forget()
        self.program.forget()

    def _values(
        self, trainer: Trainer, pl_module: LightningModule, measurements: Sequence[Measurement | None]
    ) -> dict[str, Tensor]:
        add_up = partial(trainer.strategy.reduce, reduce_op="sum")
        keys = self._keys.under(self.prefix_in(trainer))
        return keys.values(measurements, self._tell, pl_module.device, add_up)

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule, images: Any, dataloader_idx: int) -> str:
        """Measures images with every metric, and forgets the result.

        Args:
            trainer: The trainer.
            pl_module: The module.
            images: One image or more.
            dataloader_idx: Number of the loader that they are from.

        Returns:
            What is measured, as a line for the user.
        """
        measured = self.function_name(pl_module)

        def failed(name: str, error: Exception) -> None:
            if name in self.program.built_in:
                self.report(f"The companion {name!r} of `{self._name}` cannot be measured", error)
                return
            explained = self.explained(error, measured + (f" with the companion {name!r}" if name else ""))
            if explained is error:
                raise error
            raise explained from error

        local = self.program.rehearse(pl_module, images, pl_module.device, failed)
        loader = measured_loaders(trainer)[dataloader_idx]
        size = getattr(loader, "batch_size", None) or sample_count(images, self._input_representation)
        chosen = described(
            loader, trainer, dataloader_idx, self.num_images, size, isinstance(self._input_representation, Mapping)
        )
        return self.program.told(local, measured, chosen)

    def _tell(self, name: str, error: Exception | None) -> None:
        """Tells that a metric could not be read: the Lie derivatives, or the companion of this name."""
        companion = f"The companion {name!r} of `{self._name}` could not be measured"
        self.report(companion if name else self.failure, error)


def _check_positive(name: str, value: object, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. {advice}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}. {advice}")
