"""Measures of equivariance as torchmetrics classes."""

from lie_metric.metrics.finite_transforms import (
    FiniteEquivarianceError,
    LatticeEquivarianceError,
    OrbitVariance,
    PredictionConsistency,
    RelaxedEquivarianceError,
)
from lie_metric.metrics.local_equivariance import LocalEquivarianceError

__all__ = [
    "FiniteEquivarianceError",
    "LatticeEquivarianceError",
    "LocalEquivarianceError",
    "OrbitVariance",
    "PredictionConsistency",
    "RelaxedEquivarianceError",
]
