"""Running a model for a measurement without a trace."""

from lie_metric.running.isolation import evaluation, isolated, random_state

__all__ = ["evaluation", "isolated", "random_state"]
