"""Running a model for a measurement without a trace."""

from lie_metric.running.draws import random_state, same_draws
from lie_metric.running.gradients import GraphsKept, gradients_as_needed
from lie_metric.running.isolation import evaluation, isolated
from lie_metric.running.modules import configuration, found_modules
from lie_metric.running.processes import add_up, process
from lie_metric.running.sharding import Unsharded, gather, is_sharded, unsharded
from lie_metric.running.shared import buffers_of_the_first, shared_buffers

__all__ = [
    "GraphsKept",
    "Unsharded",
    "add_up",
    "buffers_of_the_first",
    "configuration",
    "evaluation",
    "found_modules",
    "gather",
    "gradients_as_needed",
    "is_sharded",
    "isolated",
    "process",
    "random_state",
    "same_draws",
    "shared_buffers",
    "unsharded",
]
