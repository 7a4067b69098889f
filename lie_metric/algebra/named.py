"""The generators and groups that have names, on the line, in the plane and in space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from lie_metric.algebra.generator import Generator
from lie_metric.algebra.projective import PERSPECTIVE

__all__ = ["GENERATORS", "GROUPS", "generators", "named"]

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
        groups["perspective"] = PERSPECTIVE
        groups["projective"] = (*groups["affine"], *PERSPECTIVE)
        groups["photometric"] = ("brightness", "contrast", "chroma", "hue", "blur")
    charged = [*groups.get("perspective", ()), *groups.get("photometric", ())]
    of_images = [of(name, charges={name: 1.0}) for name in charged]
    return by_name | {one.name: one for one in (*boosts, *of_images)}, groups


def generators(*names: str | Generator | Iterable[str | Generator], dimension: int = 2) -> tuple[Generator, ...]:
    """Generators by name, by group, or as given, in the order asked for.

    Args:
        names: Names of generators ("rotation"), of groups, :class:`Generator` objects, or sequences of them. Groups of
            the plane: "translation", "shear", "stretch" (both axes), "rigid", "similarity"; "affine": the nine named
            affine generators; "all": these and "saturation"; "perspective" (both axes) and "projective": "affine" with
            these; "boost" and "galilean", for velocities; "photometric", for
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
