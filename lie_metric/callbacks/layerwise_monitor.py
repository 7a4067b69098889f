"""Which layers the equivariance error comes from, while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lie_metric import figures
from lie_metric.algebra import Generator
from lie_metric.binding import resolve_for
from lie_metric.callbacks.monitor import Function, Monitor
from lie_metric.callbacks.trainers import is_a, is_testing, step
from lie_metric.curves.batches import images_of
from lie_metric.functional.sums import standard_error, totals
from lie_metric.layerwise import LayerwiseReport, Probes, attributed, share, validate_probes
from lie_metric.options import Options
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling

__all__ = ["LayerwiseMonitor"]


class LayerwiseMonitor(Monitor):
    r"""Attributes the Lie derivative of the model under training to its layers, and logs how that changes.

    Every n-th validation epoch the first images of the first validation batch are measured with
    :func:`~lie_metric.layerwise_equivariance_error`. For each generator and type of operation (convolution, activation,
    normalisation, attention, down-sampling, patch embedding, head, ...) is logged

    ``layerwise_<generator>/<type>``
        Σ⟨c, L f⟩ / Σ‖L f‖², the signed share of the type's contribution c in the Lie derivative of the output, over the
        images of all processes. Shares add up to 1.
    ``layerwise_<generator>_se/<type>``
        Its standard error over images.
    ``layerwise_<generator>_squared_norm/<type>``
        With ``probes``, ‖c‖² / dim in squared output units per squared unit of t, the mean over processes; they
        do not add up to that of the model.

    In TensorBoard the tab Images shows the attribution, and a heat map of modules over epochs. Training, logged values
    and metrics are not changed, and a misuse shows before it begins, as with :class:`~lie_metric.EquivarianceMonitor`.
    In ``trainer.test()`` the test images are measured with ``test=True`` alone, under ``test_layerwise_<generator>``.

    Args:
        generators: Names, groups or :class:`~lie_metric.Generator` objects.
        num_images: How many images of the first batch are measured, on each process; shares of few images scatter, and
            standard errors say how much.
        every_n_epochs: Measure every n-th validation epoch of training.
        probes: As in :func:`~lie_metric.layerwise_equivariance_error`; None for shares alone.
        depth: Depth of the modules in the heat map.
        images: Where the images are in a batch, as in :class:`~lie_metric.EquivarianceMonitor`.
        output: As in :func:`~lie_metric.lie_derivative`.
        function: What is called, as in :class:`~lie_metric.EquivarianceMonitor`.
        input_representation: As in :func:`~lie_metric.lie_derivative`.
        output_representation: As in :func:`~lie_metric.lie_derivative`.
        resampling: The stencil; ``Resampling()`` by default.
        representations: Actions for hidden tensors by module path, as in
            :func:`~lie_metric.layerwise_equivariance_error`.
        on_error: ``"warn"``, log NaN and go on, or ``"raise"``; a misuse that shows on the first images is always an
            error.
        prefix: First word of the keys. Each monitor in a Trainer must have its own.
        test: Whether to measure the test loader too, in ``trainer.test()``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or names something unknown.

    Example:
        >>> import lie_metric as lm
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[lm.LayerwiseMonitor("rotation", every_n_epochs=5)], logger=False)
    """

    failure = "The model could not be attributed to its layers"

    def __init__(
        self,
        generators: str | Generator | Sequence[str | Generator] = ("translation_x", "rotation"),
        num_images: int = 8,
        every_n_epochs: int = 1,
        *,
        probes: Probes = None,
        depth: int = 2,
        images: Callable[[Any], Any] | int | str | None = None,
        output: Literal["logits", "probabilities"] | Callable[[Any], Any] = "logits",
        function: Function | None = None,
        input_representation: Representation | None = None,
        output_representation: Representation | None = None,
        resampling: Resampling | None = None,
        representations: Mapping[str, Representation] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        prefix: str = "layerwise",
        test: bool = False,
    ) -> None:
        super().__init__(
            images=images,
            function=function,
            input_representation=input_representation,
            on_error=on_error,
            prefix=prefix,
            test=test,
        )
        for name, value, least in (
            ("num_images", num_images, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("depth", depth, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        validate_probes(probes)
        if isinstance(input_representation, Mapping):
            raise TypeError(
                f"`input_representation` must be one representation for layers, got the parts "
                f"{list(input_representation)}. Attribute a module that takes one tensor, e.g. by `function=`."
            )
        self.generators = resolve_for(generators, input_representation)
        self.num_images, self.every_n_epochs, self.depth = num_images, every_n_epochs, depth
        self.resampling = resampling or Resampling()
        self._probes, self._representations = probes, representations
        self._options = Options(output, function, input_representation, output_representation, resampling)
        self._report: LayerwiseReport | None = None
        self._error: Exception | None = None
        self._kinds: list[str] = []
        self._history: dict[str, dict[int, dict[str, float]]] = {}

    @override
    def words(self) -> set[str]:
        """The texts before the slash of the keys, those of tests aside."""
        words = {_word(self.prefix, generator, kind) for generator in self.generators for kind in self._logged}
        return {self.prefix} | words

    @property
    def _logged(self) -> tuple[str, ...]:
        return ("", "_se") if self._probes is None else ("", "_se", "_squared_norm")

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule, images: Tensor, dataloader_idx: int) -> str:
        """Attributes images, and forgets the result.

        Args:
            trainer: The trainer.
            pl_module: The module.
            images: One image or more.
            dataloader_idx: Number of the loader that they are from.

        Returns:
            What is measured, as a line for the user.
        """
        measured = self.function_name(pl_module)
        if dataloader_idx == 0:
            try:
                self._attribute(pl_module, images)
            except Exception as error:
                explained = self.explained(error, measured)
                if explained is error:
                    raise
                raise explained from error
        which = "test" if is_testing(trainer) else "validation"
        return f"{measured}; stencil {self.resampling}; up to {self.num_images} images of the first {which} batch"

    @override
    def measures_now(self, trainer: Trainer) -> bool:
        """Whether layers are measured in this validation epoch.

        Args:
            trainer: The trainer.

        Returns:
            Whether they are.
        """
        return not self.skips(trainer, self.every_n_epochs)

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
        """Measures the first images of the first batch.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What ``validation_step`` returned; not used.
            batch: The batch, on the module's device.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if batch_idx or dataloader_idx or self.skips(trainer, self.every_n_epochs):
            return
        try:
            images = images_of(batch, self.images, self._name)
            with self.measuring(trainer, pl_module):
                self._report = self._attribute(pl_module, images[: self.num_images])
        except Exception as error:
            # All processes learn of it at the end of the epoch: raising here would leave the others waiting.
            self._error = error

    def _attribute(self, pl_module: LightningModule, images: Tensor) -> LayerwiseReport:
        return attributed(
            pl_module,
            images,
            self.generators,
            self._options,
            probes=self._probes,
            representations=self._representations,
        )

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the types, and on TensorBoard the pictures.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        super().on_validation_epoch_end(trainer, pl_module)
        if self.skips(trainer, self.every_n_epochs):
            return
        report, error = self._report, self._error
        self._report = self._error = None
        outcome = torch.tensor([float(report is None), float(error is not None)], device=pl_module.device)
        missing, failed = trainer.strategy.reduce(outcome, reduce_op="sum").tolist()
        if missing:
            self.report(self.failure, error if failed else RuntimeError("there was no batch"))
            report = None
        found = {} if report is None else self._measured(trainer, report)
        values = {
            f"{_word(self.prefix_in(trainer), generator, quantity)}/{kind}": found.get(
                (quantity, generator.name, kind), float("nan")
            )
            for generator in self.generators
            for quantity in self._logged
            for kind in self._kinds
        }
        pl_module.log_dict(values, sync_dist=True, batch_size=1)
        if report is not None and trainer.is_global_zero:
            if not is_testing(trainer):
                self._remember(report, trainer.current_epoch)
            self._draw(trainer, report)

    def _measured(self, trainer: Trainer, report: LayerwiseReport) -> dict[tuple[str, str, str], float]:
        """The values by quantity, generator and type; shares are of the images of all processes."""
        kinds, sums = report.sums("type", trainer.global_rank * self.num_images)
        self._kinds = self._kinds or kinds
        sums = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in sums.items()}
        found = {}
        for quantity, values in (("", share(totals(sums))), ("_se", standard_error(sums, share))):
            for kind, row in zip(kinds, values.tolist(), strict=True):
                for generator, value in zip(self.generators, row, strict=True):
                    found[quantity, generator.name, kind] = value
        for one in report.by("type"):
            if one.squared_norm is not None:
                found["_squared_norm", one.generator, one.name] = one.squared_norm
        return found

    def _remember(self, report: LayerwiseReport, epoch: int) -> None:
        for row in report.by("module", self.depth):
            self._history.setdefault(row.generator, {}).setdefault(epoch, {})[row.name] = row.share

    def _draw(self, trainer: Trainer, report: LayerwiseReport) -> None:
        boards: list[Any] = [logger for logger in trainer.loggers if is_a(logger, "TensorBoardLogger")]
        if not boards:
            return
        pictures = {f"{self.prefix_in(trainer)}/attribution": report.plot()}
        for generator, by_epoch in () if is_testing(trainer) else self._history.items():
            pictures[f"{self.prefix}/modules_{generator}"] = figures.modules_over_epochs(
                by_epoch, title=f"{generator}: share by module. Stencil: {report.stencil}"
            )
        for board in boards:
            for tag, picture in pictures.items():
                board.experiment.add_figure(tag, picture, global_step=step(trainer), close=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the heat maps have shown so far, so that they go on after a resume."""
        return {"history": self._history, "kinds": self._kinds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the heat maps of a checkpoint.

        Args:
            state_dict: What :meth:`state_dict` gave.
        """
        self._history, self._kinds = state_dict["history"], state_dict["kinds"]


def _word(prefix: str, generator: Generator, quantity: str) -> str:
    return f"{prefix}_{generator.name}{quantity}"
