"""Finite transforms under which outputs are compared: listed, drawn for each image, or exact on the lattice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lie_metric.lattice import LatticeTransform
from lie_metric.orbits.continuous import Border, DisplacedOrbit, RandomOrbit, displaced, listed, uniform
from lie_metric.orbits.discrete import LatticeOrbit, MatrixOrbit, PermutationOrbit, lattice, matrices, permutations
from lie_metric.orbits.element import Element, Frame, Orbit

__all__ = [
    "Border",
    "DisplacedOrbit",
    "Element",
    "Frame",
    "LatticeOrbit",
    "MatrixOrbit",
    "Orbit",
    "Orbits",
    "PermutationOrbit",
    "RandomOrbit",
    "displaced",
    "lattice",
    "listed",
    "matrices",
    "orbits",
    "permutations",
    "uniform",
]

Orbits = str | LatticeTransform | Orbit | Iterable[Any]


def orbits(*asked: Orbits) -> tuple[Orbit, ...]:
    """Orbits from names of lattice transforms, from lattice transforms, or as given.

    Args:
        asked: Names ("rotate_90", "flips", "D4"), lattice transforms, orbits, or sequences of them.

    Returns:
        The orbits, of distinct names.

    Raises:
        TypeError: If an entry is none of these.
        ValueError: If nothing is asked for, or two orbits have one name.

    Example:
        >>> [orbit.name for orbit in orbits("flips", listed("rotation", [0.5]))]
        ['flip_horizontal', 'flip_vertical', 'rotation_0.5']
    """
    found = tuple(_resolve(asked))
    if not found:
        raise ValueError("`transforms` must hold at least one orbit, got none. Pass e.g. listed('rotation', [0.5]).")
    names = [orbit.name for orbit in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`transforms` must have distinct names, got {repeated} more than once. Name each once.")
    return found


def _resolve(asked: object) -> Iterable[Orbit]:
    if isinstance(asked, (str, LatticeTransform)):
        yield from lattice(asked)
    elif isinstance(asked, Orbit):
        yield asked
    elif isinstance(asked, Iterable) and not isinstance(asked, (Tensor, bytes)):
        for entry in asked:
            yield from _resolve(entry)
    else:
        raise TypeError(
            f"`transforms` must be names of lattice transforms, orbits, or sequences of them, got {asked!r}. Pass e.g. "
            "'D4', `orbits.listed('rotation', [0.5])` or `orbits.uniform('translation', 0.25)`."
        )
