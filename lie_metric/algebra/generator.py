"""A generator as a vector of numbers: an affine vector field, a rate of intensity, and charges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Generator", "Layout", "coefficients", "layout_of"]

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Generator:
    r"""An element X of the Lie algebra: an affine vector field in d dimensions, and rates of change of other things.

    Its one-parameter group acts on a field x, such as an image, and on a point p by

    .. math:: (T_t x)(p) = e^{t\,s}\, x(\exp(tA)\, p), \qquad X \cdot x = \nabla x \cdot A\tilde p + s\, x, \qquad
        X \cdot p = -A\tilde p

    with :math:`\tilde p = (p_1, \dots, p_d, 1)`, the d×(d + 1) matrix A (``matrix``) and the number s (``intensity``):
    a point moves as the content of an image does. Charges are numbers by name that mean what a representation makes of
    them, such as "boost_x", by which velocities grow.

    In the plane the charges "perspective_x" and "perspective_y" are the last row of the homogeneous matrix M, of which
    A is the upper part: points are divided by their last coordinate,

    .. math:: \varphi_t(p) = \frac{(e^{tM} \tilde p)_{xy}}{(e^{tM} \tilde p)_3}, \qquad
        M = \begin{pmatrix} A \\ w_x\ w_y\ 0 \end{pmatrix}, \qquad
        X \cdot p = -A \tilde p + (w \cdot p)\, p

    Convention:
        x points right, y down and z away, right-handed; the origin is the image centre and 1 is half of the shorter
        side. The matrix maps output coordinates to input coordinates, as in :func:`torch.nn.functional.affine_grid`: a
        positive translation moves the content to the left (x) or up (y), a positive scale enlarges it, and a positive
        rotation turns it by the right hand about its axis, which is clockwise as displayed in the plane. A positive
        perspective enlarges the content at the right (x) or below (y) and shrinks it at the other side.

    Generators of one dimension form a vector space: they can be added, subtracted and multiplied by numbers.

    Args:
        name: Name under which results are reported. It must be non-empty and free of ``/``, which loggers use to
            group curves.
        matrix: The matrix A as d rows of d + 1 finite numbers; none for what acts in no space.
        intensity: The rate s at which intensities grow.
        charges: Further rates by name. Those that are zero are left out.

    Raises:
        TypeError: If the name is not a string, or the matrix or charges do not hold numbers.
        ValueError: If the name is empty or holds ``/``, the matrix is not d×(d + 1), or an entry is not finite.

    Example:
        >>> import lie_metric as lm
        >>> spiral = lm.Generator.affine("spiral", [[-0.5, 1, 0], [-1, -0.5, 0]])
        >>> rotation, scale = lm.generators("rotation", "scale")
        >>> (rotation + 0.5 * scale).with_name("spiral") == spiral
        True
        >>> lm.Generator("warmer", (), charges={"hue": 0.1}).dimension
        0
    """

    name: str
    matrix: Matrix
    intensity: float = 0.0
    charges: Mapping[str, float] = field(default_factory=dict, hash=False)

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
                f"`matrix` must hold d rows of d + 1 numbers and `intensity` a number, got {self.matrix!r} "
                f"and {self.intensity!r}. For example [[0, 1, 0], [-1, 0, 0]] is the rotation of the plane."
            ) from error
        if any(len(row) != len(rows) + 1 for row in rows):
            raise ValueError(
                f"`matrix` must be d×(d + 1), 2×3 in the plane, got rows of lengths {[len(row) for row in rows]}. "
                "The columns act on the coordinates and 1: append a column of zeros to a square matrix."
            )
        try:
            charges = {name: float(rate) for name, rate in sorted(dict(self.charges).items()) if float(rate)}
            named = all(isinstance(name, str) and name for name in charges)
        except (TypeError, ValueError):
            charges, named = {}, False
        if not named:
            raise TypeError(f"`charges` must map names to numbers, got {self.charges!r}. Pass e.g. {{'boost_x': 1.0}}.")
        if not all(map(math.isfinite, (*(entry for row in rows for entry in row), intensity, *charges.values()))):
            raise ValueError(
                f"`matrix`, `intensity` and `charges` must be finite, got {rows!r}, {intensity!r} and {charges!r}."
            )
        object.__setattr__(self, "matrix", rows)
        object.__setattr__(self, "intensity", intensity)
        object.__setattr__(self, "charges", charges)

    def __repr__(self) -> str:
        charges = f", charges={dict(self.charges)!r}" if self.charges else ""
        return f"Generator(name={self.name!r}, matrix={self.matrix!r}, intensity={self.intensity!r}{charges})"

    @property
    def dimension(self) -> int:
        """How many coordinates it moves: d."""
        return len(self.matrix)

    @classmethod
    def affine(cls, name: str, matrix: Matrix | Sequence[Sequence[float]] | Tensor) -> Generator:
        """A generator of affine maps from its d×(d + 1) matrix on (x, y, ..., 1).

        Args:
            name: Name under which results are reported.
            matrix: d rows of d + 1 numbers, or a tensor of that shape: (2, 3) in the plane.

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
            >>> from lie_metric import generators
            >>> Generator.combination("shear_x", generators("rotation", "hyperbolic_rotation"), [0.5, 0.5])
            Generator(name='shear_x', matrix=((0.0, 1.0, 0.0), (0.0, 0.0, 0.0)), intensity=0.0)
        """
        numbers = coefficients.tolist() if isinstance(coefficients, Tensor) else list(coefficients)
        if len(numbers) != len(generators):
            raise ValueError(
                f"`coefficients` must hold {len(generators)} numbers, one for each generator, got {len(numbers)}. "
                "Pass one row of principal directions, e.g. `directions[0]`."
            )
        layout = layout_of(generators)
        total = [0.0] * layout.length
        for number, generator in zip(numbers, generators, strict=True):
            total = [entry + number * own for entry, own in zip(total, layout.read(generator), strict=True)]
        return layout.generator(name, total)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The matrix row by row, the intensity, and the charges by name: seven numbers in the plane without charges."""
        return layout_of([self]).read(self)

    def with_name(self, name: str) -> Generator:
        """The same generator under another name."""
        return replace(self, name=name)

    def __add__(self, other: Generator) -> Generator:
        if not isinstance(other, Generator):
            return NotImplemented
        return Generator.combination(f"{self.name} + {other.name}", [self, other], [1.0, 1.0])

    def __mul__(self, factor: float) -> Generator:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return Generator.combination(f"{factor:g} {self.name}", [self], [factor])

    __rmul__ = __mul__

    def __neg__(self) -> Generator:
        return -1 * self

    def __sub__(self, other: Generator) -> Generator:
        return self + (-other)


@dataclass(frozen=True)
class Layout:
    """Where the numbers of generators of one dimension and some charges stand in one vector."""

    dimension: int
    charges: tuple[str, ...]

    @property
    def length(self) -> int:
        """How many numbers there are."""
        return self.dimension * (self.dimension + 1) + 1 + len(self.charges)

    def read(self, generator: Generator) -> tuple[float, ...]:
        """The numbers of a generator."""
        entries = (entry for row in generator.matrix for entry in row)
        return (*entries, generator.intensity, *(generator.charges.get(name, 0.0) for name in self.charges))

    def generator(self, name: str, numbers: Sequence[float]) -> Generator:
        """The generator of some numbers."""
        width, count = self.dimension + 1, self.dimension * (self.dimension + 1)
        matrix = tuple(tuple(numbers[start : start + width]) for start in range(0, count, width))
        return Generator(name, matrix, numbers[count], dict(zip(self.charges, numbers[count + 1 :], strict=True)))


def layout_of(asked: Sequence[Generator]) -> Layout:
    """That which holds all of some generators; without any, that of the plane.

    Args:
        asked: The generators.

    Returns:
        The layout.

    Raises:
        ValueError: If they are of several dimensions.

    Example:
        >>> from lie_metric import generators
        >>> layout_of(generators("boost"))
        Layout(dimension=2, charges=('boost_x', 'boost_y'))
    """
    dimensions = sorted({generator.dimension for generator in asked}) or [2]
    if len(dimensions) > 1:
        raise ValueError(
            f"`generators` must be of one dimension to be combined, got {dimensions} of "
            f"{[generator.name for generator in asked]}. Give all matrices as many rows."
        )
    return Layout(dimensions[0], tuple(sorted({name for generator in asked for name in generator.charges})))


def coefficients(asked: Sequence[Generator]) -> Tensor:
    """The numbers of several generators as rows of one matrix.

    Args:
        asked: K generators of one dimension.

    Returns:
        A float64 matrix (K, numbers), with a column for each charge that any of them has.

    Raises:
        ValueError: If they are of several dimensions.

    Example:
        >>> from lie_metric import generators
        >>> coefficients(generators("boost", dimension=1)).tolist()
        [[0.0, 0.0, 0.0, 1.0]]
    """
    layout = layout_of(asked)
    rows = [layout.read(generator) for generator in asked]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(asked), layout.length)
