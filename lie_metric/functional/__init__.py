"""Measures of equivariance as pure functions."""

from lie_metric.functional.local_equivariance import gram, lee, principal_directions, relative, sensitivity

__all__ = ["gram", "lee", "principal_directions", "relative", "sensitivity"]
