"""Measures of equivariance as pure functions."""

from lie_metric.functional.band_limited import eq_r, eq_t, eq_t_frac
from lie_metric.functional.conservation import conservation_error
from lie_metric.functional.finite_transforms import (
    finite_equivariance_error,
    lattice_equivariance_error,
    orbit_variance,
    prediction_consistency,
    relaxed_equivariance_error,
)
from lie_metric.functional.local_equivariance import gram, lee, principal_directions, relative, rms, sensitivity
from lie_metric.functional.noise_floor import below_floor, noise_floor
from lie_metric.functional.penalty import equivariance_penalty
from lie_metric.functional.stability import relative_stability
from lie_metric.functional.stencil_error import stencil_error

__all__ = [
    "below_floor",
    "conservation_error",
    "eq_r",
    "eq_t",
    "eq_t_frac",
    "equivariance_penalty",
    "finite_equivariance_error",
    "gram",
    "lattice_equivariance_error",
    "lee",
    "noise_floor",
    "orbit_variance",
    "prediction_consistency",
    "principal_directions",
    "relative",
    "relative_stability",
    "relaxed_equivariance_error",
    "rms",
    "sensitivity",
    "stencil_error",
]
