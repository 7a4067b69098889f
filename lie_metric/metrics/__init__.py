"""Measures of equivariance as torchmetrics classes."""

from lie_metric.metrics.local_equivariance import LocalEquivarianceError

__all__ = ["LocalEquivarianceError"]
