"""What a monitor measures beside the Lie derivatives, on the same images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lie_metric.algebra import Generator, only_moves
from lie_metric.binding import on_grid
from lie_metric.curves.keys import FAMILIES, TITLES
from lie_metric.metrics import FiniteEquivarianceError, StencilError
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Layout
from lie_metric.orbits import displaced

__all__ = ["beside", "by_name"]

# The displacement at which the first order is compared with what happens.
_LINEAR = 1.0


def beside(
    generators: Sequence[Generator], input_representation: Layout | None, displacement: float | None, floor: bool
) -> dict[str, ModelMetric]:
    """What stands beside the Lie derivatives by default.

    Args:
        generators: The generators.
        input_representation: How the input carries the action.
        displacement: By how many pixels images are moved for the finite error; None for none.
        floor: Whether the stencil's own error is measured.

    Returns:
        Metrics by name.
    """
    found: dict[str, ModelMetric] = {}
    moving = [each for each in generators if only_moves(each)]
    pixels_move = on_grid(input_representation) and all(each.dimension == 2 for each in moving)
    if displacement is not None and pixels_move:
        distances = {"finite": displacement, "linearity": _LINEAR}
        for name, pixels in distances.items():
            orbits = [replace(one, name=one.generator.name) for one in displaced(moving, (pixels,))] if moving else []
            if orbits:
                found[name] = FiniteEquivarianceError(orbits)
    if floor and moving and pixels_move:
        found["floor"] = StencilError(moving)
    return found


def by_name(metrics: Sequence[ModelMetric] | Mapping[str, ModelMetric]) -> dict[str, ModelMetric]:
    """Metrics under their names, which become a part of keys.

    Args:
        metrics: A sequence, or a mapping from names.

    Returns:
        Metrics by name.

    Raises:
        TypeError: If something else is given.
        ValueError: If a name is taken, repeated, or no part of a key.
    """
    if isinstance(metrics, Mapping):
        found = dict(metrics)
    elif isinstance(metrics, (tuple, list)):
        names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(metric).__name__).lower() for metric in metrics]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"`metrics` must be a mapping from names when two are of one kind, got {repeated} more than once. Pass "
                "e.g. {'small': ..., 'large': ...}."
            )
        found = dict(zip(names, metrics, strict=True))
    else:
        raise TypeError(f"`metrics` must be a sequence or a mapping of metrics, got {metrics!r}. Put it into a list.")
    taken = {suffix.strip("_") for suffix, _ in FAMILIES.values()} | {"se", *TITLES}
    for name, metric in found.items():
        if not isinstance(metric, ModelMetric):
            raise TypeError(
                f"`metrics` must be metrics of this library, got {metric!r} for {name!r}. Pass e.g. "
                "`lie_metric.PredictionConsistency()`."
            )
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name in taken or name.endswith("_se"):
            raise ValueError(
                f"`metrics` must have names of letters, digits and '_', that are not among {sorted(taken)} and do not "
                f"end in '_se', got {name!r}. They become a part of the logged keys."
            )
    return found
