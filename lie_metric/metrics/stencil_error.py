"""The stencil's own error on a model and images as a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lie_metric.figures import unit_of
from lie_metric.functional.stencil_error import (
    stencil_error_compute,
    stencil_error_statistic,
    stencil_error_update,
    stencil_error_validate,
)
from lie_metric.functional.sums import MOMENTS, Sums
from lie_metric.jacobian import Method
from lie_metric.lie import Generators
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Function, Options, Output
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling

__all__ = ["StencilError"]


class StencilError(ModelMetric):
    """What two stencils make of the same images and the same model: the floor under ``relative``, in its units.

    See :func:`lie_metric.functional.stencil_error`. One pass, with as many tangents as there are generators.

    Args:
        generators: See :func:`~lie_metric.lie_derivative`.
        output: See :func:`~lie_metric.lie_derivative`.
        function: See :func:`~lie_metric.lie_derivative`.
        input_representation: See :func:`~lie_metric.lie_derivative`.
        output_representation: See :func:`~lie_metric.lie_derivative`.
        resampling: The stencil whose error it is; the default is ``Resampling()``.
        method: See :func:`~lie_metric.lie_derivative`.
        chunk_size: See :func:`~lie_metric.lie_derivative`.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = StencilError("rotation")
        >>> metric.update(lambda x: x.mean((2, 3)), torch.rand(4, 1, 16, 16))
        >>> bool(metric.compute()["rotation"] > 0)
        True
    """

    measure = "stencil_error"
    own: ClassVar[tuple[str, ...]] = ("generators",)

    def __init__(
        self,
        generators: Generators = "affine",
        *,
        output: Output = "logits",
        function: Function | None = None,
        input_representation: Representation | None = None,
        output_representation: Representation | None = None,
        resampling: Resampling | None = None,
        method: Method = "auto",
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        options = Options(output, function, input_representation, output_representation, resampling, method, chunk_size)
        asked = stencil_error_validate(generators, options)
        super().__init__({"error": (len(asked),)} | MOMENTS, options, **kwargs)
        self.generators = asked
        self._trusted: str | None = None

    def trust(self, method: str | None) -> None:
        """Differentiates by a method that was found to be right for the model just now, and does not check it again.

        Args:
            method: The ``method_used`` of a metric that has measured the same model; None to check.
        """
        self._trusted = method

    @property
    def names(self) -> tuple[str, ...]:
        """The generators' names, in the order of all results."""
        return tuple(generator.name for generator in self.generators)

    @property
    def parameter_units(self) -> tuple[str, ...]:
        """For each generator the unit of t."""
        return tuple(unit_of(name) for name in self.names)

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """The measure as a function of the sums."""
        return {self.measure: stencil_error_statistic}

    def update(self, model: Callable[..., Any], images: Tensor, groups: Sequence[int] | Tensor | None = None) -> None:
        """Adds a batch of images.

        Args:
            model: A module or callable, see :func:`~lie_metric.lie_derivative`.
            images: Shape (B, C, H, W), floating point and finite.
            groups: See :meth:`lie_metric.LocalEquivarianceError.update`.

        Raises:
            ValueError: If the outputs have another width than before.
        """
        indices = self._indices(images, groups)
        sums, described = stencil_error_update(
            model, images, self.options, indices=indices, known=self._trusted, **self._own()
        )
        self._add(images, indices, sums, described)

    def compute(self) -> dict[str, Tensor]:
        """The error of each generator, in output standard deviations per unit of t.

        Returns:
            For each generator's name a float64 number of no axes.
        """
        return stencil_error_compute(self._sums(), self.names)

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images, in the same units.

        Returns:
            For each generator's name a number; NaN for fewer than two images.
        """
        return dict(zip(self.names, self._errors(stencil_error_statistic).unbind(), strict=True))
