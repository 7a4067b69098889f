"""Equivariance curves while you train: Lie derivatives of vision models."""

from lie_metric import figures, functional, lattice, representations, testing, transforms
from lie_metric.algebra import Generator, generators
from lie_metric.callbacks import EquivarianceMonitor, LayerwiseMonitor
from lie_metric.derivative import lie_derivative
from lie_metric.layerwise import LayerwiseReport, layerwise_equivariance_error
from lie_metric.metrics import LocalEquivarianceError
from lie_metric.resampling import PAPER, Resampling

__all__ = [
    "PAPER",
    "EquivarianceMonitor",
    "Generator",
    "LayerwiseMonitor",
    "LayerwiseReport",
    "LocalEquivarianceError",
    "Resampling",
    "figures",
    "functional",
    "generators",
    "lattice",
    "layerwise_equivariance_error",
    "lie_derivative",
    "representations",
    "testing",
    "transforms",
]
