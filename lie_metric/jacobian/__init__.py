"""Products with Jacobians. Nothing here knows images, symmetries or training."""

from lie_metric.jacobian.engine import Method, push

__all__ = ["Method", "push"]
