"""Tensors that stand on grids of samples, pixels or voxels, and those on which nothing acts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lie_metric import transforms
from lie_metric.algebra import PERSPECTIVE, Generator, horizon
from lie_metric.representations.fields import Field, Image, Mapped
from lie_metric.representations.protocol import Representation, check_axes
from lie_metric.resampling import Resampling

__all__ = ["ChannelsLast", "Field", "Image", "Invariant", "Padded", "Tokens", "grid_size", "map_grid", "map_samples"]


def map_grid(representation: Representation, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor with a function on images applied to what of it stands on a grid.

    Args:
        representation: How the tensor is laid out; it must have a method ``map(tensor, function)``.
        tensor: The tensor.
        function: From images (B, C, H, W) to images; of fields of d dimensions from (B, C, *grid).

    Returns:
        The tensor in the same layout; what stands on no grid is unchanged.

    Raises:
        TypeError: If the representation has no method ``map``.

    Example:
        >>> map_grid(ChannelsLast(), torch.tensor([[[[1], [2]]]]), lambda image: image.flip(-1)).flatten().tolist()
        [2, 1]
    """
    mapping = getattr(representation, "map", None)
    if not callable(mapping):
        raise TypeError(
            f"`representation` must have a method `map(tensor, function)` for transforms that are not of a "
            f"one-parameter group, got {representation!r}. Add one that applies `function` to the images "
            "(B, C, H, W) within the tensor."
        )
    return mapping(tensor, function)


def map_samples(
    representation: Representation, tensor: Tensor, function: Callable[[Tensor], Tensor], maps: Tensor
) -> Tensor:
    """The tensor after a map of space that takes samples to samples.

    Args:
        representation: How the tensor is laid out.
        tensor: The tensor.
        function: From images (B, C, *grid) to images with the samples at their new places.
        maps: Where points go, shape (1, d, d + 1), by which a fibre turns.

    Returns:
        The tensor in the same layout.

    Raises:
        ValueError: If the map exchanges axes along which samples are not as far apart.

    Example:
        >>> from lie_metric.representations import Vectors
        >>> mirror = torch.tensor([[[-1.0, 0.0]]])
        >>> arrows = Field(1, fibre=Vectors(1))
        >>> map_samples(arrows, torch.tensor([[[1.0, 2.0]]]), lambda signal: signal.flip(-1), mirror).tolist()
        [[[-2.0, -1.0]]]
    """
    spacing = getattr(representation, "spacing", ())
    if spacing:
        apart = torch.tensor(spacing, dtype=torch.float64)
        if not torch.equal(maps[0, :, :-1].to(apart).abs() @ apart, apart):
            raise ValueError(
                f"`transforms` must not exchange axes along which samples are {spacing} apart, got a map of "
                f"{maps[0, :, :-1].tolist()}. Choose flips, or quarter turns about an axis across which they are alike."
            )
    moved = map_grid(representation, tensor, function)
    turned = getattr(representation, "turned", None)
    return turned(moved, maps) if callable(turned) else moved


def grid_size(representation: Representation, inputs: Tensor) -> tuple[int, ...]:
    """Height and width of the images within a tensor; of volumes depth, height and width.

    Args:
        representation: How the tensor is laid out.
        inputs: The tensor.

    Returns:
        As many numbers as the grid has axes.

    Raises:
        ValueError: If nothing of the tensor stands on a grid.

    Example:
        >>> grid_size(ChannelsLast(), torch.zeros(1, 5, 7, 3))
        (5, 7)
    """
    map_grid(representation, inputs, lambda image: image)  # refuses what has no method `map`
    seen = images_within(representation, inputs)
    if not seen:
        raise ValueError(
            f"`input_representation` must hold images, got {representation!r}, on which no transform acts. "
            "Pass e.g. `lie_metric.representations.Image()`."
        )
    return seen[0][1:]


def images_within(representation: Representation, tensor: Tensor) -> list[tuple[int, ...]]:
    """Channels, height and width of the images within a tensor; none if it does not say where they are."""
    seen: list[tuple[int, ...]] = []
    dimension = getattr(representation, "dimension", None) or 2

    def look(image: Tensor) -> Tensor:
        seen.append(tuple(image.shape[-1 - dimension :]))
        return image

    if callable(getattr(representation, "map", None)):
        map_grid(representation, tensor, look)
    return seen


def planar_size(representation: Representation, inputs: Tensor, measure: str) -> tuple[int, int]:
    """Height and width of images, where a measure is one of images.

    Args:
        representation: How the tensor is laid out.
        inputs: The tensor.
        measure: The measure's name.

    Returns:
        Height and width.

    Raises:
        TypeError: If it holds signals, volumes, or fields of other than scalars.

    Example:
        >>> planar_size(ChannelsLast(), torch.zeros(1, 5, 7, 3), "eq_t")
        (5, 7)
    """
    size = grid_size(representation, inputs)
    if len(size) != 2 or getattr(representation, "fibre", None) or getattr(representation, "spacing", ()):
        raise TypeError(
            f"`{measure}` must be measured on images of scalars with square pixels, got {representation!r}. Measure "
            "`relative`, or `finite_equivariance_error` with `orbits.listed`, which know every field."
        )
    return size[0], size[1]


def scalar_fields(representation: Representation) -> bool:
    """Whether a representation is a layout of scalar fields, on which every transform of images acts alike.

    Args:
        representation: Any representation.

    Returns:
        False if it has an :meth:`~Representation.act` of its own, a fibre, or distances between its samples.

    Example:
        >>> scalar_fields(Image())
        True
    """
    plain = isinstance(representation, Mapped) and type(representation).act in {Mapped.act, Field.act, Tokens.act}
    return plain and not (getattr(representation, "fibre", None) or getattr(representation, "spacing", ()))


def refuse_own_action(representation: Representation, measure: str) -> None:
    """Refuses outputs with an action of their own where a measure can only move the places of pixels.

    Args:
        representation: How the output transforms.
        measure: The measure's name.

    Raises:
        TypeError: If it is no layout of scalar fields.
    """
    if not scalar_fields(representation) or getattr(representation, "dimension", None) not in {None, 2}:
        raise TypeError(
            f"`output_representation` must be a layout of scalars for `{measure}`, got {representation!r}, which has "
            "an action of its own: its components turn with the image, and the transforms of this measure move only "
            "places. Measure `finite_equivariance_error`, or scalars made of the output with `output=`."
        )


@dataclass(frozen=True)
class Invariant(Mapped):
    """The trivial representation: nothing acts, as on class scores. X · y = 0.

    Example:
        >>> import torch, lie_metric as lm
        >>> Invariant().tangents(torch.ones(2, 5), lm.generators("affine"), lm.Resampling()).abs().max().item()
        0.0
    """

    dimension = None
    charges = frozenset()

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts every tensor with a batch axis.

        Raises:
            ValueError: If the tensor has no axes.
        """
        if tensor.ndim == 0:
            raise ValueError(f"`{name}` must have a batch axis, got a tensor without axes. Return one value per image.")

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """Zeros of shape (K, *tensor.shape)."""
        return tensor.new_zeros((len(generators), *tensor.shape))

    def map(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor itself."""
        return tensor

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One block (B, 1, elements): each element has a mean of its own."""
        return (tensor.reshape(tensor.shape[0], 1, -1),)


@dataclass(frozen=True)
class ChannelsLast(Mapped):
    """Feature maps (B, H, W, C); every channel is a scalar field, moved by the transform.

    Example:
        >>> import torch, lie_metric as lm
        >>> ChannelsLast().act(torch.rand(2, 8, 8, 3), lm.generators("scale")[0], 0.1, lm.Resampling()).shape
        torch.Size([2, 8, 8, 3])
    """

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts (B, H, W, C).

        Raises:
            ValueError: If the tensor has another number of axes, or is empty.
        """
        check_axes(tensor, name, "(B, H, W, C)", 4)

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, B, H, W, C)."""
        self._check_generators(generators)
        return transforms.tangents(tensor, generators, resampling, channels_last=True)

    def map(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The function of the feature map with its channels first; it may add leading axes."""
        return function(tensor.movedim(-1, 1)).movedim(-3, -1)

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One block (B, H·W, C)."""
        return (tensor.flatten(1, 2),)


@dataclass(frozen=True)
class Tokens(Mapped):
    """Sequences (B, N, C) whose tokens stand on a grid, row by row, behind prefix tokens on which nothing acts.

    Args:
        grid_size: Rows and columns of the grid; N = prefix + rows · columns. Of signals the one length, of volumes
            depth, height and width, the last running fastest.
        prefix: Number of leading tokens that stand for no place (class, distillation, register tokens).
        spacing: Distances between tokens along x, y, z, the last axis first, where they differ, as of
            :class:`Field`: patches of 8 slices by 16 by 16 voxels have (16, 16, 8).

    Raises:
        ValueError: If a size is not positive, the prefix negative, or the spacing does not fit the grid.

    Example:
        >>> import torch, lie_metric as lm
        >>> tokens = torch.rand(2, 17, 8)
        >>> moved = Tokens((4, 4), prefix=1).tangents(tokens, lm.generators("rotation"), lm.Resampling())
        >>> moved.shape, moved[:, :, 0].abs().max().item()
        (torch.Size([1, 2, 17, 8]), 0.0)
    """

    grid_size: tuple[int, ...]
    prefix: int = 0
    spacing: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        asked = (*self.grid_size, self.prefix) if hasattr(self.grid_size, "__iter__") else ()
        whole = all(isinstance(one, (int, float)) or hasattr(one, "__index__") for one in asked)
        sizes = tuple(int(one) for one in asked[:-1]) if whole and all(one % 1 == 0 for one in asked) else ()
        if len(sizes) not in {1, 2, 3} or min(sizes) < 1 or self.prefix < 0:
            raise ValueError(
                "`grid_size` must be two positive integers, or one or three, and `prefix` not negative, got "
                f"{self.grid_size!r} and {self.prefix!r}. A 224-pixel image in patches of 16 has grid_size=(14, 14)."
            )
        transforms.check_spacing(self.spacing, len(sizes))
        object.__setattr__(self, "grid_size", sizes)
        object.__setattr__(self, "prefix", int(self.prefix))
        object.__setattr__(self, "spacing", tuple(float(step) for step in self.spacing))

    @property
    def dimension(self) -> int:  # type: ignore[override]
        """How many axes the grid has."""
        return len(self.grid_size)

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts (B, prefix + places, C).

        Raises:
            ValueError: If the tensor has another number of axes or tokens.
        """
        check_axes(tensor, name, "(B, N, C)", 3)
        needed = self.prefix + math.prod(self.grid_size)
        if tensor.shape[1] != needed:
            raise ValueError(
                f"`{name}` must have {needed} tokens ({self.prefix} prefix tokens and a grid of {self.grid_size}), got "
                f"shape {tuple(tensor.shape)}. Give the grid and prefix that fit, `Tokens(grid_size, prefix)`."
            )

    def _grid(self, tensor: Tensor) -> Tensor:
        """The grid tokens as an image (B, C, *grid)."""
        return tensor[:, self.prefix :].mT.unflatten(-1, self.grid_size)

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, B, N, C); zero on prefix tokens."""
        self._check_generators(generators)
        grid = tensor[:, self.prefix :].unflatten(1, self.grid_size)
        moved = transforms.tangents(grid, generators, resampling, channels_last=True, spacing=self.spacing)
        moved = moved.flatten(-1 - self.dimension, -2)
        return nn.functional.pad(moved, (0, 0, self.prefix, 0)) if self.prefix else moved

    def map(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The function of the grid tokens as an image; prefix tokens stay."""
        moved = function(self._grid(tensor)).flatten(-self.dimension).mT
        return torch.cat([tensor[:, : self.prefix], moved], dim=1)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tokens, of the same shape; prefix tokens stay.

        Raises:
            ValueError: If the generator is of another dimension.
        """
        self._check_generators([generator])
        return self.map(tensor, lambda grid: transforms.apply(grid, generator, t, resampling, spacing=self.spacing))

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The grid (B, places, C), and before it, where there are any, the prefix tokens (B, 1, prefix · C)."""
        grid = tensor[:, self.prefix :]
        return (tensor[:, : self.prefix].flatten(1)[:, None], grid) if self.prefix else (grid,)


@dataclass(frozen=True)
class Padded:
    """A field with a border around it, or with its own border cut off, that moves as the field alone did.

    Its unit of length is half of the field's shorter side and its centre that of the field, whatever the border adds:
    a padding moves with the image everywhere but at the border that it makes up.

    Args:
        carrier: The layout, :class:`Image` or :class:`ChannelsLast`.
        sides: How many pixels are added left, right, at the top and at the bottom; negative ones are cut off.

    Example:
        >>> import torch, lie_metric as lm
        >>> ramp, X = torch.arange(8.0).expand(1, 1, 8, 8), lm.generators("translation_x")
        >>> wide = torch.arange(-1.0, 9).expand(1, 1, 10, 10)
        >>> moved = Padded(Image(), (1, 1, 1, 1)).tangents(wide, X, lm.Resampling("cubic"))
        >>> moved[..., 4].unique(), Image().tangents(ramp, X, lm.Resampling("cubic"))[..., 3].unique()
        (tensor([4.]), tensor([4.]))
    """

    carrier: Representation
    sides: tuple[float, float, float, float]

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts what the layout accepts."""
        self.carrier.check(tensor, name)

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, *tensor.shape)."""
        return self.carrier.tangents(tensor, [self._within(g, tensor, resampling) for g in generators], resampling)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor, of the same shape."""
        return self.carrier.act(tensor, self._within(generator, tensor, resampling), t, resampling)

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Those of the layout."""
        return self.carrier.components(tensor)

    def _within(self, generator: Generator, tensor: Tensor, resampling: Resampling) -> Generator:
        """The generator in coordinates q of the whole tensor, with p = a q + b: what moves p by Lp + v."""
        height, width = grid_size(self.carrier, tensor)
        left, right, top, bottom = self.sides
        corners = int(resampling.align_corners)
        inside = min(width - left - right, height - top - bottom) - corners
        a = (min(width, height) - corners) / inside
        x, y = (right - left) / inside, (bottom - top) / inside
        rows = [(along_x, along_y, (along_x * x + along_y * y + v) / a) for along_x, along_y, v in generator.matrix]
        if below := horizon(generator):
            # (w·p) p / a = (a w·q + w·b)(q + b / a): what is quadratic stays a perspective, the rest is affine.
            turned, still = [a * w for w in below], below[0] * x + below[1] * y
            for k, shift in enumerate((x, y)):
                row = [entry - w * shift for entry, w in zip(rows[k], (*below, still / a), strict=True)]
                row[k] -= still
                rows[k] = (row[0], row[1], row[2])
            charges = dict(zip(PERSPECTIVE, turned, strict=True))
            return Generator(generator.name, (rows[0], rows[1]), generator.intensity, charges)
        return Generator(generator.name, (rows[0], rows[1]), generator.intensity)
