"""What is measured of some images under one set of weights, and of how many of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lie_metric.metrics import LocalEquivarianceError, StencilError
from lie_metric.metrics.base import ModelMetric

__all__ = ["Measurement", "strides_of"]


@dataclass
class Measurement:
    """The metrics of a loader's images under one set of weights."""

    metrics: dict[str, ModelMetric]
    images: int = 0
    errors: dict[str, Exception] = field(default_factory=dict, repr=False)
    strides: Mapping[str, int] = field(default_factory=dict)
    _waiting: dict[tuple[str, torch.Size, torch.dtype], tuple[list[Tensor], list[int]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def local(self) -> LocalEquivarianceError:
        """The Lie derivatives."""
        found = self.metrics[""]
        assert isinstance(found, LocalEquivarianceError)
        return found

    def update(self, model: Any, images: Any, numbers: list[int]) -> None:
        """Adds images; a metric that fails takes no more, and the others go on.

        What is measured on some of the images waits until these are as many as a batch, or :meth:`finish`.
        """
        for name in self.metrics:
            stride = self.strides.get(name, 1)
            if stride == 1 or not isinstance(images, Tensor):
                self._measure(name, model, images, numbers)
                continue
            chosen = [row for row, number in enumerate(numbers) if number % stride == 0]
            parts, waiting = self._waiting.setdefault((name, images.shape[1:], images.dtype), ([], []))
            parts.append(images[chosen])
            waiting += [numbers[row] for row in chosen]
            if len(waiting) >= len(images):
                self._measure(name, model, torch.cat(parts), list(waiting))
                parts.clear()
                waiting.clear()
        self.images += sum(number >= 0 for number in numbers)

    def finish(self, model: Any) -> None:
        """Measures what still waits."""
        waiting, self._waiting = self._waiting, {}
        for (name, *_), (parts, numbers) in waiting.items():
            if numbers:
                self._measure(name, model, torch.cat(parts), numbers)

    def _measure(self, name: str, model: Any, images: Any, numbers: list[int]) -> None:
        if name in self.errors:
            return
        metric = self.metrics[name]
        try:
            if isinstance(metric, StencilError):
                metric.trust(self.local.method_used)
            metric.numbers = numbers
            metric.update(model, images)
        except Exception as error:
            self.errors[name] = error


def strides_of(count: int) -> dict[str, int]:
    """Every how many-th image is measured by what stands beside: a power of two, which leaves sixteen if it can be."""
    most = 1 << (max(count // 16, 1).bit_length() - 1)
    return {name: min(stride, most) for name, stride in (("finite", 4), ("linearity", 8), ("floor", 16))}
