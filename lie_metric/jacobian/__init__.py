"""Products with Jacobians. Nothing here knows images, symmetries or training."""

from lie_metric.jacobian.engine import Method, Products, push
from lie_metric.jacobian.verdicts import Check

__all__ = ["Check", "Method", "Products", "push"]
