"""What generators span, and the one-parameter groups that they generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lie_metric.algebra.generator import Generator, coefficients, layout_of
from lie_metric.algebra.projective import horizon

__all__ = ["exponential", "matrix_exponential", "simplest_basis", "spanning_set"]


def spanning_set(asked: Sequence[Generator]) -> tuple[tuple[Generator, ...], Tensor]:
    """As few of the generators as span all of them, and the matrix that gives all from these.

    Args:
        asked: K generators.

    Returns:
        R linearly independent generators taken from those given, and a float64 matrix M of shape (K, R) with
        asked[k] = Σ_r M[k, r] · basis[r]; rows of generators in the basis are unit vectors. A zero generator has a row
        of zeros, so R may be 0.

    Example:
        >>> from lie_metric.algebra import generators
        >>> basis, matrix = spanning_set(generators("affine"))
        >>> len(basis), tuple(matrix.shape)
        (6, (9, 6))
    """
    rows = coefficients(asked)
    chosen: list[int] = []
    # Rows are normalised so that a generator written in small units is not taken for a dependent one.
    size = rows.abs().amax(dim=1, keepdim=True)
    unit = rows / size.where(size > 0, torch.ones_like(size))
    for index in range(len(asked)):
        candidate = unit[[*chosen, index]]
        if size[index] > 0 and int(torch.linalg.matrix_rank(candidate, rtol=1e-10)) == len(candidate):
            chosen.append(index)
    if not chosen:
        return (), torch.zeros(len(asked), 0, dtype=torch.float64)
    matrix = torch.linalg.lstsq(unit[chosen].T, unit.T).solution.T * size / size[chosen].T
    # Entries of the named generators are multiples of a half: rounding noise of the solver is removed below 1e-14.
    matrix = torch.where((matrix * 2 - (matrix * 2).round()).abs() < 1e-14, (matrix * 2).round() / 2, matrix)
    matrix[chosen] = torch.eye(len(chosen), dtype=torch.float64)
    return tuple(asked[index] for index in chosen), matrix


def simplest_basis(asked: Sequence[Generator]) -> tuple[tuple[Generator, ...], Tensor]:
    """Generators that span those asked for, with single numbers in their matrices where these are not more.

    Args:
        asked: K generators.

    Returns:
        R generators, as few as of :func:`spanning_set`, and the matrix M that gives asked[k] = Σ_r M[k, r] · basis[r].

    Example:
        >>> from lie_metric.algebra import generators
        >>> [generator.name for generator in simplest_basis(generators("rotation", "scale"))[0]]
        ['rotation', 'scale']
        >>> [sum(map(bool, generator.coefficients)) for generator in simplest_basis(generators("affine"))[0]]
        [1, 1, 1, 1, 1, 1]
    """
    rows, layout = coefficients(asked), layout_of(asked)
    used = rows.any(dim=0).nonzero()[:, 0].tolist()
    basis, matrix = spanning_set(asked)
    if len(used) > len(basis):
        return basis, matrix
    units = torch.eye(layout.length, dtype=torch.float64)[used].tolist()
    named_units = tuple(layout.generator(f"entry {index}", unit) for index, unit in zip(used, units, strict=True))
    return named_units, rows[:, used]


def exponential(asked: Generator | Sequence[Generator], t: Tensor) -> Tensor:
    """The affine or projective maps exp(tM), or exp(Σ_k t_k M_k), in homogeneous coordinates.

    A true one-parameter group: ``exponential(g, s) @ exponential(g, t) == exponential(g, s + t)`` up to rounding, and
    the identity exactly at t = 0.

    Args:
        asked: A generator, or K of them. M is its d×(d + 1) matrix with a row below of zeros, or in the plane of its
            charges of perspective.
        t: Group parameter, any shape, floating point; gradients flow to it. With K generators its last axis is K.

    Returns:
        Matrices of shape (*t.shape, d + 1, d + 1), without the axis of K, in the dtype of ``t``; they map output to
        input coordinates.

    Example:
        >>> from lie_metric.algebra import GENERATORS, generators
        >>> exponential(GENERATORS["translation_x"], torch.tensor(0.5))[:2].tolist()
        [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]
        >>> exponential(generators("translation"), torch.tensor([0.5, 2.0]))[:2].tolist()
        [[1.0, 0.0, 0.5], [0.0, 1.0, 2.0]]
    """
    if isinstance(asked, Generator):
        asked, t = (asked,), t[..., None]
    matrices = [
        [*generator.matrix, (*(horizon(generator) or (0.0,) * generator.dimension), 0.0)] for generator in asked
    ]
    total = (t[..., None, None] * torch.tensor(matrices, dtype=t.dtype, device=t.device)).sum(-3)
    return matrix_exponential(total)


def matrix_exponential(matrices: Tensor) -> Tensor:
    """The exponentials of matrices (..., n, n), to rounding.

    ``torch.linalg.matrix_exp`` has a wrong coefficient for a single matrix of a norm below 0.05 (float64) or 0.58
    (float32), and is off by up to 2e-10 or 5e-5 (https://github.com/pytorch/pytorch/issues/196592). It has not for two.

    Args:
        matrices: Square matrices, floating point.

    Returns:
        The exponentials, of the same shape.

    Example:
        >>> turn = torch.tensor([[0.0, -0.04], [0.04, 0.0]], dtype=torch.float64)
        >>> bool((matrix_exponential(turn)[1, 0] - torch.tensor(0.04, dtype=torch.float64).sin()).abs() < 1e-16)
        True
    """
    if matrices.shape[:-2].numel() != 1:
        return torch.linalg.matrix_exp(matrices)
    return torch.linalg.matrix_exp(torch.stack([matrices, matrices]))[0]
