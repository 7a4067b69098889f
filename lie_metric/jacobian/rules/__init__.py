"""Tangents of operations by kind; a rule takes an operation of ATen, its arguments and its keyword arguments."""

from lie_metric.jacobian.rules import table  # noqa: F401  # fills the tables of what carries tangents

__all__: list[str] = []
