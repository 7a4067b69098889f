"""Transforms that permute pixels: quarter turns, flips and circular shifts by whole pixels. Nothing is interpolated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ELEMENTS", "GROUPS", "Dihedral", "LatticeTransform", "LatticeTransforms", "Roll", "elements"]


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

    def on_grid(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """The action on a feature map that belongs to images of a height and width: the same element.

        Args:
            grid: Shape (..., h, w).
            size: Height and width of the images.

        Returns:
            Shape (..., h, w).
        """
        return self(grid)


@dataclass(frozen=True)
class Roll:
    r"""A circular shift by whole pixels, :math:`(g x)_{i,j} = x_{i + dy,\, j + dx}`, indices modulo the size.

    Convention:
        Positive numbers move the content to the left (dx) and up (dy), as in :func:`lie_metric.transforms.translate`
        with circular padding; :func:`torch.roll` counts the other way round.

    Args:
        dx: Shift along x, in pixels of the input.
        dy: Shift along y.

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

    def __post_init__(self) -> None:
        if not _whole(self.dx) or not _whole(self.dy):
            raise TypeError(
                f"`dx` and `dy` must be integers, got {self.dx!r} and {self.dy!r}. A shift by parts of a pixel "
                "interpolates: use `lie_metric.transforms.translate`."
            )

    @property
    def name(self) -> str:
        """The name, e.g. ``"roll_1_0"``."""
        return f"roll_{self.dx}_{self.dy}"

    @property
    def inverse(self) -> Roll:
        """The shift back."""
        return Roll(-self.dx, -self.dy)

    def __call__(self, image: Tensor) -> Tensor:
        """The shifted image.

        Args:
            image: Shape (..., H, W), any dtype.

        Returns:
            Shape (..., H, W).

        Raises:
            ValueError: If the image has fewer than two axes.
        """
        _size(image)
        return image.roll((-self.dy, -self.dx), (-2, -1))

    def on_grid(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """The action on a feature map that belongs to images of a height and width: a shift by as much of its width.

        Args:
            grid: Shape (..., h, w).
            size: Height and width of the images.

        Returns:
            Shape (..., h, w).

        Raises:
            ValueError: If that is not a whole number of the feature map's pixels.
        """
        h, w = _size(grid)
        (height, width) = size
        if self.dx * w % width or self.dy * h % height:
            raise ValueError(
                f"`Roll` must move an output of {h}×{w} by whole pixels, got {self.name!r} for images of "
                f"{height}×{width}, which moves it by {self.dx * w / width:g} and {self.dy * h / height:g}. Choose a "
                "multiple of the stride, e.g. `Roll(stride, 0)`."
            )
        return Roll(self.dx * w // width, self.dy * h // height)(grid)


LatticeTransform = Dihedral | Roll
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


def elements(*names: LatticeTransforms) -> tuple[LatticeTransform, ...]:
    """Lattice transforms by name, by group, or as given, in the order asked for.

    Args:
        names: Names of elements of D4 ("rotate_90"), of groups ("rotations_90": the three rotations; "flips": the two
            flips; "D4": the seven elements besides the identity; "roll": one pixel along each axis), transforms, or
            sequences of them.

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
    if isinstance(asked, (Dihedral, Roll)):
        yield asked
    elif isinstance(asked, str):
        if asked in ELEMENTS:
            yield ELEMENTS[asked]
        elif asked in GROUPS:
            yield from GROUPS[asked]
        else:
            raise ValueError(
                f"`transforms` must name known transforms, got {asked!r}. Choose from {sorted(ELEMENTS)}, from the "
                f"groups {sorted(GROUPS)}, or pass `Roll(dx, dy)`."
            )
    elif isinstance(asked, Iterable) and not isinstance(asked, (Tensor, bytes)):
        for entry in asked:
            yield from _resolve(entry)
    else:
        raise TypeError(
            f"`transforms` must be names, lattice transforms or sequences of them, got {asked!r}. "
            "Pass e.g. 'D4' or ('rotate_90', Roll(4, 0))."
        )
