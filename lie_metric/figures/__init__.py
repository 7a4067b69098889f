"""Every picture: curves over epochs, regimes against generators, contributions along a network."""

from lie_metric.figures.comparisons import comparison, heat_map
from lie_metric.figures.curves import Curve, equivariance_curves, error_curves, regime_panels
from lie_metric.figures.fields import vector_field
from lie_metric.figures.layers import layerwise, modules_over_epochs
from lie_metric.figures.units import UNITS, unit_of

__all__ = [
    "UNITS",
    "Curve",
    "comparison",
    "equivariance_curves",
    "error_curves",
    "heat_map",
    "layerwise",
    "modules_over_epochs",
    "regime_panels",
    "unit_of",
    "vector_field",
]
