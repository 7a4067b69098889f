"""Finite transforms under which outputs are compared: listed, drawn for each image, or exact on the lattice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from lie_metric.algebra import Generator
from lie_metric.algebra import generators as resolve
from lie_metric.lattice import CUBE, ELEMENTS, LatticeTransform, LatticeTransforms, check_reach, content_map, elements
from lie_metric.randomness import source
from lie_metric.representations import Representation, map_grid, map_samples, scalar_fields
from lie_metric.resampling import Resampling, coordinate_dtype
from lie_metric.transforms import pixels_per_unit, reads_inside, warp

__all__ = [
    "Border",
    "DisplacedOrbit",
    "Element",
    "LatticeOrbit",
    "Orbit",
    "Orbits",
    "RandomOrbit",
    "displaced",
    "lattice",
    "listed",
    "orbits",
    "uniform",
]

Generators = str | Generator | Sequence[str | Generator]
Border = Literal["auto", "crop", "reflect"]


class Frame(NamedTuple):
    """A part of an image, signal or volume, in samples.

    Attributes:
        start: The first index along each axis: row and column of an image.
        size: How many samples it has along each axis.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, image: Tensor) -> Tensor:
        """That part of images (..., H, W)."""
        for axis, (first, count) in enumerate(zip(self.start, self.size, strict=True), start=-len(self.size)):
            image = image.narrow(axis, first, count)
        return image


@dataclass(frozen=True)
class Element:
    """One transform of each image of a batch, and how an output is brought back from it.

    Args:
        forward: From images (B, C, H, W) to the transformed images.
        backward: From maps (B, C, h, w) on the output's grid to maps transformed by the inverse.
        inside: From maps on the output's grid, and the distances between its samples, to booleans (B or 1, h, w): what
            of the inverse was read in the frame.
        act: From a representation with an action of its own, a tensor, and 1 or -1 for the inverse, to the tensor
            transformed by that action; None where there are images alone to go by.
        frame: What of an image the transformed one is compared with, where it shows another part of the image as large;
            None for the whole image.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    inside: Callable[[Tensor, tuple[float, ...]], Tensor]
    act: Callable[[Representation, Tensor, int], Tensor] | None = None
    frame: Frame | None = None

    def on(self, representation: Representation, tensor: Tensor, direction: int = 1) -> Tensor:
        """The transform of whatever a representation says the tensor is.

        Args:
            representation: How the tensor carries the action.
            tensor: One entry for each image on its first axis.
            direction: 1, or -1 for the inverse.

        Returns:
            The transformed tensor, of the same shape.
        """
        if self.act is not None and not scalar_fields(representation):
            return self.act(representation, tensor, direction)
        return map_grid(representation, tensor, self.forward if direction > 0 else self.backward)

    def valid(self, representation: Representation, tensor: Tensor) -> Tensor:
        """Ones for the entries that the inverse read in the frame, zeros elsewhere.

        Args:
            representation: How the tensor carries the action.
            tensor: One entry for each image on its first axis.

        Returns:
            A tensor of the same shape; ones if the representation has no ``map``, and so no frame.
        """
        ones = torch.ones_like(tensor)
        if not callable(getattr(representation, "map", None)):
            return ones
        spacing = getattr(representation, "spacing", ())
        return map_grid(
            representation, ones, lambda image: self.inside(image, spacing)[:, None].expand_as(image).to(image.dtype)
        )


@runtime_checkable
class Orbit(Protocol):
    """A named set of finite transforms.

    Attributes:
        name: Under which results are reported.
        complete: Whether the elements are all of a finite group, so that a mean over them has no error of sampling.
    """

    @property
    def name(self) -> str:
        """Under which results are reported."""

    @property
    def complete(self) -> bool:
        """Whether the elements are all of a group."""

    def __len__(self) -> int:
        """The number of elements."""

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements for images of the given running numbers and size, height and width."""


Orbits = str | LatticeTransform | Orbit | Iterable[Any]


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

        def one(rows: Tensor, parameters: list[float]) -> Tensor:
            if len(parameters) == 1:
                return representation.act(rows, self.generators[0], parameters[0], resampling)
            together = Generator.combination("together", self.generators, parameters)
            return representation.act(rows, together, 1.0, resampling)

        if len(t) == 1:
            return one(tensor, t[0].tolist())
        return torch.cat([one(rows, step.tolist()) for rows, step in zip(tensor.split(1), t, strict=True)])


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
        return self.pixels / pixels_per_unit(self.generator, size, resampling)

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
    if generator.intensity or len(moved) != 1 or any(any(row[:-1]) for row in generator.matrix):
        return None
    return moved[0]


def _mirrored(image: Tensor, step: int, axis: int) -> Tensor:
    """The image read by whole pixels further along the axis, mirrored about the outer edges of its pixels."""
    length = image.shape[-1 - axis]
    place = (torch.arange(length, device=image.device) + step) % (2 * length)
    return image.index_select(-1 - axis, torch.minimum(place, 2 * length - 1 - place))


@dataclass(frozen=True)
class LatticeOrbit:
    """Permutations of pixels: nothing is interpolated, and nothing leaves the frame.

    Args:
        name: Under which results are reported.
        transforms: The elements.
        complete: Whether they are all of a group, the identity among them.

    Example:
        >>> len(lattice("D4")[-1]), lattice("D4")[-1].name
        (8, 'D4')
    """

    name: str
    transforms: tuple[LatticeTransform, ...]
    complete: bool = False

    def __len__(self) -> int:
        return len(self.transforms)

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements, the same for every image; refused where they move axes that the grid has not."""
        check_reach(self.transforms, size)
        return [self._element(transform, size) for transform in self.transforms]

    @staticmethod
    def _element(transform: LatticeTransform, size: tuple[int, ...]) -> Element:
        maps = content_map(transform, len(size))

        def back(grid: Tensor) -> Tensor:
            return transform.inverse.on_grid(grid, size)

        def act(representation: Representation, tensor: Tensor, direction: int) -> Tensor:
            if direction > 0:
                return map_samples(representation, tensor, transform, maps)
            return map_samples(representation, tensor, back, content_map(transform.inverse, len(size)))

        def inside(grid: Tensor, spacing: tuple[float, ...]) -> Tensor:
            return torch.ones((1, *grid.shape[2:]), dtype=torch.bool, device=grid.device)

        return Element(transform, back, inside, act)


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
    unmoved = [generator.name for generator in found if generator.intensity or not any(map(any, generator.matrix))]
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


def lattice(*transforms: LatticeTransforms) -> tuple[LatticeOrbit, ...]:
    """Transforms that permute pixels, one orbit for each, and one for each whole group that is asked for by name.

    Args:
        transforms: As in :func:`lie_metric.lattice.elements`. "D4" and "rotations_90" add the mean over the group,
            and for volumes "O" and "O_h".

    Returns:
        The orbits.

    Example:
        >>> [orbit.name for orbit in lattice("rotations_90")]
        ['rotate_90', 'rotate_180', 'rotate_270', 'C4']
    """
    single = [LatticeOrbit(element.name, (element,)) for element in elements(*transforms)]
    whole = [_WHOLE[name] for name in transforms if isinstance(name, str) and name in _WHOLE]
    return (*single, *whole)


_WHOLE = {
    "rotations_90": LatticeOrbit("C4", tuple(ELEMENTS.values())[:4], complete=True),
    "D4": LatticeOrbit("D4", tuple(ELEMENTS.values()), complete=True),
    "O": LatticeOrbit("O", tuple(CUBE.values())[:24], complete=True),
    "O_h": LatticeOrbit("O_h", tuple(CUBE.values()), complete=True),
}


def orbits(*asked: Orbits) -> tuple[Orbit, ...]:
    """Orbits from names of lattice transforms, from lattice transforms, or as given.

    Args:
        asked: Names ("rotate_90", "flips", "D4"), lattice transforms, orbits, or sequences of them.

    Returns:
        The orbits, of distinct names.

    Raises:
        TypeError: If an entry is none of these.
        ValueError: If nothing is asked for, or two orbits have one name.

    Example:
        >>> [orbit.name for orbit in orbits("flips", listed("rotation", [0.5]))]
        ['flip_horizontal', 'flip_vertical', 'rotation_0.5']
    """
    found = tuple(_resolve(asked))
    if not found:
        raise ValueError("`transforms` must hold at least one orbit, got none. Pass e.g. listed('rotation', [0.5]).")
    names = [orbit.name for orbit in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`transforms` must have distinct names, got {repeated} more than once. Name each once.")
    return found


def _resolve(asked: object) -> Iterable[Orbit]:
    if isinstance(asked, (str, LatticeTransform)):
        yield from lattice(asked)
    elif isinstance(asked, Orbit):
        yield asked
    elif isinstance(asked, Iterable) and not isinstance(asked, (Tensor, bytes)):
        for entry in asked:
            yield from _resolve(entry)
    else:
        raise TypeError(
            f"`transforms` must be names of lattice transforms, orbits, or sequences of them, got {asked!r}. Pass e.g. "
            "'D4', `orbits.listed('rotation', [0.5])` or `orbits.uniform('translation', 0.25)`."
        )
