"""Curves of a model under training, whatever trains it: what is measured, under which keys, and what files keep."""

from lie_metric.curves.companions import beside, by_name
from lie_metric.curves.files import append, entries_of
from lie_metric.curves.keys import Keys
from lie_metric.curves.measurements import Measurement, strides_of
from lie_metric.curves.program import Program
from lie_metric.curves.samples import chosen_samples, spread

__all__ = [
    "Keys",
    "Measurement",
    "Program",
    "append",
    "beside",
    "by_name",
    "chosen_samples",
    "entries_of",
    "spread",
    "strides_of",
]
