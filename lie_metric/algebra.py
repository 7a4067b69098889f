"""Generators of one-parameter groups, and their linear algebra.

Affine maps of the line, the plane, space or any other dimension act on coordinates; intensities and named charges
stand for what moves no coordinates. Every generator is a vector of numbers, so that whatever is linear in the generator
has to be computed for a basis only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["GENERATORS", "GROUPS", "Generator", "exponential", "generators", "spanning_set"]

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

    Convention:
        x points right, y down and z away, right-handed; the origin is the image centre and 1 is half of the shorter
        side. The matrix maps output coordinates to input coordinates, as in :func:`torch.nn.functional.affine_grid`: a
        positive translation moves the content to the left (x) or up (y), a positive scale enlarges it, and a positive
        rotation turns it by the right hand about its axis, which is clockwise as displayed in the plane.

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
            >>> Generator.combination("shear_x", generators("rotation", "hyperbolic_rotation"), [0.5, 0.5])
            Generator(name='shear_x', matrix=((0.0, 1.0, 0.0), (0.0, 0.0, 0.0)), intensity=0.0)
        """
        numbers = coefficients.tolist() if isinstance(coefficients, Tensor) else list(coefficients)
        if len(numbers) != len(generators):
            raise ValueError(
                f"`coefficients` must hold {len(generators)} numbers, one for each generator, got {len(numbers)}. "
                "Pass one row of principal directions, e.g. `directions[0]`."
            )
        layout = _layout(generators)
        total = [0.0] * layout.length
        for number, generator in zip(numbers, generators, strict=True):
            total = [entry + number * own for entry, own in zip(total, layout.read(generator), strict=True)]
        return layout.generator(name, total)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The matrix row by row, the intensity, and the charges by name: seven numbers in the plane without charges."""
        return _layout([self]).read(self)

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
class _Layout:
    """Where the numbers of generators of one dimension and some charges stand in one vector."""

    dimension: int
    charges: tuple[str, ...]

    @property
    def length(self) -> int:
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


def _layout(asked: Sequence[Generator]) -> _Layout:
    """That which holds all of some generators; without any, that of the plane."""
    dimensions = sorted({generator.dimension for generator in asked}) or [2]
    if len(dimensions) > 1:
        raise ValueError(
            f"`generators` must be of one dimension to be combined, got {dimensions} of "
            f"{[generator.name for generator in asked]}. Give all matrices as many rows."
        )
    return _Layout(dimensions[0], tuple(sorted({name for generator in asked for name in generator.charges})))


def coefficients(asked: Sequence[Generator]) -> Tensor:
    """The numbers of several generators as rows of one matrix.

    Args:
        asked: K generators of one dimension.

    Returns:
        A float64 matrix (K, numbers), with a column for each charge that any of them has.

    Raises:
        ValueError: If they are of several dimensions.

    Example:
        >>> coefficients(generators("boost", dimension=1)).tolist()
        [[0.0, 0.0, 0.0, 1.0]]
    """
    layout = _layout(asked)
    rows = [layout.read(generator) for generator in asked]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(asked), layout.length)


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
"""The named generators of the plane: the affine ones, and ``saturation`` with X·x = x."""

GROUPS: dict[str, tuple[str, ...]] = {
    "translation": ("translation_x", "translation_y"),
    "shear": ("shear_x", "shear_y"),
    "stretch": ("stretch_x", "stretch_y"),
    "rigid": ("translation_x", "translation_y", "rotation"),
    "similarity": ("translation_x", "translation_y", "rotation", "scale"),
    "affine": tuple(name for name in GENERATORS if name != "saturation"),
    "all": tuple(GENERATORS),
}
"""Names that stand for several generators of the plane."""

_AXES = "xyz"


@lru_cache(maxsize=8)
def named(dimension: int) -> tuple[Mapping[str, Generator], Mapping[str, tuple[str, ...]]]:
    """The generators and groups that have names in a dimension.

    Args:
        dimension: The dimension. There are names for 1, 2 and 3.

    Returns:
        Generators by name, and names of generators by the name of their group.

    Example:
        >>> generators, groups = named(3)
        >>> groups["rigid"]
        ('translation_x', 'translation_y', 'translation_z', 'rotation_x', 'rotation_y', 'rotation_z')
        >>> generators["rotation_z"].matrix
        ((0.0, 1.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))
    """
    axes = range(dimension)
    if dimension not in {1, 2, 3}:
        return {}, {}

    def of(name: str, *entries: tuple[int, int, float], **rates: Any) -> Generator:
        rows = [[0.0] * (dimension + 1) for _ in axes]
        for row, column, value in entries:
            rows[row][column] = value
        return Generator(name, tuple(map(tuple, rows)), **rates)

    found = [of(f"translation_{_AXES[k]}", (k, dimension, 1)) for k in axes]
    # The right hand turns x to y, y to z and z to x.
    turns = (
        [of(f"rotation_{_AXES[k]}", ((k + 1) % 3, (k + 2) % 3, 1), ((k + 2) % 3, (k + 1) % 3, -1)) for k in axes]
        if dimension == 3
        else []
    )
    pairs = [(i, j) for i in axes for j in axes if i != j]
    if dimension == 3:
        found += turns
        found += [of(f"hyperbolic_{_AXES[i]}{_AXES[j]}", (i, j, 1), (j, i, 1)) for i, j in pairs if i < j]
    found += [of("scale", *((k, k, -1) for k in axes))]
    if dimension == 3:
        found += [of(f"shear_{_AXES[i]}{_AXES[j]}", (i, j, 1)) for i, j in pairs]
        found += [of(f"stretch_{_AXES[k]}", (k, k, 1)) for k in axes]
    found += [of("saturation", intensity=1.0)]
    by_name = dict(GENERATORS) if dimension == 2 else {generator.name: generator for generator in found}
    groups = {
        kind: tuple(name for name in by_name if name.split("_")[0] == kind)
        for kind in ("translation", "rotation", "hyperbolic", "shear", "stretch")
        if dimension == 3 or kind == "translation"
    }
    rigid = (*groups["translation"], *groups.get("rotation", ()))
    groups |= {"rigid": rigid, "similarity": (*rigid, "scale")}
    groups |= {"affine": tuple(name for name in by_name if name != "saturation"), "all": tuple(by_name)}
    groups = dict(GROUPS) if dimension == 2 else groups
    boosts = [of(f"boost_{_AXES[k]}", charges={f"boost_{_AXES[k]}": 1.0}) for k in axes]
    groups["boost"] = tuple(boost.name for boost in boosts)
    groups["galilean"] = (*groups["rigid"], *groups["boost"])
    if dimension == 2:
        groups["photometric"] = ("brightness", "contrast", "chroma", "hue", "blur")
    colours = [of(name, charges={name: 1.0}) for name in groups.get("photometric", ())]
    return by_name | {one.name: one for one in (*boosts, *colours)}, groups


def generators(*names: str | Generator | Iterable[str | Generator], dimension: int = 2) -> tuple[Generator, ...]:
    """Generators by name, by group, or as given, in the order asked for.

    Args:
        names: Names of generators ("rotation"), of groups, :class:`Generator` objects, or sequences of them. Groups of
            the plane: "translation", "shear", "stretch" (both axes), "rigid", "similarity"; "affine": the nine named
            affine generators; "all": these and "saturation"; "boost" and "galilean", for velocities; "photometric", for
            :class:`~lie_metric.representations.Photograph`. In space there are "rotation" (about three axes) and
            "hyperbolic" besides.
        dimension: In which the names are meant: 1, 2 or 3 for names, any for generators.

    Returns:
        The generators, each once.

    Raises:
        TypeError: If an entry is neither a string, a generator nor a sequence of them.
        ValueError: If a name is unknown, a generator is of another dimension, nothing is asked for, or two results
            would bear the same name.

    Example:
        >>> [g.name for g in generators("translation", "rotation")]
        ['translation_x', 'translation_y', 'rotation']
        >>> [g.name for g in generators("rotation", dimension=3)]
        ['rotation_x', 'rotation_y', 'rotation_z']
    """
    found = tuple(_resolve(names, dimension))
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


def _resolve(asked: object, dimension: int) -> Iterable[Generator]:
    if isinstance(asked, Generator):
        if asked.dimension != dimension:
            raise ValueError(
                f"`generators` must be of dimension {dimension}, got {asked.name!r} with a matrix of {asked.dimension} "
                f"rows. Give it {dimension} rows of {dimension + 1} numbers, zeros where it moves nothing."
            )
        yield asked
    elif isinstance(asked, str):
        known, groups = named(dimension)
        if asked in groups:
            yield from (known[name] for name in groups[asked])
        elif asked in known:
            yield known[asked]
        else:
            place = {1: " of the line", 2: "", 3: " of space"}.get(dimension, f" of dimension {dimension}")
            choice = f"Choose from {sorted(known)}, from the groups {sorted(groups)}, or pass" if known else "Pass"
            raise ValueError(
                f"`generators` must name known generators{place}, got {asked!r}. {choice} "
                "`Generator.affine(name, matrix)`."
            )
    elif isinstance(asked, Iterable) and not isinstance(asked, (Tensor, bytes)):
        for entry in asked:
            yield from _resolve(entry, dimension)
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
        >>> [generator.name for generator in simplest_basis(generators("rotation", "scale"))[0]]
        ['rotation', 'scale']
        >>> [sum(map(bool, generator.coefficients)) for generator in simplest_basis(generators("affine"))[0]]
        [1, 1, 1, 1, 1, 1]
    """
    rows, layout = coefficients(asked), _layout(asked)
    used = rows.any(dim=0).nonzero()[:, 0].tolist()
    basis, matrix = spanning_set(asked)
    if len(used) > len(basis):
        return basis, matrix
    units = torch.eye(layout.length, dtype=torch.float64)[used].tolist()
    named_units = tuple(layout.generator(f"entry {index}", unit) for index, unit in zip(used, units, strict=True))
    return named_units, rows[:, used]


def exponential(asked: Generator | Sequence[Generator], t: Tensor) -> Tensor:
    """The affine maps exp(tA), or exp(Σ_k t_k A_k), in homogeneous coordinates.

    A true one-parameter group: ``exponential(g, s) @ exponential(g, t) == exponential(g, s + t)`` up to rounding, and
    the identity exactly at t = 0.

    Args:
        asked: A generator with its d×(d + 1) matrix A, or K of them.
        t: Group parameter, any shape, floating point; gradients flow to it. With K generators its last axis is K.

    Returns:
        Matrices of shape (*t.shape, d + 1, d + 1), without the axis of K, in the dtype of ``t``; they map output to
        input coordinates.

    Example:
        >>> exponential(GENERATORS["translation_x"], torch.tensor(0.5))[:2].tolist()
        [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]
        >>> exponential(generators("translation"), torch.tensor([0.5, 2.0]))[:2].tolist()
        [[1.0, 0.0, 0.5], [0.0, 1.0, 2.0]]
    """
    if isinstance(asked, Generator):
        asked, t = (asked,), t[..., None]
    matrices = [[*generator.matrix, (0.0,) * (generator.dimension + 1)] for generator in asked]
    total = (t[..., None, None] * torch.tensor(matrices, dtype=t.dtype, device=t.device)).sum(-3)
    return torch.linalg.matrix_exp(total)
