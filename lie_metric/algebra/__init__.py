"""Generators of one-parameter groups, and their linear algebra.

Affine maps of the line, the plane, space or any other dimension act on coordinates; intensities and named charges
stand for what moves no coordinates. Every generator is a vector of numbers, so that whatever is linear in the generator
has to be computed for a basis only.
"""

from lie_metric.algebra.generator import Generator, coefficients
from lie_metric.algebra.named import GENERATORS, GROUPS, generators, named
from lie_metric.algebra.spans import exponential, matrix_exponential, simplest_basis, spanning_set

__all__ = [
    "GENERATORS",
    "GROUPS",
    "Generator",
    "coefficients",
    "exponential",
    "generators",
    "matrix_exponential",
    "named",
    "simplest_basis",
    "spanning_set",
]
