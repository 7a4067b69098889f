"""The Lie derivative of a model taken apart: recorded calls, how hidden tensors move, what flows, and the report."""

from lie_metric.attribution.flows import contributions
from lie_metric.attribution.graph import Flow, Operation, Variable
from lie_metric.attribution.recording import Recorder, recorded
from lie_metric.attribution.report import Contribution, Granularity, LayerwiseReport, share

__all__ = [
    "Contribution",
    "Flow",
    "Granularity",
    "LayerwiseReport",
    "Operation",
    "Recorder",
    "Variable",
    "contributions",
    "recorded",
    "share",
]
