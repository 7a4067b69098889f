"""Transforms of one-parameter groups: listed, drawn for each image, or by how far they move pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lie_metric.algebra import Generator, horizon, only_moves
from lie_metric.algebra import generators as resolve
from lie_metric.orbits.element import Element, Frame
from lie_metric.randomness import source
from lie_metric.representations import Representation
from lie_metric.representations.composite import taken
from lie_metric.resampling import Resampling, coordinate_dtype
from lie_metric.transforms import parameter_of, reads_inside, warp

__all__ = ["Border", "DisplacedOrbit", "RandomOrbit", "displaced", "listed", "uniform"]

Generators = str | Generator | Sequence[str | Generator]
Border = Literal["auto", "crop", "reflect"]


@dataclass(frozen=True)
class RandomOrbit:
    r"""Elements :math:`\exp(\sum_k t_k X_k)`, with parameters that are fixed, or uniform and of each image its own.

    Args:
        name: Under which results are reported.
        generators: K generators.
        low: Lower ends of the K parameters, in their units.
        high: Upper ends; equal to the lower ones for fixed parameters.
        samples: How many elements are drawn for each image.

    Raises:
        ValueError: If a parameter is not finite, the ends are in the wrong order, or nothing is drawn.

    Example:
        >>> [orbit.name for orbit in listed("rotation", (0.1, 0.2))]
        ['rotation_0.1', 'rotation_0.2']
    """

    name: str
    generators: tuple[Generator, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    samples: int = 1

    def __post_init__(self) -> None:
        ends = (*self.low, *self.high)
        if not all(math.isfinite(end) for end in ends) or any(a > b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(
                f"`low` and `high` must be finite and in this order, got {self.low} and {self.high}. Give the interval "
                "of each parameter in units of t, e.g. -0.25 and 0.25."
            )
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"`samples` must be a positive integer, got {self.samples!r}.")

    @property
    def complete(self) -> bool:
        """False: a continuous group has no finite list of elements."""
        return False

    def __len__(self) -> int:
        return self.samples

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements for a batch; parameters depend on the seed and each image's number alone."""
        low, high = torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        rows = []
        for index in indices if self.low != self.high else (0,):
            rows.append(torch.rand(self.samples, len(low), dtype=torch.float64, generator=source(seed, index)))
        parameters = low + (high - low) * torch.stack(rows, 1)
        return [self._element(t, resampling) for t in parameters]

    def _element(self, t: Tensor, resampling: Resampling) -> Element:
        def on(image: Tensor) -> Tensor:
            return t.to(image.device, coordinate_dtype(image.device))

        return Element(
            lambda image: warp(image, self.generators, on(image), resampling),
            lambda image: warp(image, self.generators, -on(image), resampling),
            lambda image, spacing: reads_inside(image, self.generators, -on(image), resampling, spacing),
            lambda representation, tensor, direction: self._act(representation, tensor, direction * t, resampling),
        )

    def _act(self, representation: Representation, tensor: Tensor, t: Tensor, resampling: Resampling) -> Tensor:
        """An action of the representation's own, one image after the other where each has its parameters."""

        def one(carrier: Representation, rows: Tensor, parameters: list[float]) -> Tensor:
            if len(parameters) == 1:
                return carrier.act(rows, self.generators[0], parameters[0], resampling)
            together = Generator.combination("together", self.generators, parameters)
            return carrier.act(rows, together, 1.0, resampling)

        if len(t) == 1:
            return one(representation, tensor, t[0].tolist())
        moved = []
        for row, step in enumerate(t.tolist()):
            own = taken(representation, row)
            moved.append(one(own, tensor[row : row + 1], step))
        return torch.cat(moved)


@dataclass(frozen=True)
class DisplacedOrbit:
    r"""One transform that moves the pixels by a stated distance, the root mean square over the frame.

    Shifts along an axis are by whole pixels and interpolate nothing. With the border "crop" nothing is invented
    either: two frames of one image, ``pixels`` apart and as much smaller than it, are compared. "reflect" keeps the
    size of the image, for models that take one size only, and mirrors what enters. Other transforms resample, and
    their border is that of the stencil.

    Args:
        name: Under which results are reported.
        generator: What moves the pixels.
        pixels: How far.
        border: Of shifts; "auto" is "crop" where the model runs on the smaller frame, and "reflect" otherwise, and for
            less than a hundredth of the side, where mirrored pixels matter less than a network of another size.

    Example:
        >>> orbit = displaced("rotation", (2,))[0]
        >>> orbit.name, round(orbit.parameter((224, 224), Resampling()), 4)  # 2 / (112 sqrt(2 / 3)) radian
        ('rotation_2px', 0.0219)
    """

    name: str
    generator: Generator
    pixels: float
    border: Border = "auto"

    @property
    def complete(self) -> bool:
        """False: it is one element."""
        return False

    def __len__(self) -> int:
        return 1

    @property
    def shifts(self) -> bool:
        """Whether it is a shift along an axis."""
        return _axis(self.generator) is not None

    def parameter(self, size: tuple[int, ...], resampling: Resampling) -> float:
        """The t that moves pixels so far.

        Args:
            size: Height and width of the images.
            resampling: The stencil, which fixes the unit of length.

        Returns:
            t, in the generator's units.
        """
        return parameter_of(self.generator, self.pixels, tuple(size), resampling)

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The element, the same for every image; refused where half of the image would leave."""
        if min(size) < 2 * self.pixels:
            raise ValueError(
                f"`transforms` must leave half of the image in the frame, got {self.name!r} for images of "
                f"{'×'.join(map(str, size))} pixels. Pass smaller ones, e.g. `orbits.displaced('translation', (1, 2))`."
            )
        axis = _axis(self.generator)
        if axis is None:
            return self._interpolated(indices, size, seed, resampling)
        step = int(self.pixels) * (1 if self.generator.matrix[axis][-1] > 0 else -1)
        margin = abs(step) if self.border != "reflect" else 0
        inner = tuple(side - margin for side in size)

        def frame(first: int) -> Frame:
            start = [0] * len(size)
            start[-1 - axis] = first if margin else 0
            return Frame(tuple(start), inner)

        here, there = frame(max(-step, 0)), frame(max(step, 0))
        # What is brought back is an output of the frame, in which the unit of length is another.
        (back,) = self._interpolated(indices, inner, seed, resampling)
        if not margin:
            return [replace(back, forward=lambda image: _mirrored(image, step, axis))]
        return [replace(back, forward=there.of, frame=here)]

    def _interpolated(
        self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling
    ) -> list[Element]:
        t = (self.parameter(size, resampling),)
        return RandomOrbit(self.name, (self.generator,), t, t).draw(indices, size, seed, resampling)


def _axis(generator: Generator) -> int | None:
    """0, 1 or 2 for a shift along x, y or z, None for any other generator."""
    moved = [axis for axis, row in enumerate(generator.matrix) if row[-1]]
    if generator.intensity or len(moved) != 1 or any(any(row[:-1]) for row in generator.matrix) or horizon(generator):
        return None
    return moved[0]


def _mirrored(image: Tensor, step: int, axis: int) -> Tensor:
    """The image read by whole pixels further along the axis, mirrored about the outer edges of its pixels."""
    length = image.shape[-1 - axis]
    place = (torch.arange(length, device=image.device) + step) % (2 * length)
    return image.index_select(-1 - axis, torch.minimum(place, 2 * length - 1 - place))


def listed(generators: Generators, parameters: Sequence[float], *, dimension: int = 2) -> tuple[RandomOrbit, ...]:
    """Given parameters of each of some generators, one orbit of one element for each.

    Args:
        generators: Names, groups or generators.
        parameters: Values of t in the generators' units: half of the shorter side, radian, log factor, slope.
        dimension: In which names are meant: 1 for signals, 3 for volumes.

    Returns:
        Orbits named ``generator_t``.

    Raises:
        ValueError: If there are no parameters.

    Example:
        >>> [orbit.name for orbit in listed("translation", [0.25])]
        ['translation_x_0.25', 'translation_y_0.25']
    """
    values = [float(value) for value in parameters]
    if not values:
        raise ValueError("`parameters` must hold at least one value of t, got none. Pass e.g. (0.1, 0.2).")
    return tuple(
        RandomOrbit(f"{generator.name}_{value:g}", (generator,), (value,), (value,))
        for generator in resolve(generators, dimension=dimension)
        for value in values
    )


def uniform(
    generators: Generators, limit: float, samples: int = 4, name: str | None = None, *, dimension: int = 2
) -> RandomOrbit:
    """Random elements: every parameter uniform in [-limit, limit], drawn anew for each image.

    Several generators act together, as the exponential of their sum: both axes of "translation" make one shift.

    Args:
        generators: Names, groups or generators.
        limit: The largest parameter, in units of t.
        samples: How many elements are drawn for each image.
        name: Under which results are reported; by default ``asked_within_limit``, e.g. ``translation_within_0.25``.
        dimension: In which names are meant: 1 for signals, 3 for volumes.

    Returns:
        The orbit.

    Raises:
        ValueError: If the limit is not positive.

    Example:
        >>> orbit = uniform("translation", 0.25, samples=8)
        >>> orbit.name, len(orbit)
        ('translation_within_0.25', 8)
    """
    if not limit > 0:
        raise ValueError(f"`limit` must be positive, got {limit!r}. Give it in units of t, e.g. 0.25.")
    found = resolve(generators, dimension=dimension)
    label = generators if isinstance(generators, str) else "+".join(generator.name for generator in found)
    ends = tuple(float(limit) for _ in found)
    return RandomOrbit(name or f"{label}_within_{limit:g}", found, tuple(-end for end in ends), ends, samples)


def displaced(
    generators: Generators = ("translation", "rotation", "scale"),
    pixels: Sequence[float] = (1, 2, 8),
    border: Border = "auto",
    *,
    dimension: int = 2,
) -> tuple[DisplacedOrbit, ...]:
    r"""Transforms of each of some generators that move pixels by stated distances, one orbit for each.

    Args:
        generators: Names, groups or generators that move pixels.
        pixels: Root mean squares over the frame of how far; whole numbers for shifts.
        border: What enters where an image is shifted by whole pixels, see :class:`DisplacedOrbit`.
        dimension: In which names are meant: 1 for signals, which have no rotation, 3 for volumes.

    Returns:
        Orbits named ``generator_2px``.

    Raises:
        ValueError: If there are no distances, one is not positive or not whole for a shift, or a generator moves no
            pixels.

    Example:
        >>> [orbit.name for orbit in displaced("translation", (2,))]
        ['translation_x_2px', 'translation_y_2px']
    """
    if border not in get_args(Border):
        raise ValueError(f"`border` must be one of {get_args(Border)}, got {border!r}.")
    distances = [float(distance) for distance in pixels]
    if not distances or not all(0 < distance < math.inf for distance in distances):
        raise ValueError(f"`pixels` must hold positive distances, got {pixels!r}. Pass e.g. (1, 2, 8).")
    found = resolve(generators, dimension=dimension)
    unmoved = [generator.name for generator in found if not only_moves(generator)]
    if unmoved:
        raise ValueError(
            f"`generators` must move pixels and nothing else, got {unmoved}. Use "
            f"`orbits.listed({unmoved[0]!r}, [0.1])` for these."
        )
    broken = [distance for distance in distances if distance != int(distance)]
    if broken and any(_axis(generator) is not None for generator in found):
        raise ValueError(
            f"`pixels` must be whole for shifts, which are not interpolated, got {broken}. Pass e.g. (1, 2, 8), or "
            "`orbits.listed('translation', [0.01])` for interpolated shifts."
        )
    return tuple(
        DisplacedOrbit(f"{generator.name}_{distance:g}px", generator, distance, border)
        for generator in found
        for distance in distances
    )
