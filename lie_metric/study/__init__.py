"""A study over many models: measured one by one, resumable, over as many machines as there are, and its report."""

from lie_metric.study.models import ModelSpec, resolve_models
from lie_metric.study.report import spearman, write_report
from lie_metric.study.run import run_study
from lie_metric.study.settings import Framing, Settings
from lie_metric.study.store import StudyError, read_layers, read_records, read_rows

__all__ = [
    "Framing",
    "ModelSpec",
    "Settings",
    "StudyError",
    "read_layers",
    "read_records",
    "read_rows",
    "resolve_models",
    "run_study",
    "spearman",
    "write_report",
]
