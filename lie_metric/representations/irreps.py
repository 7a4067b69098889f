"""Features of e3nn: direct sums of irreducible representations of rotations and reflections of space."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lie_metric.algebra import Generator, matrix_exponential
from lie_metric.representations.affine import Affine
from lie_metric.representations.points import Vectors

__all__ = ["Irreps"]


@dataclass(frozen=True)
class Irreps(Affine):
    """Features (B, ..., n) that move by irreducible representations of O(3), in the conventions of e3nn.

    Rotations act and translations leave them at rest. Under what changes lengths they have no action: it is refused.

    Args:
        irreps: As e3nn writes them, e.g. ``"8x0e + 4x1o"``.

    Raises:
        ImportError: If e3nn is not installed.

    Example:
        >>> import torch, lie_metric as lm
        >>> Irreps("2x0e + 1x1o").size  # doctest: +SKIP
        5
    """

    irreps: str
    dimension: int = 3

    def __post_init__(self) -> None:
        if self.dimension != 3:
            raise ValueError(f"`dimension` must be 3 for irreducible representations of O(3), got {self.dimension!r}.")
        object.__setattr__(self, "irreps", str(self._parsed()))

    def _parsed(self) -> Any:
        try:
            from e3nn.o3 import Irreps as Parsed
        except ImportError as error:
            raise ImportError(
                "`Irreps` needs e3nn, which is not installed. Run `pip install 'lie_metric[geometry]'`."
            ) from error
        return Parsed(self.irreps)

    @property
    def size(self) -> int:
        """Length of the last axis."""
        return int(self._parsed().dim)

    def matrix(self, generator: Generator) -> Tensor:
        """The sum of the generators of rotations, by the angular velocity.

        Raises:
            ValueError: If the generator changes lengths.
        """
        square = -Vectors(3).matrix(generator)[:, :-1]  # how vectors move
        if bool((square + square.mT).any()):
            raise ValueError(
                f"`generators` must leave lengths as they are for {self!r}, got {generator.name!r}, under which "
                "irreducible representations of rotations have no action. Choose rotations and translations."
            )
        # The angular velocity, by the right hand about x, y and z.
        speed = torch.stack([square[2, 1], square[0, 2], square[1, 0]])
        blocks = [torch.tensordot(speed, _turns(irrep.l), 1) for count, irrep in self._parsed() for _ in range(count)]
        return torch.nn.functional.pad(-torch.block_diag(*blocks), (0, 1))

    def element(self, maps: Tensor) -> Tensor:
        """The matrices of rotations and reflections.

        Raises:
            ValueError: If a map changes lengths.
        """
        square = maps[..., :-1].double().cpu()
        if float((square.mT @ square - torch.eye(3, dtype=torch.float64)).abs().max()) > 1e-6:
            raise ValueError(f"`maps` must leave lengths as they are for {self!r}. Choose rotations and reflections.")
        from e3nn.o3 import matrix_to_angles

        flat = square.reshape(-1, 3, 3)
        mirrors = torch.linalg.det(flat).round()
        angles = [angle[:, None, None] for angle in matrix_to_angles(flat * mirrors[:, None, None])]
        found = []
        for degree, parity in [(irrep.l, irrep.p) for count, irrep in self._parsed() for _ in range(count)]:
            first, second, third = (
                matrix_exponential(angle * _turns(degree)[axis]) for angle, axis in zip(angles, (1, 0, 1), strict=True)
            )
            found.append(first @ second @ third * torch.where(mirrors < 0, parity, 1)[:, None, None])
        whole = torch.stack([torch.block_diag(*blocks) for blocks in zip(*found, strict=True)])
        padded = torch.nn.functional.pad(whole, (0, 1))
        return padded.reshape(*square.shape[:-2], self.size, self.size + 1).to(maps)

    def invariants(self) -> Tensor:
        """The scalars: 0e."""
        kept = [irrep.l == 0 and irrep.p == 1 for count, irrep in self._parsed() for _ in range(count * irrep.dim)]
        return torch.eye(self.size, dtype=torch.float64)[torch.tensor(kept, dtype=torch.bool)]


@lru_cache(maxsize=32)
def _turns(degree: int) -> Tensor:
    """The generators of turns about x, y and z, shape (3, 2l + 1, 2l + 1), in float64."""
    from e3nn.o3 import so3_generators

    # Their entries are square roots of quarters of whole numbers, and e3nn has them in the default dtype.
    rough = so3_generators(degree).double()
    return rough.sign() * ((4 * rough.square()).round() / 4).sqrt()
