"""Conservation along a model's flow as a torchmetrics Metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lie_metric.functional.conservation import Quantity, conservation_update, conservation_validate
from lie_metric.functional.local_statistics import local_equivariance_compute, relative_of
from lie_metric.functional.sums import MOMENTS, Sums
from lie_metric.jacobian import Check, Method
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Function, Options, Output

__all__ = ["ConservationError"]


class ConservationError(ModelMetric):
    r"""How fast quantities change along a model's own flow, in their standard deviations per unit of time.

    See :func:`lie_metric.functional.conservation_error`. For any vector field: Hamiltonian networks, neural ODEs,
    simulators. As a companion of :class:`~lie_metric.EquivarianceMonitor` it is measured on the same states.

    Args:
        quantities: By name a function from states (B, ...) to one number for each, (B,) or (B, 1).
        output: What of the model's return value is the rate of change, see :func:`~lie_metric.lie_derivative`.
        function: What of the model is run, see :func:`~lie_metric.lie_derivative`.
        method: See :func:`~lie_metric.lie_derivative`; how the quantities are differentiated.
        chunk_size: See :func:`~lie_metric.lie_derivative`.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> turning = lambda z: torch.stack([z[:, 1], -z[:, 0]], dim=1)
        >>> metric = ConservationError({"radius": lambda z: z.norm(dim=1), "x": lambda z: z[:, 0]})
        >>> metric.update(turning, torch.randn(64, 2, dtype=torch.float64))
        >>> {name: bool(value > 1e-12) for name, value in metric.compute().items()}
        {'radius': False, 'x': True}
    """

    measure = "conservation_error"
    own: ClassVar[tuple[str, ...]] = ("quantities",)

    def __init__(
        self,
        quantities: Mapping[str, Quantity],
        *,
        output: Output = "logits",
        function: Function | None = None,
        method: Method = "auto",
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        options = Options(output, function, method=method, chunk_size=chunk_size)
        named = conservation_validate(quantities)
        parts = (len(named),)
        shapes: dict[str, tuple[int, ...]] = {"gram": (*parts, 1, 1), "violation": (*parts, 1), "noise": (*parts, 1)}
        shapes |= {name: (*parts, *shape) for name, shape in MOMENTS.items()} | {"energy": (1, 1)}
        super().__init__(shapes, options, **kwargs)
        self.quantities = named
        self.check: Check | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The quantities' names, in the order of all results."""
        return tuple(self.quantities)

    @property
    def parameter_units(self) -> tuple[str, ...]:
        """For each quantity the unit of time."""
        return ("unit of time",) * len(self.names)

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """The measure as a function of the sums."""
        return {self.measure: relative_of}

    def update(self, model: Callable[..., Any], images: Tensor, groups: Sequence[int] | Tensor | None = None) -> None:
        """Adds a batch of states.

        Args:
            model: A module or callable from states to their rates of change.
            images: The states, shape (B, ...), floating point and finite.
            groups: For each state an integer, alike for those that belong together, such as states of one trajectory.

        Raises:
            ValueError: If the model returns another shape than that of the states, or a quantity more than a number.
        """
        indices = self._indices(images, groups)
        sums, result = conservation_update(model, images, self.options, indices=indices, **self._own())
        self.check = result.check
        self._add(images, indices, sums, f"{', '.join(self.names)} along {tuple(images.shape[1:])} states")

    def compute(self) -> dict[str, Tensor]:
        """The change of each quantity, in standard deviations per unit of time.

        Returns:
            For each quantity's name a float64 number of no axes.
        """
        return local_equivariance_compute(self._sums(), "relative", self.names)

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over states, in the same units.

        Returns:
            For each quantity's name a number; NaN for fewer than two states.
        """
        return dict(zip(self.names, self._errors(relative_of).unbind(), strict=True))
