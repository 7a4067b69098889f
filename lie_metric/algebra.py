"""Generators of one-parameter groups of image transformations, and their linear algebra.

The affine group of the plane acts on coordinates, one further one-parameter group on intensities.
Every generator is a vector of seven numbers, so that whatever is linear in the generator has to be
computed for a basis only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["GENERATORS", "GROUPS", "Generator", "exponential", "generators", "spanning_set"]

Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Generator:
    r"""An element X of the Lie algebra: an affine vector field on the plane, and a rate of change of intensity.

    Its one-parameter group acts on an image x by

    .. math:: (T_t x)(p) = e^{t\,s}\, x(\exp(tA)\, p), \qquad X \cdot x = \nabla x \cdot A\tilde p + s\, x

    with :math:`\tilde p = (p_x, p_y, 1)`, the 2×3 matrix A (``matrix``) and the number s (``intensity``).

    Convention:
        x points right, y points down, the origin is the image centre and 1 is half of the shorter side. The matrix
        maps output coordinates to input coordinates, as in :func:`torch.nn.functional.affine_grid`: a positive
        translation moves the content to the left (x) or up (y), a positive scale enlarges it, and a positive
        rotation turns it clockwise as displayed.

    Generators form a vector space: they can be added, subtracted and multiplied by numbers.

    Args:
        name: Name under which results are reported. It must be non-empty and free of ``/``, which loggers use to
            group curves.
        matrix: The matrix A as two rows of three finite numbers.
        intensity: The rate s at which intensities grow.

    Raises:
        TypeError: If the name is not a string or the matrix does not hold numbers.
        ValueError: If the name is empty or holds ``/``, the matrix is not 2×3, or an entry is not finite.

    Example:
        >>> import lie_metric as lm
        >>> spiral = lm.Generator.affine("spiral", [[-0.5, 1, 0], [-1, -0.5, 0]])
        >>> rotation, scale = lm.generators("rotation", "scale")
        >>> (rotation + 0.5 * scale).with_name("spiral") == spiral
        True
    """

    name: str
    matrix: Matrix
    intensity: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"`name` must be a string, got {self.name!r}. Give the generator a name, e.g. 'spiral'.")
        if not self.name or "/" in self.name:
            raise ValueError(
                f"`name` must be a non-empty string without '/', got {self.name!r}. "
                "Loggers group curves by the text before '/': choose a name such as 'spiral'."
            )
        try:
            rows = tuple(tuple(float(entry) for entry in row) for row in self.matrix)
            intensity = float(self.intensity)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`matrix` must hold two rows of three numbers and `intensity` a number, got {self.matrix!r} "
                f"and {self.intensity!r}. For example [[0, 1, 0], [-1, 0, 0]] is the rotation."
            ) from error
        if [len(row) for row in rows] != [3, 3]:
            raise ValueError(
                f"`matrix` must be 2×3, got rows of lengths {[len(row) for row in rows]}. "
                "The columns act on x, y and 1: append a column of zeros to a 2×2 matrix."
            )
        if not all(math.isfinite(entry) for entry in (*rows[0], *rows[1], intensity)):
            raise ValueError(f"`matrix` and `intensity` must be finite, got {rows!r} and {intensity!r}.")
        object.__setattr__(self, "matrix", rows)
        object.__setattr__(self, "intensity", intensity)

    @classmethod
    def affine(cls, name: str, matrix: Matrix | Sequence[Sequence[float]] | Tensor) -> Generator:
        """A generator of affine maps from its 2×3 matrix on (x, y, 1).

        Args:
            name: Name under which results are reported.
            matrix: Two rows of three numbers, or a tensor of shape (2, 3).

        Returns:
            The generator.

        Example:
            >>> Generator.affine("diagonal", [[0, 0, 1], [0, 0, 1]]).coefficients
            (0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0)
        """
        return cls(name, matrix.tolist() if isinstance(matrix, Tensor) else matrix)  # type: ignore[arg-type]

    @classmethod
    def combination(
        cls, name: str, generators: Sequence[Generator], coefficients: Sequence[float] | Tensor
    ) -> Generator:
        """A linear combination of generators, such as a row of ``LocalEquivarianceError.principal_directions()``.

        Args:
            name: Name under which results are reported.
            generators: K generators.
            coefficients: K numbers.

        Returns:
            The generator Σ c_k X_k.

        Raises:
            ValueError: If there are not as many numbers as generators.

        Example:
            >>> Generator.combination("shear_x", generators("rotation", "hyperbolic_rotation"), [0.5, 0.5])
            Generator(name='shear_x', matrix=((0.0, 1.0, 0.0), (0.0, 0.0, 0.0)), intensity=0.0)
        """
        numbers = coefficients.tolist() if isinstance(coefficients, Tensor) else list(coefficients)
        if len(numbers) != len(generators):
            raise ValueError(
                f"`coefficients` must hold {len(generators)} numbers, one for each generator, got {len(numbers)}. "
                "Pass one row of principal directions, e.g. `directions[0]`."
            )
        rows = [generator.coefficients for generator in generators]
        total = [sum(c * entry for c, entry in zip(numbers, column, strict=True)) for column in zip(*rows, strict=True)]
        return _from_coefficients(name, total or [0.0] * 7)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The seven numbers of the generator: the matrix row by row, then the intensity."""
        return (*self.matrix[0], *self.matrix[1], self.intensity)

    def with_name(self, name: str) -> Generator:
        """The same generator under another name."""
        return replace(self, name=name)

    def __add__(self, other: Generator) -> Generator:
        if not isinstance(other, Generator):
            return NotImplemented
        total = [a + b for a, b in zip(self.coefficients, other.coefficients, strict=True)]
        return _from_coefficients(f"{self.name} + {other.name}", total)

    def __mul__(self, factor: float) -> Generator:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return _from_coefficients(f"{factor:g} {self.name}", [factor * entry for entry in self.coefficients])

    __rmul__ = __mul__

    def __neg__(self) -> Generator:
        return -1 * self

    def __sub__(self, other: Generator) -> Generator:
        return self + (-other)


def _from_coefficients(name: str, entries: Sequence[float]) -> Generator:
    a, b, c, d, e, f, intensity = entries
    return Generator(name, ((a, b, c), (d, e, f)), intensity)


GENERATORS: dict[str, Generator] = {
    generator.name: generator
    for generator in (
        Generator("translation_x", ((0, 0, 1), (0, 0, 0))),
        Generator("translation_y", ((0, 0, 0), (0, 0, 1))),
        Generator("rotation", ((0, 1, 0), (-1, 0, 0))),
        Generator("hyperbolic_rotation", ((0, 1, 0), (1, 0, 0))),
        Generator("scale", ((-1, 0, 0), (0, -1, 0))),
        Generator("shear_x", ((0, 1, 0), (0, 0, 0))),
        Generator("shear_y", ((0, 0, 0), (1, 0, 0))),
        Generator("stretch_x", ((1, 0, 0), (0, 0, 0))),
        Generator("stretch_y", ((0, 0, 0), (0, 1, 0))),
        Generator("saturation", ((0, 0, 0), (0, 0, 0)), intensity=1.0),
    )
}
"""The named generators: the affine ones, and ``saturation`` with X·x = x."""

GROUPS: dict[str, tuple[str, ...]] = {
    "translation": ("translation_x", "translation_y"),
    "shear": ("shear_x", "shear_y"),
    "stretch": ("stretch_x", "stretch_y"),
    "affine": tuple(name for name in GENERATORS if name != "saturation"),
    "all": tuple(GENERATORS),
}
"""Names that stand for several generators."""


def generators(*names: str | Generator | Iterable[str | Generator]) -> tuple[Generator, ...]:
    """Generators by name, by group, or as given, in the order asked for.

    Args:
        names: Names of generators ("rotation"), of groups ("translation", "shear", "stretch": both axes; "affine": the
            nine named affine generators; "all": these and "saturation"), :class:`Generator` objects, or sequences of
            them.

    Returns:
        The generators, each once.

    Raises:
        TypeError: If an entry is neither a string, a generator nor a sequence of them.
        ValueError: If a name is unknown, nothing is asked for, or two results would bear the same name.

    Example:
        >>> [g.name for g in generators("translation", "rotation")]
        ['translation_x', 'translation_y', 'rotation']
    """
    found = tuple(_resolve(names))
    if not found:
        raise ValueError("`generators` must name at least one generator, got none. Pass e.g. 'affine' or 'rotation'.")
    seen = [generator.name for generator in found]
    repeated = sorted({name for name in seen if seen.count(name) > 1})
    if repeated:
        raise ValueError(
            f"`generators` must have distinct names, got {repeated} more than once. "
            "Results are reported by name: name each once, or rename one with `Generator.with_name`."
        )
    return found


def _resolve(asked: object) -> Iterable[Generator]:
    if isinstance(asked, Generator):
        yield asked
    elif isinstance(asked, str):
        if asked in GENERATORS:
            yield GENERATORS[asked]
        elif asked in GROUPS:
            yield from (GENERATORS[name] for name in GROUPS[asked])
        else:
            raise ValueError(
                f"`generators` must name known generators, got {asked!r}. Choose from {sorted(GENERATORS)}, from the "
                f"groups {sorted(GROUPS)}, or pass `Generator.affine(name, matrix)`."
            )
    elif isinstance(asked, Iterable) and not isinstance(asked, (Tensor, bytes)):
        for entry in asked:
            yield from _resolve(entry)
    else:
        raise TypeError(
            f"`generators` must be names, `Generator` objects or sequences of them, got {asked!r}. "
            "Pass e.g. 'affine' or ('translation', 'rotation')."
        )


def spanning_set(asked: Sequence[Generator]) -> tuple[tuple[Generator, ...], Tensor]:
    """As few of the generators as span all of them, and the matrix that gives all from these.

    Args:
        asked: K generators.

    Returns:
        R linearly independent generators taken from those given, and a float64 matrix M of shape (K, R) with
        asked[k] = Σ_r M[k, r] · basis[r]; rows of generators in the basis are unit vectors. A zero generator has a row
        of zeros, so R may be 0.

    Example:
        >>> basis, matrix = spanning_set(generators("affine"))
        >>> len(basis), tuple(matrix.shape)
        (6, (9, 6))
    """
    rows = torch.tensor([generator.coefficients for generator in asked], dtype=torch.float64).reshape(len(asked), 7)
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
        >>> [generator.name for generator in simplest_basis(generators("rotation", "scale"))[0]]
        ['rotation', 'scale']
        >>> [sum(map(bool, generator.coefficients)) for generator in simplest_basis(generators("affine"))[0]]
        [1, 1, 1, 1, 1, 1]
    """
    rows = torch.tensor([generator.coefficients for generator in asked], dtype=torch.float64)
    used = rows.any(dim=0).nonzero()[:, 0].tolist() if len(asked) else []
    basis, matrix = spanning_set(asked)
    if len(used) > len(basis):
        return basis, matrix
    units = torch.eye(7, dtype=torch.float64)[used].tolist()
    return tuple(_from_coefficients(f"entry {index}", unit) for index, unit in zip(used, units, strict=True)), rows[
        :, used
    ]


def exponential(asked: Generator | Sequence[Generator], t: Tensor) -> Tensor:
    """The affine maps exp(tA), or exp(Σ_k t_k A_k), in homogeneous coordinates.

    A true one-parameter group: ``exponential(g, s) @ exponential(g, t) == exponential(g, s + t)`` up to rounding, and
    the identity exactly at t = 0.

    Args:
        asked: A generator with its 2×3 matrix A, or K of them.
        t: Group parameter, any shape, floating point; gradients flow to it. With K generators its last axis is K.

    Returns:
        Matrices of shape (*t.shape, 3, 3), without the axis of K, in the dtype of ``t``; they map output to input
        coordinates.

    Example:
        >>> exponential(GENERATORS["translation_x"], torch.tensor(0.5))[:2].tolist()
        [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]
        >>> exponential(generators("translation"), torch.tensor([0.5, 2.0]))[:2].tolist()
        [[1.0, 0.0, 0.5], [0.0, 1.0, 2.0]]
    """
    if isinstance(asked, Generator):
        asked, t = (asked,), t[..., None]
    matrices = [[*generator.matrix, (0.0, 0.0, 0.0)] for generator in asked]
    total = (t[..., None, None] * torch.tensor(matrices, dtype=t.dtype, device=t.device)).sum(-3)
    return torch.linalg.matrix_exp(total)
