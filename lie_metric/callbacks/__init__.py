"""Lightning callbacks."""

from lie_metric.callbacks.equivariance_monitor import EquivarianceMonitor
from lie_metric.callbacks.layerwise_monitor import LayerwiseMonitor

__all__ = ["EquivarianceMonitor", "LayerwiseMonitor"]
