"""Finite sets of directions in space, the rotations that permute them, and how well they average over the sphere."""

from __future__ import annotations

import math
from itertools import permutations, product

import torch
from torch import Tensor

__all__ = ["GRIDS", "design_strength", "permutes", "symmetries"]

GOLDEN = (1 + math.sqrt(5)) / 2


def _signed(*places: tuple[float, ...], even: bool = False, turns: bool = False) -> Tensor:
    """Unit vectors of places with all signs of their numbers and all (or the even) orders of them.

    Args:
        places: What to begin with.
        even: Whether orders are cyclic only.
        turns: Whether of signs and orders those are taken that together are a rotation.
    """
    found = []
    for place in places:
        for order in permutations(range(3)):
            parity = torch.linalg.det(torch.eye(3)[list(order)]).item()
            for signs in product((1, -1), repeat=3):
                if (even and parity < 0) or (turns and parity * math.prod(signs) < 0):
                    continue
                found.append([sign * place[axis] for sign, axis in zip(signs, order, strict=True)])
    unique = torch.unique(torch.tensor(found, dtype=torch.float64) + 0.0, dim=0)
    return unique / unique.norm(dim=1, keepdim=True)


def _snub() -> Tensor:
    """The orbit of the cube's 24 rotations that averages polynomials of degree 7 exactly (McLaren 1963).

    Invariants of these rotations begin at degrees 4, 6 and 8, so that x⁴ + y⁴ + z⁴ = 3/5 and x²y²z² = 1/105, the means
    over the sphere, are all that it takes: the squares are the roots of s³ - s² + s/5 - 1/105.
    """
    companion = torch.tensor([[1, -1 / 5, 1 / 105], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    x, y, z = torch.linalg.eigvals(companion).real.sqrt().tolist()
    return _signed((x, y, z), turns=True)


def grids() -> dict[str, Tensor]:
    """Corners of the regular solids, and McLaren's 24 directions: (n, 3) each, unit vectors, by name."""
    cube = _signed((1, 1, 1))
    return {
        "tetrahedron": cube[cube.prod(1) > 0],
        "octahedron": _signed((1, 0, 0)),
        "cube": cube,
        "icosahedron": _signed((0, 1, GOLDEN), even=True),
        # Its golden rectangles lie across those of the icosahedron: so it is the dual, with the same rotations.
        "dodecahedron": _signed((1, 1, 1), (0, GOLDEN, 1 / GOLDEN), even=True),
        "snub cube": _snub(),
    }


GRIDS = grids()
"""Sets of directions by name; each is one orbit of a finite group of rotations."""


def permutes(turn: Tensor, grid: Tensor) -> bool:
    """Whether a rotation takes each direction of a grid to one of them."""
    # By matrix products, as cdist takes distances of many points, they are right to 1e-8 only.
    apart = torch.cdist(grid @ turn.T, grid, compute_mode="donot_use_mm_for_euclid_dist")
    return bool((apart.amin(1) < 1e-9).all())


def symmetries(grid: Tensor) -> Tensor:
    """The rotations that permute a set of directions.

    Args:
        grid: (n, 3), which spans space.

    Returns:
        (m, 3, 3), with the identity first.
    """
    inner = grid @ grid.T
    # A rotation is told by where it takes two directions that are not opposite.
    first, second = 0, int((inner[0].abs() < 1 - 1e-9).nonzero()[0])

    def frame(a: Tensor, b: Tensor) -> Tensor:
        across = torch.linalg.cross(a, b)
        return torch.stack([a, torch.linalg.cross(across, a), across], dim=-1)

    start = torch.linalg.inv(frame(grid[first], grid[second]))
    found = []
    for i, j in product(range(len(grid)), repeat=2):
        if abs(inner[i, j] - inner[first, second]) < 1e-9:
            turn = frame(grid[i], grid[j]) @ start
            if permutes(turn, grid):
                found.append(turn)
    identity = torch.eye(3, dtype=grid.dtype)
    return torch.stack(sorted(found, key=lambda turn: (turn - identity).norm().item()))


def design_strength(grid: Tensor, most: int = 12) -> int:
    """The largest t such that the mean over the directions of every polynomial of degree t is that over the sphere.

    Of Delsarte, Goethals and Seidel (1977): Σ_{ij} P_l(o_i · o_j) = 0 for l = 1, ..., t, with Legendre polynomials.

    Args:
        grid: (n, 3), unit vectors.
        most: Where to stop.

    Returns:
        t.

    Example:
        >>> [design_strength(GRIDS[name]) for name in ("tetrahedron", "octahedron", "icosahedron")]
        [2, 3, 5]
    """
    inner = grid @ grid.T
    before, now = torch.ones_like(inner), inner
    for degree in range(1, most + 1):
        if now.mean().abs() > 1e-10:
            return degree - 1
        before, now = now, ((2 * degree + 1) * inner * now - degree * before) / (degree + 1)
    return most
