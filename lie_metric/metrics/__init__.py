"""Measures of equivariance as torchmetrics classes."""

from lie_metric.metrics.band_limited import BandLimitedEquivariance
from lie_metric.metrics.conservation import ConservationError
from lie_metric.metrics.finite_transforms import (
    FiniteEquivarianceError,
    LatticeEquivarianceError,
    OrbitVariance,
    PredictionConsistency,
    RelaxedEquivarianceError,
)
from lie_metric.metrics.local_equivariance import LocalEquivarianceError
from lie_metric.metrics.stability import RelativeStability
from lie_metric.metrics.stencil_error import StencilError

__all__ = [
    "BandLimitedEquivariance",
    "ConservationError",
    "FiniteEquivarianceError",
    "LatticeEquivarianceError",
    "LocalEquivarianceError",
    "OrbitVariance",
    "PredictionConsistency",
    "RelativeStability",
    "RelaxedEquivarianceError",
    "StencilError",
]
