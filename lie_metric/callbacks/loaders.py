"""What is measured of each validation loader in one epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lie_metric.callbacks.selection import Gathering, WholeBatches
from lie_metric.curves.measurements import Measurement

__all__ = ["LoaderMeasurements"]


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
