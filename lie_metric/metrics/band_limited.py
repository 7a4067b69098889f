"""EQ-T, EQ-T_frac and EQ-R as a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lie_metric.functional.band_limited import (
    BandLimited,
    band_limited_compute,
    band_limited_statistic,
    band_limited_update,
    band_limited_validate,
)
from lie_metric.functional.sums import Sums
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Function, Options, Output
from lie_metric.representations import Representation

__all__ = ["BandLimitedEquivariance"]


class BandLimitedEquivariance(ModelMetric):
    """Equivariance to band-limited shifts and rotations in decibels (Karras et al. 2021); larger is better.

    See :func:`lie_metric.functional.eq_t`, ``eq_t_frac`` and ``eq_r``. For invariant outputs, without a ``data_range``,
    the mean squares that these return, of which smaller is better. Each kind costs one pass over the model, and one
    more serves all.

    Args:
        data_range: Width of the interval of the output's values; None for invariant outputs.
        kinds: Some of "eq_t", "eq_t_frac", "eq_r".
        max_shift: Largest shift, as a part of each side.
        output: See :func:`~lie_metric.lie_derivative`.
        function: See :func:`~lie_metric.lie_derivative`.
        input_representation: See :func:`~lie_metric.lie_derivative`; it must have a method ``map``.
        output_representation: See :func:`~lie_metric.lie_derivative`; it must have a method ``map``.
        seed: Fixes the shifts and angles.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> metric = BandLimitedEquivariance(data_range=1.0, kinds=["eq_t"])
        >>> metric.update(lambda x: x, torch.rand(2, 1, 16, 16))
        >>> metric.compute()["eq_t"].item()
        inf
    """

    measure = "band_limited_equivariance"
    higher_is_better = None
    plot_lower_bound = None
    own: ClassVar[tuple[str, ...]] = ("data_range", "max_shift", "seed")

    def __init__(
        self,
        data_range: float | None = None,
        kinds: Sequence[BandLimited] = ("eq_t", "eq_t_frac", "eq_r"),
        *,
        max_shift: float = 0.125,
        output: Output = "logits",
        function: Function | None = None,
        input_representation: Representation | None = None,
        output_representation: Representation | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = Options(output, function, input_representation, output_representation)
        asked = band_limited_validate(kinds, data_range, max_shift, seed)
        super().__init__({"error": (len(asked),), "count": (len(asked),)}, options, **kwargs)
        self.kinds = asked
        self.data_range = data_range
        self.max_shift = max_shift
        self.seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds, in the order of all results."""
        return self.kinds

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """The measure as a function of the sums."""
        return {self.measure: band_limited_statistic(self.data_range)}

    @property
    def decibels(self) -> bool:
        """Whether values are decibels: for images, not for invariant outputs."""
        return self.data_range is not None

    def update(self, model: Callable[..., Any], images: Tensor, groups: Sequence[int] | Tensor | None = None) -> None:
        """Adds a batch of images.

        Args:
            model: A module or callable, see :func:`~lie_metric.lie_derivative`.
            images: Shape (B, C, H, W), floating point and finite.
            groups: For each image an integer, alike for those that belong together, such as crops of one photo: the
                jackknife leaves them out as one, by the number modulo 64. By default images are independent.
        """
        indices = self._indices(images, groups)
        sums, described = band_limited_update(
            model, images, self.options, kinds=self.kinds, indices=indices, **self._own()
        )
        self._add(images, indices, sums, described)

    def compute(self) -> dict[str, Tensor]:
        """Each kind in dB, or as a mean square for invariant outputs.

        Returns:
            For each kind a float64 number of no axes.
        """
        return band_limited_compute(self._sums(), self.kinds, self.data_range)

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images of each value, in its units.

        Returns:
            For each kind a number; NaN for fewer than two images, or an infinite value.
        """
        return dict(zip(self.kinds, self._errors(band_limited_statistic(self.data_range)).unbind(), strict=True))
