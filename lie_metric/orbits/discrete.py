"""Transforms of no one-parameter group: permutations of pixels, and of points; reflections and other given maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lie_metric.lattice import CUBE, ELEMENTS, LatticeTransform, LatticeTransforms, check_reach, content_map, elements
from lie_metric.orbits.element import Element
from lie_metric.randomness import source
from lie_metric.representations import Representation, map_samples
from lie_metric.representations.composite import permuted
from lie_metric.representations.protocol import transformed
from lie_metric.resampling import Resampling

__all__ = ["LatticeOrbit", "MatrixOrbit", "PermutationOrbit", "lattice", "matrices", "permutations"]


@dataclass(frozen=True)
class LatticeOrbit:
    """Permutations of pixels: nothing is interpolated, and nothing leaves the frame.

    Args:
        name: Under which results are reported.
        transforms: The elements.
        complete: Whether they are all of a group, the identity among them.

    Example:
        >>> len(lattice("D4")[-1]), lattice("D4")[-1].name
        (8, 'D4')
    """

    name: str
    transforms: tuple[LatticeTransform, ...]
    complete: bool = False

    def __len__(self) -> int:
        return len(self.transforms)

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements, the same for every image; refused where they move axes that the grid has not."""
        check_reach(self.transforms, size)
        return [self._element(transform, size) for transform in self.transforms]

    @staticmethod
    def _element(transform: LatticeTransform, size: tuple[int, ...]) -> Element:
        maps = content_map(transform, len(size))

        def back(grid: Tensor) -> Tensor:
            return transform.inverse.on_grid(grid, size)

        def act(representation: Representation, tensor: Tensor, direction: int) -> Tensor:
            if direction > 0:
                return map_samples(representation, tensor, transform, maps)
            return map_samples(representation, tensor, back, content_map(transform.inverse, len(size)))

        def inside(grid: Tensor, spacing: tuple[float, ...]) -> Tensor:
            return torch.ones((1, *grid.shape[2:]), dtype=torch.bool, device=grid.device)

        return Element(transform, back, inside, act)


def lattice(*transforms: LatticeTransforms) -> tuple[LatticeOrbit, ...]:
    """Transforms that permute pixels, one orbit for each, and one for each whole group that is asked for by name.

    Args:
        transforms: As in :func:`lie_metric.lattice.elements`. "D4" and "rotations_90" add the mean over the group,
            and for volumes "O" and "O_h".

    Returns:
        The orbits.

    Example:
        >>> [orbit.name for orbit in lattice("rotations_90")]
        ['rotate_90', 'rotate_180', 'rotate_270', 'C4']
    """
    single = [LatticeOrbit(element.name, (element,)) for element in elements(*transforms)]
    whole = [_WHOLE[name] for name in transforms if isinstance(name, str) and name in _WHOLE]
    return (*single, *whole)


_WHOLE = {
    "rotations_90": LatticeOrbit("C4", tuple(ELEMENTS.values())[:4], complete=True),
    "D4": LatticeOrbit("D4", tuple(ELEMENTS.values()), complete=True),
    "O": LatticeOrbit("O", tuple(CUBE.values())[:24], complete=True),
    "O_h": LatticeOrbit("O_h", tuple(CUBE.values()), complete=True),
}


@dataclass(frozen=True)
class MatrixOrbit:
    """Given maps of space, of points and whatever turns with them.

    Args:
        name: Under which results are reported.
        maps: Matrices of d rows of d + 1 numbers: where points go.
        complete: Whether they are all of a group, the identity among them.
    """

    name: str
    maps: tuple[tuple[tuple[float, ...], ...], ...]
    complete: bool = False

    def __len__(self) -> int:
        return len(self.maps)

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements, the same for every sample."""
        return [self._element(torch.tensor(one, dtype=torch.float64)) for one in self.maps]

    @staticmethod
    def _element(matrix: Tensor) -> Element:
        inverse = torch.linalg.inv(matrix[:, :-1])
        back = torch.cat([inverse, -inverse @ matrix[:, -1:]], dim=1)

        def act(representation: Representation, tensor: Tensor, direction: int) -> Tensor:
            maps = (matrix if direction > 0 else back)[None]
            return transformed(representation, tensor, maps.to(tensor.device))

        return Element.of_action(act)


def matrices(maps: Mapping[str, Tensor | Sequence[Sequence[float]]]) -> tuple[MatrixOrbit, ...]:
    """Maps of space under names: reflections, inversions, turns of a point group.

    A map of a derivative that is zero along every generator says nothing of these: a pseudoscalar of a molecule does
    not move under rotations and changes its sign under the inversion.

    Args:
        maps: By name a matrix of d rows of d numbers, or of d + 1 with a last column for a step: where points go.

    Returns:
        An orbit of one element for each.

    Raises:
        ValueError: If there are none, or a matrix is of another shape or cannot be inverted.

    Example:
        >>> [orbit.name for orbit in matrices({"inversion": [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]})]
        ['inversion']
    """
    if not isinstance(maps, Mapping) or not maps:
        raise ValueError(f"`maps` must hold at least one matrix by name, got {maps!r}. Pass e.g. {{'mirror': ...}}.")
    found = []
    for name, given in maps.items():
        matrix = torch.as_tensor(given, dtype=torch.float64)
        if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
            matrix = torch.nn.functional.pad(matrix, (0, 1))
        if matrix.ndim != 2 or matrix.shape[1] != matrix.shape[0] + 1 or not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"`maps[{name!r}]` must be finite and d×d or d×(d + 1), got shape {tuple(matrix.shape)}.")
        if float(torch.linalg.det(matrix[:, :-1]).abs()) < 1e-12:
            raise ValueError(
                f"`maps[{name!r}]` must have an inverse, got determinant 0. Outputs are brought back by it."
            )
        found.append(MatrixOrbit(name, (tuple(map(tuple, matrix.tolist())),)))
    return tuple(found)


@dataclass(frozen=True)
class PermutationOrbit:
    """Random orders of the points (B, N, ...) of each sample; outputs at as many points are brought back, others stay.

    Args:
        name: Under which results are reported.
        samples: How many orders are drawn for each sample.
        along: Which named parts of the input stand at the points.
    """

    name: str = "permutation"
    samples: int = 1
    along: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """False: there are N! orders."""
        return False

    def __len__(self) -> int:
        return self.samples

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements; an order depends on the seed and each sample's number alone."""
        sources = [source(seed, index) for index in indices]
        return [self._element([each.initial_seed() + 7919 * draw for each in sources]) for draw in range(self.samples)]

    def _element(self, seeds: Sequence[int]) -> Element:
        counts: set[int] = set()  # of the points of the input

        def act(representation: Representation, tensor: Tensor, direction: int) -> Tensor:
            def orders(count: int) -> Tensor | None:
                if direction > 0:
                    counts.add(count)
                elif count not in counts:
                    return None
                drawn = [torch.randperm(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
                found = torch.stack(drawn)
                return (found if direction > 0 else found.argsort(1)).to(tensor.device)

            return permuted(representation, tensor, orders, self.along)

        return Element.of_action(act)


def permutations(samples: int = 4, name: str = "permutation", along: Sequence[str] = ()) -> PermutationOrbit:
    """Random orders of the points of each sample.

    Args:
        samples: How many are drawn for each.
        name: Under which results are reported.
        along: Of inputs with several named parts those that stand at the points, one entry for each, as charges and
            velocities do, and a cell does not. All have axes (B, N, ...).

    Returns:
        The orbit.

    Raises:
        TypeError: If the names are none.
        ValueError: If none is drawn.

    Example:
        >>> len(permutations(samples=2))
        2
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"`samples` must be a positive integer, got {samples!r}.")
    if isinstance(along, str) or not all(isinstance(one, str) for one in along):
        raise TypeError(f"`along` must be a sequence of names, got {along!r}. Pass e.g. ('pos', 'charge').")
    return PermutationOrbit(name, samples, tuple(along))
