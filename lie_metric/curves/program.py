"""What is measured of a model again and again while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch

from lie_metric.binding import Generators, on_grid, resolve_for
from lie_metric.curves.companions import beside, by_name
from lie_metric.curves.keys import Keys
from lie_metric.curves.measurements import Measurement
from lie_metric.functional.local_equivariance import LeeOutput, Measure
from lie_metric.metrics import LocalEquivarianceError
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Options

__all__ = ["Program"]


class Program:
    """The Lie derivatives of some generators, what stands beside them, and the keys under which all of it is logged.

    Args:
        generators: As of :class:`~lie_metric.EquivarianceMonitor`.
        options: What of a model is measured and how.
        measures: As of :class:`~lie_metric.EquivarianceMonitor`.
        displacement: As of :class:`~lie_metric.EquivarianceMonitor`.
        floor: As of :class:`~lie_metric.EquivarianceMonitor`.
        metrics: As of :class:`~lie_metric.EquivarianceMonitor`.
        lee_output: As of :class:`~lie_metric.EquivarianceMonitor`.
        seed: As of :class:`~lie_metric.EquivarianceMonitor`.
        prefix: First word of the keys.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Attributes:
        generators: The generators.
        built_in: Names of the companions that stand beside by default.
        metrics: All companions by name, without images.
        keys: The keys.
    """

    def __init__(
        self,
        generators: Generators,
        options: Options,
        *,
        measures: Sequence[Measure],
        displacement: float | None,
        floor: bool,
        metrics: Sequence[ModelMetric] | Mapping[str, ModelMetric],
        lee_output: LeeOutput,
        seed: int,
        prefix: str,
    ) -> None:
        if isinstance(measures, str) or not measures or not set(measures) <= set(get_args(Measure)):
            raise ValueError(f"`measures` must be a sequence of some of {get_args(Measure)}, got {measures!r}.")
        self.options, self.measures = options, tuple(measures)
        layout = options.input_representation
        self.generators = resolve_for(generators, layout)
        self._lee_output, self._seed = lee_output, seed
        self._checked: LocalEquivarianceError | None = None
        self._local()  # refuses bad options now rather than after the first epoch
        built_in = beside(self.generators, layout, displacement, floor)
        self.built_in = frozenset(built_in)
        shared: dict[str, Any] = {
            "output": options.output,
            "input_representation": layout,
            "output_representation": options.output_representation,
            "resampling": options.stencil,
            "seed": seed,
        } | ({} if options.function is None else {"function": options.function})
        self.metrics = {name: metric.inheriting(**shared) for name, metric in (built_in | by_name(metrics)).items()}
        self.keys = Keys(
            prefix,
            self.measures,
            self.generators,
            options.output_representation,
            self.metrics,
            self.built_in,
            displacement,
        )

    def _local(self) -> LocalEquivarianceError:
        options = self.options
        return LocalEquivarianceError(
            self.generators,
            output=options.output,
            function=options.function,
            lee_output=self._lee_output,
            input_representation=options.input_representation,
            output_representation=options.output_representation,
            resampling=options.stencil,
            method=options.method,  # type: ignore[arg-type]
            chunk_size=options.chunk_size,
            with_noise="sensitivity" in self.measures,
            seed=self._seed,
        )

    def seldom(self, count: int) -> frozenset[str]:
        """What is left out of a measurement: linearity and floor but in the first, second, fourth, eighth, ...

        Args:
            count: The number of the measurement, from 1.

        Returns:
            Names of companions.
        """
        return frozenset() if count & (count - 1) == 0 else self.built_in & {"linearity", "floor"}

    def measurement(self, device: torch.device, without: frozenset[str] = frozenset()) -> Measurement:
        """Empty metrics, the Lie derivatives under no name and the companions under theirs.

        Args:
            device: That of the model.
            without: Companions that are left out.

        Returns:
            The measurement.
        """
        local = self._local()
        if self._checked is not None:
            local.expect(self._checked)
        found: dict[str, ModelMetric] = {"": local}
        found |= {name: metric.inheriting() for name, metric in self.metrics.items() if name not in without}
        # The sums are float64, which MPS has not: there they stay in main memory.
        if device.type != "mps":
            found = {name: metric.to(device) for name, metric in found.items()}
        return Measurement(found)

    def rehearse(
        self, model: Any, inputs: Any, device: torch.device, failed: Callable[[str, Exception], None]
    ) -> LocalEquivarianceError:
        """Measures inputs and forgets the values; the method that was right is tried first from now on.

        Args:
            model: The model.
            inputs: A few samples.
            device: That of the model.
            failed: Takes the name of a metric that failed, and why. It raises, or the metric is passed over.

        Returns:
            The Lie derivatives.
        """
        metrics = self.measurement(device).metrics
        for name, metric in metrics.items():
            try:
                metric.update(model, inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failed(name, error)
        local = metrics[""]
        assert isinstance(local, LocalEquivarianceError)
        self._checked = local
        return local

    def told(self, local: LocalEquivarianceError, measured: str, chosen: str) -> str:
        """What is measured, as a line for the user.

        Args:
            local: The Lie derivatives of a few samples.
            measured: What of the model is run.
            chosen: On how many samples.

        Returns:
            The line.
        """
        parts = [
            f"{measured}: output {local.described or 'as declared'}",
            f"method {local.check}" if local.check else f"method {local.method_used}",
            *([f"stencil {self.options.stencil}"] if on_grid(self.options.input_representation) else []),
            chosen,
        ]
        return "; ".join(parts)

    def forget(self) -> None:
        """Frees what was found out about a model."""
        self._checked = None
