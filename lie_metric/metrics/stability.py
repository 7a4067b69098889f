"""Relative stability as a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lie_metric.functional.stability import (
    NAMES,
    stability_compute,
    stability_statistic,
    stability_update,
    stability_validate,
)
from lie_metric.functional.sums import MOMENTS, Sums
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Function, Options, Output
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling

__all__ = ["RelativeStability"]


class RelativeStability(ModelMetric):
    """The response to smooth deformations over that to noise of the same norm (Petrini et al. 2021).

    See :func:`lie_metric.functional.relative_stability`. Three passes over the model.

    Args:
        displacement: Root mean square length of the deformation in pixels.
        cut: Highest frequency of the deformation, in half waves along a side.
        output: See :func:`~lie_metric.lie_derivative`.
        function: See :func:`~lie_metric.lie_derivative`.
        input_representation: See :func:`~lie_metric.lie_derivative`; it must have a method ``map``.
        output_representation: See :func:`~lie_metric.lie_derivative`; it must have a method ``map``.
        resampling: The stencil; the default is ``Resampling()``.
        seed: Fixes deformations and noise.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> metric = RelativeStability()
        >>> metric.update(lambda x: x, torch.rand(4, 1, 16, 16))
        >>> metric.compute()["relative_stability"].item()
        0.0
    """

    measure = "relative_stability"
    own: ClassVar[tuple[str, ...]] = ("displacement", "cut", "seed")

    def __init__(
        self,
        displacement: float = 1.0,
        cut: int = 3,
        *,
        output: Output = "logits",
        function: Function | None = None,
        input_representation: Representation | None = None,
        output_representation: Representation | None = None,
        resampling: Resampling | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = Options(output, function, input_representation, output_representation, resampling)
        stability_validate(displacement, cut, seed)
        super().__init__({"deformed": (), "noisy": ()} | MOMENTS, options, **kwargs)
        self.displacement = displacement
        self.cut = cut
        self.seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The three numbers, in the order of all results."""
        return NAMES

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """The measure as a function of the sums."""
        return {self.measure: stability_statistic}

    def update(self, model: Callable[..., Any], images: Tensor, groups: Sequence[int] | Tensor | None = None) -> None:
        """Adds a batch of images.

        Args:
            model: A module or callable, see :func:`~lie_metric.lie_derivative`.
            images: Shape (B, C, H, W), floating point and finite.
            groups: For each image an integer, alike for those that belong together, such as crops of one photo: the
                jackknife leaves them out as one, by the number modulo 64. By default images are independent.
        """
        indices = self._indices(images, groups)
        sums, described = stability_update(model, images, self.options, indices=indices, **self._own())
        self._add(images, indices, sums, described)

    def compute(self) -> dict[str, Tensor]:
        """R_f, D_f and G_f.

        Returns:
            Under "relative_stability", "deformation" and "noise" a float64 number each.
        """
        return stability_compute(self._sums())

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images of each number.

        Returns:
            For each name a number; NaN for fewer than two images.
        """
        return dict(zip(NAMES, self._errors(stability_statistic).unbind(-1), strict=True))
