"""Generators of one-parameter groups, and their linear algebra.

Affine maps of the line, the plane, space or any other dimension and projective maps of the plane act on coordinates;
intensities and other named charges stand for what moves no coordinates. Every generator is a vector of numbers, so that
whatever is linear in the generator has to be computed for a basis only.
"""

from lie_metric.algebra.generator import Generator, coefficients
from lie_metric.algebra.named import GENERATORS, GROUPS, generators, named
from lie_metric.algebra.projective import (
    PERSPECTIVE,
    check_horizon,
    flow_rows,
    horizon,
    moves,
    only_moves,
    projective_step,
    refuse_perspective,
    velocity,
)
from lie_metric.algebra.spans import exponential, matrix_exponential, simplest_basis, spanning_set

__all__ = [
    "GENERATORS",
    "GROUPS",
    "PERSPECTIVE",
    "Generator",
    "check_horizon",
    "coefficients",
    "exponential",
    "flow_rows",
    "generators",
    "horizon",
    "matrix_exponential",
    "moves",
    "named",
    "only_moves",
    "projective_step",
    "refuse_perspective",
    "simplest_basis",
    "spanning_set",
    "velocity",
]
