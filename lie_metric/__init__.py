"""Equivariance curves while you train: Lie derivatives of models."""

from lie_metric import figures, functional, lattice, orbits, representations, testing, transforms
from lie_metric.algebra import Generator, generators
from lie_metric.callbacks import EquivarianceMonitor, LayerwiseMonitor
from lie_metric.compare import compare
from lie_metric.functional import equivariance_penalty
from lie_metric.layerwise import LayerwiseReport, layerwise_equivariance_error
from lie_metric.lie import lie_derivative
from lie_metric.metrics import (
    BandLimitedEquivariance,
    ConservationError,
    FiniteEquivarianceError,
    LatticeEquivarianceError,
    LocalEquivarianceError,
    OrbitVariance,
    PredictionConsistency,
    RelativeStability,
    RelaxedEquivarianceError,
    StencilError,
)
from lie_metric.recorder import Recorder
from lie_metric.resampling import PAPER, Resampling
from lie_metric.running import unsharded
from lie_metric.runs import read_record, read_runs
from lie_metric.version import __version__

__all__ = [
    "PAPER",
    "BandLimitedEquivariance",
    "ConservationError",
    "EquivarianceMonitor",
    "FiniteEquivarianceError",
    "Generator",
    "LatticeEquivarianceError",
    "LayerwiseMonitor",
    "LayerwiseReport",
    "LocalEquivarianceError",
    "OrbitVariance",
    "PredictionConsistency",
    "Recorder",
    "RelativeStability",
    "RelaxedEquivarianceError",
    "Resampling",
    "StencilError",
    "__version__",
    "compare",
    "equivariance_penalty",
    "figures",
    "functional",
    "generators",
    "lattice",
    "layerwise_equivariance_error",
    "lie_derivative",
    "orbits",
    "read_record",
    "read_runs",
    "representations",
    "testing",
    "transforms",
    "unsharded",
]
