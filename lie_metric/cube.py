"""The symmetries of the cube as permutations of voxels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

__all__ = ["CUBE", "CUBE_NAMES", "Cubic"]


@dataclass(frozen=True)
class Cubic:
    r"""An element of O_h, the 48 symmetries of the cube: axes are exchanged, and some of them turned round.

    .. math:: p'_i = s_i\, p_{a_i}

    Convention:
        Of a volume (..., D, H, W) x runs along the last axis, y along the one before, z along the one before that, and
        the content moves from p to p'. ``rotate_z_90`` turns it from x to y, by the right hand about z, as the
        generator ``rotation_z`` does for an angle of π/2; ``flip_x`` turns the x axis round; ``inversion`` all three.

    Args:
        axes: For each axis of the result the axis that it was: x, y and z are 0, 1 and 2.
        signs: 1, or -1 where it is turned round.

    Raises:
        ValueError: If the axes are no permutation, or a sign is another number.

    Example:
        >>> import torch
        >>> line = torch.tensor([1, 2]).expand(2, 2, 2)  # grows along x
        >>> CUBE["rotate_z_90"](line)[0].tolist()  # along y
        [[1, 1], [2, 2]]
        >>> (CUBE["rotate_z_90"] @ CUBE["rotate_z_90"]).name
        'rotate_z_180'
        >>> len(CUBE)
        48
    """

    axes: tuple[int, int, int]
    signs: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        axes, signs = tuple(self.axes), tuple(self.signs)
        if sorted(axes) != [0, 1, 2] or len(signs) != 3 or not set(signs) <= {1, -1}:
            raise ValueError(
                f"`axes` must be a permutation of (0, 1, 2) and `signs` three numbers 1 or -1, got {self.axes!r} and "
                f"{self.signs!r}. Or take an element by name, e.g. `lattice.CUBE['rotate_z_90']`."
            )
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "signs", signs)

    @property
    def name(self) -> str:
        """The element's name, e.g. ``"rotate_x_90"``; others by what becomes of the axes, ``"cube_+y+z+x"``."""
        return CUBE_NAMES.get((self.axes, self.signs)) or "cube_" + "".join(
            f"{'+' if sign > 0 else '-'}{'xyz'[axis]}" for axis, sign in zip(self.axes, self.signs, strict=True)
        )

    @property
    def matrix(self) -> tuple[tuple[int, ...], ...]:
        """Where points (x, y, z) go."""
        return tuple(
            tuple(sign if column == axis else 0 for column in range(3))
            for axis, sign in zip(self.axes, self.signs, strict=True)
        )

    @property
    def proper(self) -> bool:
        """Whether it is a turn, of which there are 24, and no mirror image."""
        even = self.axes in {(0, 1, 2), (1, 2, 0), (2, 0, 1)}
        return even == (self.signs.count(-1) % 2 == 0)

    @property
    def reach(self) -> int:
        """How many of the axes at the end it moves."""
        return max((i + 1 for i in range(3) if (self.axes[i], self.signs[i]) != (i, 1)), default=0)

    @property
    def inverse(self) -> Cubic:
        """The element that undoes this one."""
        axes = [self.axes.index(axis) for axis in range(3)]
        return Cubic((axes[0], axes[1], axes[2]), (self.signs[axes[0]], self.signs[axes[1]], self.signs[axes[2]]))

    def __matmul__(self, first: Cubic) -> Cubic:
        """The composition: ``(g @ h)(volume) == g(h(volume))``."""
        if not isinstance(first, Cubic):
            return NotImplemented
        a, b, c = self.axes
        x, y, z = self.signs
        signs = first.signs
        return Cubic((first.axes[a], first.axes[b], first.axes[c]), (x * signs[a], y * signs[b], z * signs[c]))

    def __call__(self, volume: Tensor) -> Tensor:
        """The transformed volume.

        Args:
            volume: Shape (..., D, H, W), any dtype; axes that are exchanged are of one length.

        Returns:
            The same voxels at other places, shape (..., D, H, W).

        Raises:
            ValueError: If the volume has fewer than three axes, or those that are exchanged are not of one length.
        """
        if not isinstance(volume, Tensor) or volume.ndim < 3:
            got = f"shape {tuple(volume.shape)}" if isinstance(volume, Tensor) else type(volume).__name__
            raise ValueError(f"`volume` must be a tensor with axes (..., D, H, W), got {got}. Reshape it.")
        if any(volume.shape[-1 - new] != volume.shape[-1 - old] for new, old in enumerate(self.axes)):
            raise ValueError(
                f"`volume` must be as long along all axes that {self.name!r} exchanges, got "
                f"{'×'.join(map(str, volume.shape[-3:]))}. Crop it to a cube, or use 'flip_x', 'flip_y', 'flip_z' and "
                "turns by 180, which keep every size."
            )
        lead = range(volume.ndim - 3)
        moved = volume.permute(*lead, *(volume.ndim - 1 - self.axes[new] for new in (2, 1, 0)))
        return moved.flip([-1 - axis for axis, sign in enumerate(self.signs) if sign < 0])

    def on_grid(self, grid: Tensor, size: tuple[int, ...]) -> Tensor:
        """The action on a feature map that belongs to volumes of a size: the same element.

        Args:
            grid: Shape (..., d, h, w).
            size: Depth, height and width of the volumes.

        Returns:
            Shape (..., d, h, w).
        """
        return self(grid)


def _quarter_turns(axis: int) -> list[Cubic]:
    """The quarter turns about an axis, by the right hand."""
    quarter = (Cubic((0, 2, 1), (1, -1, 1)), Cubic((2, 1, 0), (1, 1, -1)), Cubic((1, 0, 2), (-1, 1, 1)))[axis]
    return [quarter, quarter @ quarter, quarter @ quarter @ quarter]


CUBE_NAMES: dict[tuple[tuple[int, int, int], tuple[int, int, int]], str] = {
    **{
        (turn.axes, turn.signs): f"rotate_{letter}_{degrees}"
        for axis, letter in enumerate("xyz")
        for turn, degrees in zip(_quarter_turns(axis), (90, 180, 270), strict=True)
    },
    ((0, 1, 2), (-1, 1, 1)): "flip_x",
    ((0, 1, 2), (1, -1, 1)): "flip_y",
    ((0, 1, 2), (1, 1, -1)): "flip_z",
    ((0, 1, 2), (-1, -1, -1)): "inversion",
}
"""Names of quarter turns, flips and the inversion, by axes and signs."""

CUBE: dict[str, Cubic] = {
    element.name: element
    for element in sorted(
        (
            Cubic(axes, (x, y, z))
            for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2))
            for x, y, z in itertools.product((1, -1), repeat=3)
        ),
        key=lambda element: not element.proper,
    )
}
"""The 48 elements of O_h by name, the identity first, the 24 turns before the mirror images."""
