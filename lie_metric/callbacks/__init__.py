"""Lightning callbacks."""

from lie_metric.callbacks.equivariance_monitor import EquivarianceMonitor

__all__ = ["EquivarianceMonitor"]
