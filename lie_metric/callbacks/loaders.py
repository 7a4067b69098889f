"""What is measured of each validation loader in one epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lie_metric.callbacks.baseline import Untrained
from lie_metric.callbacks.selection import Gathering, WholeBatches
from lie_metric.curves.measurements import Measurement

__all__ = ["LoaderMeasurements", "Step"]

Step = Callable[[Measurement], None]


@dataclass
class LoaderMeasurements:
    """A validation loader in one epoch: its chosen images, and what is made of them."""

    loader: Any
    curve: Measurement | None
    start: Measurement | None
    gathering: Gathering | WholeBatches | None = None

    @property
    def measurements(self) -> list[Measurement]:
        """Those that are made in this epoch."""
        return [measurement for measurement in (self.curve, self.start) if measurement is not None]

    @property
    def is_complete(self) -> bool:
        """Whether no further batch is to be measured."""
        failed = all(set(measurement.errors) == set(measurement.metrics) for measurement in self.measurements)
        return failed or (self.gathering is not None and self.gathering.is_complete)

    def measure(self, module: torch.nn.Module, untrained: Untrained, measure: Step) -> None:
        """Measures with the weights as they are, and with the untrained ones as long as there are any.

        Args:
            module: The module.
            untrained: The untrained weights.
            measure: What is done with each measurement.
        """
        if self.curve is not None:
            measure(self.curve)
        if self.start is not None and untrained.is_kept:
            untrained.measure(module, self.start, partial(measure, self.start))

    def fail(self, error: Exception) -> None:
        """Takes note that nothing of this epoch can be measured.

        Args:
            error: Why.
        """
        for measurement in self.measurements:
            measurement.errors = dict.fromkeys(measurement.metrics, error)
