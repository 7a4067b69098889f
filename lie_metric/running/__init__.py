"""Running a model for a measurement without a trace."""

from lie_metric.running.draws import random_state, same_draws
from lie_metric.running.isolation import evaluation, isolated

__all__ = ["evaluation", "isolated", "random_state", "same_draws"]
