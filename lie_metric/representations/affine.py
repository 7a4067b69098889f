"""Tensors whose last axis moves by an affine map of itself: what all of them share, and those with given matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lie_metric.algebra import (
    PERSPECTIVE,
    Generator,
    coefficients,
    exponential,
    generators,
    matrix_exponential,
    refuse_perspective,
)
from lie_metric.resampling import Resampling

__all__ = ["Affine", "DirectSum", "Linear", "combined", "content_map", "without_step"]


class Affine:
    """What all of them share: an algebra of affine maps of the last axis, and its exponentials.

    A subclass says by which matrix a generator acts, :meth:`matrix`, and by which a map of space does, :meth:`element`.
    """

    dimension: int
    """The dimension of the space whose generators act."""

    charges: frozenset[str] = frozenset()
    """Names of the charges that act."""

    axes = 1
    """How many axes at the end move; they are taken as one."""

    @property
    def size(self) -> int:
        """How many numbers move together: n."""
        return self.dimension

    def matrix(self, generator: Generator) -> Tensor:
        """The matrix M of a generator, with X · v = -M (v, 1): shape (n, n + 1), float64."""
        raise NotImplementedError

    def element(self, maps: Tensor) -> Tensor:
        """What maps of points, shape (..., d, d + 1), do to the last axis: shape (..., n, n + 1)."""
        raise TypeError(
            f"`representation` must say what a map of space does to it, got {self!r}, which knows generators alone. "
            "Measure Lie derivatives, or give a representation with `transform`."
        )

    def invariants(self) -> Tensor:
        """Orthonormal rows, shape (m, n): the directions in which a mean is taken off before the spread."""
        return torch.zeros(0, self.size, dtype=torch.float64)

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts (B, ..., n).

        Raises:
            ValueError: If the last axes are of other lengths, there is no batch axis, or the tensor is empty.
        """
        wanted = (self.dimension,) * self.axes if self.axes > 1 else (self.size,)
        if tensor.ndim <= self.axes or tuple(tensor.shape[-self.axes :]) != wanted or tensor.numel() == 0:
            raise ValueError(
                f"`{name}` must be non-empty with axes (B, ..., {', '.join(map(str, wanted))}) to move as {self!r}, "
                f"got shape {tuple(tensor.shape)}. Reshape it, or give the representation that fits."
            )

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, *tensor.shape)."""
        rows = self.rows(tensor)
        moved = [self._applied(-self.matrix(generator).to(rows), rows) for generator in generators]
        found = torch.stack(moved) if moved else rows.new_zeros((0, *rows.shape))
        return found.reshape(-1, *tensor.shape)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor, by the exponential of the action; t is a number, or one for each of B."""
        matrix = torch.nn.functional.pad(self.matrix(generator), (0, 0, 0, 1))
        steps = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1)
        return self._moved(tensor, matrix_exponential(-steps * matrix)[:, :-1])

    def transform(self, tensor: Tensor, maps: Tensor) -> Tensor:
        """The tensor after maps of space.

        Args:
            tensor: The tensor, (B, ..., n).
            maps: Where points go, shape (B or 1, d, d + 1): a matrix and a step.

        Returns:
            The tensor, of the same shape.
        """
        return self._moved(tensor, self.element(maps))

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One block (B, positions, m) of the invariant directions, or none."""
        invariant = self.invariants()
        if not len(invariant):
            return ()
        rows = self.rows(tensor)
        return ((rows @ invariant.mT.to(rows)).reshape(len(tensor), -1, len(invariant)),)

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor with what moves on one axis."""
        return tensor.flatten(-self.axes) if self.axes else tensor[..., None]

    def _moved(self, tensor: Tensor, matrices: Tensor) -> Tensor:
        rows = self.rows(tensor)
        return self._applied(matrices.to(rows), rows.reshape(len(rows), -1, self.size)).reshape(tensor.shape)

    @staticmethod
    def _applied(matrix: Tensor, rows: Tensor) -> Tensor:
        """Matrices (n, n + 1) or (B or 1, n, n + 1) on rows (..., n) or (B, positions, n)."""
        return rows @ matrix[..., :-1].mT + (matrix[..., -1] if matrix.ndim == 2 else matrix[..., None, :, -1])


def without_step(square: Tensor) -> Tensor:
    """A square matrix with a last column of zeros."""
    return torch.nn.functional.pad(square, (0, 1))


@dataclass(frozen=True, eq=False)
class Linear(Affine):
    """A tensor (B, ..., n) whose last axis moves by given matrices: X · v = M v.

    What is not a combination of the generators given is refused.

    Args:
        matrices: By the name of a generator, or by the generator itself, the n×n matrix M of its action.
        dimension: The dimension in which names are meant.

    Raises:
        ValueError: If there are none, or they are not square and of one size.

    Example:
        >>> import torch, lie_metric as lm
        >>> spin = Linear({"rotation": [[0, -2], [2, 0]]})  # turns twice as fast
        >>> spin.tangents(torch.tensor([[1.0, 0.0]]), lm.generators("rotation"), lm.Resampling())[0, 0].tolist()
        [0.0, 2.0]
    """

    matrices: Mapping[str | Generator, Tensor | Sequence[Sequence[float]]]
    dimension: int = 2
    _keys: tuple[Generator, ...] = field(init=False, repr=False)
    _values: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        keys = tuple(generators(*self.matrices, dimension=self.dimension)) if self.matrices else ()
        values = [torch.as_tensor(matrix, dtype=torch.float64) for matrix in self.matrices.values()]
        shapes = sorted({tuple(matrix.shape) for matrix in values})
        if len(shapes) != 1 or len(keys) != len(values) or len(shapes[0]) != 2 or len(set(shapes[0])) != 1:
            raise ValueError(
                f"`matrices` must hold square matrices of one size, one for each generator, got shapes {shapes} for "
                f"{[generator.name for generator in keys]}."
            )
        object.__setattr__(self, "_keys", keys)
        object.__setattr__(self, "_values", torch.stack(values))

    @property
    def size(self) -> int:
        """Length of the last axis."""
        return int(self._values.shape[-1])

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the generators given."""
        return frozenset(name for key in self._keys for name in key.charges)

    def matrix(self, generator: Generator) -> Tensor:
        """-M, of a combination the combination.

        Raises:
            ValueError: If the generator is no combination of those given.
        """
        return without_step(-torch.tensordot(combined(self._keys, generator, self), self._values, 1))

    def invariants(self) -> Tensor:
        """What all matrices leave at rest."""
        _, values, rows = torch.linalg.svd(self._values.flatten(0, 1))
        return rows[
            torch.nn.functional.pad(values, (0, len(rows) - len(values))) < 1e-9 * values.max().clamp(min=1e-300)
        ]


def combined(known: Sequence[Generator], asked: Generator, owner: object) -> Tensor:
    """The numbers by which a generator is a combination of those that are known.

    Args:
        known: K generators.
        asked: Another of the same dimension.
        owner: Who knows them, for the message.

    Returns:
        K numbers, float64.

    Raises:
        ValueError: If it is none.

    Example:
        >>> combined(generators("translation"), generators("translation_y")[0], "a flow").tolist()
        [0.0, 1.0]
    """
    rows = coefficients([*known, asked])
    found = torch.linalg.lstsq(rows[:-1].mT, rows[-1:].mT, driver="gelsd").solution[:, 0]
    off = rows[-1] - found @ rows[:-1]
    if float(off.abs().max()) > 1e-12 * float(rows.abs().max()):
        raise ValueError(
            f"`generators` must be combinations of {[one.name for one in known]}, for which {type(owner).__name__} was "
            f"given, got {asked.name!r}. Give its action too."
        )
    return torch.where((found - found.round()).abs() < 1e-13, found.round(), found)


def content_map(generator: Generator, t: Tensor) -> Tensor:
    """Where a generator takes points, of which a field is read at the opposite.

    Args:
        generator: A generator of d dimensions.
        t: Any shape.

    Returns:
        Shape (*t.shape, d, d + 1).

    Raises:
        ValueError: If the generator is projective.

    Example:
        >>> content_map(generators("translation_x")[0], torch.tensor(0.5)).tolist()
        [[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]]
    """
    refuse_perspective([generator], "points by a matrix", "Take `Points(2).act`, or `exponential(generator, -t)`.")
    return exponential(generator, -t)[..., :-1, :]


@dataclass(frozen=True)
class DirectSum(Affine):
    """Several kinds side by side on the last axis: places and momenta (B, ..., q p), features of several types.

    Args:
        of: What stands there, in order.

    Raises:
        ValueError: If there is nothing, or kinds of several dimensions.

    Example:
        >>> import torch, lie_metric as lm
        >>> from lie_metric.representations import Covectors, Points
        >>> phase_space = DirectSum((Points(2), Covectors(2)))
        >>> right = lm.generators("translation_x")
        >>> phase_space.tangents(torch.zeros(1, 4), right, lm.Resampling())[0, 0].tolist()
        [-1.0, 0.0, 0.0, 0.0]
    """

    of: tuple[Affine, ...]

    def __post_init__(self) -> None:
        parts = tuple(self.of)
        if not parts or not all(isinstance(one, Affine) for one in parts) or len({one.dimension for one in parts}) > 1:
            raise ValueError(
                f"`of` must hold kinds of points, vectors and the like of one dimension, got {self.of!r}. Pass e.g. "
                "(Points(3), Covectors(3))."
            )
        object.__setattr__(self, "of", parts)

    @property
    def dimension(self) -> int:  # type: ignore[override]
        """That of all kinds."""
        return self.of[0].dimension

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """Those of any kind, but for perspectives, of which no matrix of the whole axis is the action."""
        return frozenset().union(*(one.charges for one in self.of)) - frozenset(PERSPECTIVE)

    @property
    def size(self) -> int:
        """Length of the last axis."""
        return sum(one.size for one in self.of)

    def matrix(self, generator: Generator) -> Tensor:
        """The matrices of the kinds, one below the other."""
        return _beside([one.matrix(generator) for one in self.of])

    def element(self, maps: Tensor) -> Tensor:
        """What maps of space do to the kinds."""
        found = [one.element(maps) for one in self.of]
        rows = [_beside(list(each)) for each in zip(*(one.reshape(-1, *one.shape[-2:]) for one in found), strict=True)]
        return torch.stack(rows).reshape(*maps.shape[:-2], self.size, self.size + 1)

    def invariants(self) -> Tensor:
        """Those of the kinds."""
        return torch.block_diag(*(one.invariants() for one in self.of))


def _beside(matrices: Sequence[Tensor]) -> Tensor:
    """Affine maps (n, n + 1) of several kinds as one."""
    square = torch.block_diag(*(one[:, :-1] for one in matrices))
    return torch.cat([square, torch.cat([one[:, -1:] for one in matrices])], dim=1)
