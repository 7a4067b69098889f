"""Measures of equivariance as pure functions."""

from lie_metric.functional.local_equivariance import gram, lee, principal_directions, relative, sensitivity
from lie_metric.functional.noise_floor import below_floor, noise_floor

__all__ = ["below_floor", "gram", "lee", "noise_floor", "principal_directions", "relative", "sensitivity"]
