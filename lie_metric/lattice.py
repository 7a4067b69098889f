"""Transforms that permute samples: quarter turns, flips, the cube's symmetries, circular shifts by whole samples.

Nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lie_metric.cube import CUBE, CUBE_NAMES, Cubic

__all__ = [
    "CUBE",
    "CUBE_GROUPS",
    "ELEMENTS",
    "GROUPS",
    "Cubic",
    "Dihedral",
    "LatticeTransform",
    "LatticeTransforms",
    "Roll",
    "content_map",
    "elements",
]


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _size(image: Tensor) -> tuple[int, int]:
    if not isinstance(image, Tensor) or image.ndim < 2:
        got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"`image` must be a tensor with axes (..., H, W), got {got}. Reshape it.")
    return image.shape[-2], image.shape[-1]


@dataclass(frozen=True)
class Dihedral:
    r"""An element :math:`r^k s^m` of D4, the symmetries of the square: a flip of left and right, then quarter turns.

    Convention:
        x points right, y points down. A quarter turn turns the content clockwise as displayed, as
        :func:`lie_metric.transforms.rotate` does for an angle of π/2. ``flip_horizontal`` exchanges left and right,
        ``flip_vertical`` top and bottom, ``transpose`` mirrors at the diagonal from the top left corner,
        ``anti_transpose`` at the other one.

    Args:
        quarter_turns: The number k of quarter turns clockwise, taken modulo 4.
        mirrored: Whether left and right are exchanged before (m = 1).

    Raises:
        TypeError: If the number of turns is not an integer, or ``mirrored`` no bool.

    Example:
        >>> image = torch.tensor([[[1, 2], [3, 4]]])
        >>> ELEMENTS["rotate_90"](image).tolist()
        [[[3, 1], [4, 2]]]
        >>> (ELEMENTS["rotate_90"] @ ELEMENTS["flip_horizontal"]).name
        'anti_transpose'
    """

    quarter_turns: int
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not _whole(self.quarter_turns) or not isinstance(self.mirrored, bool):
            raise TypeError(
                f"`quarter_turns` must be an integer and `mirrored` a bool, got {self.quarter_turns!r} and "
                f"{self.mirrored!r}. Or take an element by name, e.g. `lattice.ELEMENTS['rotate_90']`."
            )
        object.__setattr__(self, "quarter_turns", self.quarter_turns % 4)

    @property
    def name(self) -> str:
        """The element's name, e.g. ``"rotate_90"``."""
        return (_MIRRORED if self.mirrored else _TURNS)[self.quarter_turns]

    @property
    def reach(self) -> int:
        """How many of the axes at the end it moves: 2, but for the identity and flips of the last one."""
        return {"identity": 0, "flip_horizontal": 1}.get(self.name, 2)

    @property
    def matrix(self) -> tuple[tuple[int, ...], ...]:
        """Where points (x, y) go."""
        cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[self.quarter_turns]
        side = -1 if self.mirrored else 1
        return (side * cosine, -sine), (side * sine, cosine)

    @property
    def inverse(self) -> Dihedral:
        """The element that undoes this one; mirror images undo themselves."""
        return self if self.mirrored else Dihedral(-self.quarter_turns)

    def __matmul__(self, first: Dihedral) -> Dihedral:
        """The composition: ``(g @ h)(image) == g(h(image))``."""
        if not isinstance(first, Dihedral):
            return NotImplemented
        turns = -first.quarter_turns if self.mirrored else first.quarter_turns
        return Dihedral(self.quarter_turns + turns, self.mirrored != first.mirrored)

    def __call__(self, image: Tensor) -> Tensor:
        """The transformed image.

        Args:
            image: Shape (..., H, W), any dtype; H = W for quarter turns and transpositions.

        Returns:
            The same pixels at other places, shape (..., H, W).

        Raises:
            ValueError: If the image has fewer than two axes, or is not square although it has to be.
        """
        height, width = _size(image)
        if self.quarter_turns % 2 and height != width:
            raise ValueError(
                f"`image` must be square for {self.name!r}, got {height}×{width}. Crop it, or use 'rotate_180' and "
                "the flips, which keep every size."
            )
        flipped = image.flip(-1) if self.mirrored else image
        return torch.rot90(flipped, -self.quarter_turns, (-2, -1))  # torch counts counter-clockwise

    def on_grid(self, grid: Tensor, size: tuple[int, ...]) -> Tensor:
        """The action on a feature map that belongs to images of a height and width: the same element.

        Args:
            grid: Shape (..., h, w).
            size: Height and width of the images.

        Returns:
            Shape (..., h, w).
        """
        return self(grid)


@dataclass(frozen=True, repr=False)
class Roll:
    r"""A circular shift by whole pixels, :math:`(g x)_{i,j} = x_{i + dy,\, j + dx}`, indices modulo the size.

    Convention:
        Positive numbers move the content to the left (dx) and up (dy), as in :func:`lie_metric.transforms.translate`
        with circular padding; :func:`torch.roll` counts the other way round.

    Args:
        dx: Shift along x, the last axis, in samples of the input.
        dy: Shift along y, the axis before.
        dz: Shift along z, the axis before that.

    Raises:
        TypeError: If a shift is not an integer.

    Example:
        >>> Roll(1)(torch.tensor([[1, 2, 3]])).tolist()
        [[2, 3, 1]]
        >>> Roll(1, -2).name, Roll(1, -2).inverse
        ('roll_1_-2', Roll(dx=-1, dy=2))
    """

    dx: int = 0
    dy: int = 0
    dz: int = 0

    def __post_init__(self) -> None:
        if not _whole(self.dx) or not _whole(self.dy) or not _whole(self.dz):
            of_z = f" and `dz` {self.dz!r}" if self.dz else ""
            raise TypeError(
                f"`dx` and `dy` must be integers, got {self.dx!r} and {self.dy!r}{of_z}. A shift by parts of a pixel "
                "interpolates: use `lie_metric.transforms.translate`."
            )

    def __repr__(self) -> str:
        return f"Roll(dx={self.dx!r}, dy={self.dy!r}{f', dz={self.dz!r}' if self.dz else ''})"

    @property
    def name(self) -> str:
        """The name, e.g. ``"roll_1_0"``; ``"roll_1_0_2"`` with a shift along z."""
        return f"roll_{self.dx}_{self.dy}" + (f"_{self.dz}" if self.dz else "")

    @property
    def reach(self) -> int:
        """How many of the axes at the end it moves."""
        return 3 if self.dz else 2 if self.dy else 1

    @property
    def matrix(self) -> tuple[tuple[int, ...], ...]:
        """What it does to directions: nothing."""
        return ()

    @property
    def inverse(self) -> Roll:
        """The shift back."""
        return Roll(-self.dx, -self.dy, -self.dz)

    def __call__(self, image: Tensor) -> Tensor:
        """The shifted image.

        Args:
            image: Shape (..., H, W), any dtype; with a shift along z (..., D, H, W).

        Returns:
            The shape of ``image``.

        Raises:
            ValueError: If the image has too few axes.
        """
        _size(image)
        if not self.dz:
            return image.roll((-self.dy, -self.dx), (-2, -1))
        if image.ndim < 3:
            raise ValueError(f"`image` must have axes (..., D, H, W) for {self!r}, got shape {tuple(image.shape)}.")
        return image.roll((-self.dz, -self.dy, -self.dx), (-3, -2, -1))

    def on_grid(self, grid: Tensor, size: tuple[int, ...]) -> Tensor:
        """The action on a feature map that belongs to images of a height and width: a shift by as much of its width.

        Args:
            grid: Shape (..., h, w).
            size: Height and width of the images; or depth, height and width of volumes.

        Returns:
            Shape (..., h, w).

        Raises:
            ValueError: If that is not a whole number of the feature map's pixels.
        """
        _size(grid)
        check_reach([self], size)
        steps = tuple(zip((self.dx, self.dy, self.dz), reversed(grid.shape), reversed(size), strict=False))
        if any(step * own % whole for step, own, whole in steps):
            own_size, whole_size = ("×".join(map(str, each)) for each in (grid.shape[-len(size) :], size))
            moved = " and ".join(f"{step * own / whole:g}" for step, own, whole in steps)
            raise ValueError(
                f"`Roll` must move an output of {own_size} by whole pixels, got {self.name!r} for images of "
                f"{whole_size}, which moves it by {moved}. Choose a multiple of the stride, e.g. `Roll(stride, 0)`."
            )
        return Roll(*(step * own // whole for step, own, whole in steps))(grid)


LatticeTransform = Dihedral | Roll | Cubic
LatticeTransforms = str | LatticeTransform | Iterable[str | LatticeTransform]

_TURNS = ("identity", "rotate_90", "rotate_180", "rotate_270")
_MIRRORED = ("flip_horizontal", "anti_transpose", "flip_vertical", "transpose")

ELEMENTS: dict[str, Dihedral] = {
    element.name: element for mirrored in (False, True) for k in range(4) for element in [Dihedral(k, mirrored)]
}
"""The eight elements of D4 by name, the identity first."""

GROUPS: dict[str, tuple[LatticeTransform, ...]] = {
    "rotations_90": tuple(ELEMENTS[name] for name in _TURNS[1:]),
    "flips": (ELEMENTS["flip_horizontal"], ELEMENTS["flip_vertical"]),
    "D4": tuple(element for name, element in ELEMENTS.items() if name != "identity"),
    "roll": (Roll(1, 0), Roll(0, 1)),
}
"""Names that stand for several transforms. The identity is left out, since it violates nothing."""


CUBE_GROUPS: dict[str, tuple[LatticeTransform, ...]] = {
    "flips_xyz": (CUBE["flip_x"], CUBE["flip_y"], CUBE["flip_z"]),
    "O": tuple(element for element in CUBE.values() if element.proper)[1:],
    "O_h": tuple(CUBE.values())[1:],
    "roll_xyz": (Roll(1), Roll(0, 1), Roll(0, 0, 1)),
}
"""Names that stand for several transforms of volumes, without the identity."""


def content_map(transform: LatticeTransform, dimension: int) -> Tensor:
    """Where points go on a grid of some dimension, without the step of a shift.

    Args:
        transform: The transform.
        dimension: How many axes the grid has, at least those that move.

    Returns:
        A matrix and a column of zeros, shape (1, d, d + 1), float64.

    Example:
        >>> content_map(ELEMENTS["rotate_90"], 2).tolist()
        [[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]
    """
    found = torch.eye(dimension, dimension + 1, dtype=torch.float64)
    matrix = transform.matrix[:dimension]
    for i, row in enumerate(matrix):
        found[i, : len(matrix)] = torch.tensor(row[: len(matrix)], dtype=torch.float64)
    return found[None]


def check_reach(transforms: Iterable[LatticeTransform], size: Sequence[int]) -> None:
    """Refuses transforms that move more axes than a grid has.

    Args:
        transforms: The transforms.
        size: The grid's size.

    Raises:
        ValueError: If one does.
    """
    for transform in transforms:
        if transform.reach > len(size):
            raise ValueError(
                f"`transforms` must move no more axes than the grid has, got {transform.name!r}, which moves "
                f"{transform.reach}, for inputs of size {tuple(size)}. Choose e.g. 'flip_horizontal' and `Roll(1)` for "
                "signals, 'D4' for images, 'O_h' for volumes."
            )


def elements(*names: LatticeTransforms) -> tuple[LatticeTransform, ...]:
    """Lattice transforms by name, by group, or as given, in the order asked for.

    Args:
        names: Names of elements of D4 ("rotate_90"), of groups ("rotations_90": the three rotations; "flips": the two
            flips; "D4": the seven elements besides the identity; "roll": one pixel along each axis), transforms, or
            sequences of them. Of volumes "rotate_x_90", "flip_z" and others of :data:`CUBE`, "flips_xyz", "O" (the 23
            turns of the cube besides the identity), "O_h" (with mirror images, 47) and "roll_xyz".

    Returns:
        The transforms, each once.

    Raises:
        TypeError: If an entry is neither a string, a transform nor a sequence of them.
        ValueError: If a name is unknown, nothing is asked for, or a transform is asked for twice.

    Example:
        >>> [g.name for g in elements("rotate_90", "flips", Roll(4, 0))]
        ['rotate_90', 'flip_horizontal', 'flip_vertical', 'roll_4_0']
    """
    found = tuple(_resolve(names))
    if not found:
        raise ValueError("`transforms` must name at least one transform, got none. Pass e.g. 'D4' or 'rotate_90'.")
    seen = [element.name for element in found]
    repeated = sorted({name for name in seen if seen.count(name) > 1})
    if repeated:
        raise ValueError(f"`transforms` must be distinct, got {repeated} more than once. Name each once.")
    return found


def _resolve(asked: object) -> Iterable[LatticeTransform]:
    if isinstance(asked, (Dihedral, Roll, Cubic)):
        yield asked
    elif isinstance(asked, str):
        known: dict[str, LatticeTransform] = {**ELEMENTS, **CUBE}
        groups = {**GROUPS, **CUBE_GROUPS}
        if asked in known:
            yield known[asked]
        elif asked in groups:
            yield from groups[asked]
        else:
            raise ValueError(
                f"`transforms` must name known transforms, got {asked!r}. Choose from {sorted(ELEMENTS)}, for volumes "
                f"from {sorted(CUBE_NAMES.values())}, from the groups {sorted(groups)}, or pass `Roll(dx, dy)`."
            )
    elif isinstance(asked, Iterable) and not isinstance(asked, (Tensor, bytes)):
        for entry in asked:
            yield from _resolve(entry)
    else:
        raise TypeError(
            f"`transforms` must be names, lattice transforms or sequences of them, got {asked!r}. "
            "Pass e.g. 'D4' or ('rotate_90', Roll(4, 0))."
        )
