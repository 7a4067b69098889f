"""Which orbits have no meaning for inputs that move in a given way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lie_metric.binding import moved_parts, off_grid, resolve_for, unnamed_parts
from lie_metric.options import Layout
from lie_metric.orbits import DisplacedOrbit, LatticeOrbit, MatrixOrbit, Orbit, PermutationOrbit
from lie_metric.representations import Image, Masked
from lie_metric.representations.composite import common_dimension

__all__ = ["check_permuted", "refuse_other_dimensions"]


def refuse_other_dimensions(asked: Sequence[Orbit], layout: Layout | None) -> None:
    """Refuses transforms of images for inputs that are none, and those of another dimension."""
    wanted = common_dimension(dict(layout) if isinstance(layout, Mapping) else {"": layout or Image()})
    for orbit in asked:
        moving = [orbit.generator] if isinstance(orbit, DisplacedOrbit) else getattr(orbit, "generators", ())
        if isinstance(orbit, (DisplacedOrbit, LatticeOrbit)) and off_grid(layout):
            raise ValueError(
                f"`transforms` must act on the inputs, got {orbit.name!r}, which moves pixels, for {layout!r}. Pass "
                "e.g. `orbits.listed('rotation', (0.5,), dimension=3)`, `orbits.permutations()` or "
                "`orbits.matrices({'inversion': ...})`."
            )
        if moving:
            resolve_for(tuple(moving), layout)
        if isinstance(orbit, MatrixOrbit) and wanted not in {None, len(orbit.maps[0])}:
            raise ValueError(
                f"`transforms` must be maps of {wanted} dimensions, got {orbit.name!r} with {len(orbit.maps[0])} rows."
            )


def check_permuted(orbit: PermutationOrbit, inputs: Any, layout: Layout | None) -> None:
    """Refuses permutations where it is not said which of several tensors stand at the points."""
    if not isinstance(layout, Mapping):
        return
    named, unknown = moved_parts(inputs, layout), sorted(set(orbit.along) - set(layout))
    if unknown:
        raise ValueError(f"`along` must name moved parts, got {unknown} for {list(layout)}.")
    along = orbit.along or (tuple(layout) if len(layout) == 1 else ())
    padded = [name for name in along if isinstance(layout[name], Masked)]
    counts = {name: named[name].shape[1] if named[name].ndim > 1 else 1 for name in along}
    left = [
        name
        for name, part in unnamed_parts(inputs, layout).items()
        if part.ndim > 1 and part.shape[1] in counts.values()
    ]
    if not along or left or padded or len(set(counts.values())) > 1:
        got = (
            f"{padded} with padding" if padded
            else f"{left} beside {list(along)}, which are not moved" if left
            else f"the parts {list(layout)}" if not along
            else f"parts of {counts} points"
        )  # fmt: skip
        raise TypeError(
            f"`transforms` must say by `orbits.permutations(along=...)` which parts stand at the points, all of them, "
            f"got {got}. Name what stands there, numbers as floating-point `Invariant()` or `Tensors(3, 0)`; clouds "
            "without padding."
        )
