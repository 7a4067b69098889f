"""What central differences of a function tell in which precision: along a line, of jumps and kinks, of a product."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lie_metric.jacobian.methods import Function
from lie_metric.jacobian.precision import coarsest

__all__ = ["DOUBTFUL", "LEVELS", "Level", "Line", "compared", "finite", "kinks", "level_of", "relative"]


class Level(NamedTuple):
    """What differences can tell of a function that is computed in some precision.

    Attributes:
        eps: The relative rounding of one operation.
        steps: Steps of central differences, as parts of the norm of the inputs.
        tolerance: The relative error of products that a sound method has.
        finest: The interval that the search for a jump ends at: inputs still tell its ends apart.
        rounding: How many times ``eps`` of its norm rounding changes a value at most.
    """

    eps: float
    steps: tuple[float, ...]
    tolerance: float
    finest: float
    rounding: float


# In float64 the tolerance is the rounding of differences, in float32 that of deep networks.
LEVELS = (
    Level(torch.finfo(torch.float64).eps, (1e-6, 1e-5, 1e-4, 1e-7), 1e-6, 1e-13, 1e6),
    Level(torch.finfo(torch.float32).eps, (3e-3, 1e-2, 1e-3), 2e-2, 5e-6, 1e2),
    Level(torch.finfo(torch.bfloat16).eps, (3e-2, 1e-1, 1e-2), 1e-1, 1e-3, 1e1),
)
# Differences that are further apart than this say nothing.
_UNSURE = 5e-2
# Ties and rounding that change derivatives by less than this are not worth a warning.
DOUBTFUL = 1e-2


class Line:
    """A function along a line, f(x + s a).

    Args:
        function: f.
        point: x.
        along: a.
        alone: Whether x is one image, and images do not influence one another: then several s make one batch.
    """

    def __init__(self, function: Function, point: Tensor, along: Tensor, alone: bool) -> None:
        self.function, self.point, self.along, self.alone = function, point, along, alone

    def at(self, *places: float) -> tuple[Tensor, ...]:
        """Values at several s."""
        points = [self.point + place * self.along for place in places]
        if self.alone and len(points) > 1:
            try:
                values = self.function(torch.cat(points))
            except torch.OutOfMemoryError:
                raise
            except Exception:
                pass  # a model may insist on the size of a batch
            else:
                if len(values) == len(points):
                    return values.split(1)
        return tuple(self.function(point) for point in points)

    def differences(self, *steps: float) -> list[Tensor]:
        """Central differences of several steps."""
        values = self.at(*steps, *(-step for step in steps))
        ahead, behind = values[: len(steps)], values[len(steps) :]
        return [(a - b) / (2 * step) for a, b, step in zip(ahead, behind, steps, strict=True)]

    def jumps(self, reach: float, slope: float, level: Level) -> bool:
        """Whether f jumps between -reach and reach, by halving the interval towards the larger change.

        Args:
            reach: Half of the interval.
            slope: A rate of change that is no jump.
            level: The precision.

        Returns:
            Whether a change remains that neither a slope nor rounding nor noise explains.
        """
        places, (start, end) = (-reach, reach), self.at(-reach, reach)
        rounding = level.rounding * level.eps * float(torch.maximum(start.norm(), end.norm()))
        while places[1] - places[0] > level.finest:
            if not bool((end - start).norm() > rounding):
                return False
            middle = sum(places) / 2
            (between,) = self.at(middle)
            if bool((between - start).norm() >= (end - between).norm()):
                places, end = (places[0], middle), between
            else:
                places, start = (middle, places[1]), between
        change, length = float((end - start).norm()), places[1] - places[0]
        if not change > max(rounding, 100 * slope * length):
            return False
        # Noise changes as much everywhere, a jump does so in one place.
        values = self.at(-reach, length - reach, reach - length, reach)
        return change > 10 * float(torch.maximum((values[1] - values[0]).norm(), (values[3] - values[2]).norm()))


def kinks(line: Line, exact: Tensor) -> list[str]:
    """What central differences at the image itself say of a derivative there, if it is not theirs.

    Args:
        line: A line through the image.
        exact: The derivative along it.

    Returns:
        Sentences; none if there is nothing to say.
    """
    kinks, off, level = [], [], LEVELS[0]
    for step in level.steps[0], level.steps[-1]:
        behind, at, ahead = line.at(-step, 0.0, step)
        if not bool((ahead - behind).norm() > 1e4 * level.eps * at.norm()):
            return []  # it is at rest
        kinks.append(relative(ahead - at, at - behind))
        mean = (ahead - behind) / (2 * step)
        off.append(float((exact - mean).norm() / mean.norm()))
    if min(off) <= DOUBTFUL:
        return []
    if min(kinks) <= DOUBTFUL:
        return [
            f"at the image itself its derivative is {min(off):.0%} off the change that is seen on both sides, as where "
            "what is exactly zero is masked: `method='difference'` measures that change"
        ]
    return [
        "at the image itself it has a kink, as a maximum or ReLU has on areas that are exactly constant: the "
        f"derivatives on the two sides differ by {min(kinks):.0%}, and the one given is {min(off):.0%} off their mean, "
        "which `method='difference'` measures"
    ]


def compared(
    product: Tensor, found: list[Tensor], size: float, level: Level
) -> tuple[Literal["agrees", "inconclusive", "differs"], float]:
    """Whether a product is among the differences of several steps, and how far the nearest is.

    Args:
        product: The product.
        found: Central differences of the level's steps.
        size: The norm of the function's value.
        level: The precision.

    Returns:
        The verdict, and the relative distance.
    """
    found = [part for part in found if finite(part)]
    if not found:
        return "inconclusive", float("nan")
    errors = [relative(product, part) for part in found]
    if min(errors) <= level.tolerance:
        return "agrees", min(errors)
    step = max(level.steps)
    rounding = 10 * level.eps * size / step
    if min(float((product - part).norm()) for part in found) <= rounding and level is not LEVELS[2]:
        return "agrees", min(errors)  # both are zero as far as can be told
    # What the rounding of the two values makes of a difference, and what differences of other steps make of it.
    scale = max(float(product.norm()), *(float(part.norm()) for part in found))
    pairs = combinations(found, 2)
    nearest = min(
        (float((a - b).norm()) / max(float(product.norm()), float(a.norm()), float(b.norm())) for a, b in pairs),
        default=float("inf"),
    )
    unsure = max(level.eps * size / step / scale, nearest)
    if not unsure <= _UNSURE:
        return "inconclusive", min(errors)
    return ("differs" if min(errors) > 10 * unsure else "agrees"), min(errors)


def level_of(function: Function, x: Tensor) -> Level:
    """The precision that a function computes in.

    Args:
        function: The function.
        x: Where it is evaluated.

    Returns:
        The level.
    """
    eps = coarsest(function, x)
    return next((level for level in LEVELS if eps <= level.eps), LEVELS[-1])


def relative(one: Tensor, other: Tensor) -> float:
    """How far two values are apart, relative to the larger.

    Args:
        one: A value.
        other: Another.

    Returns:
        The distance.
    """
    size = float(torch.maximum(one.norm(), other.norm()))
    return float((one - other).norm()) / size if size != 0 else 0.0


def finite(values: Tensor) -> bool:
    """Whether values are neither NaN nor infinite.

    Args:
        values: Any shape.

    Returns:
        Whether all of them are finite.
    """
    return bool(torch.isfinite(values).all())
