"""The differentiable grid-sample op: an image, signal or volume, extended beyond its frame, read between its samples.

A stencil is the slope it gives to a row of pixels. ``bspline`` and ``cubic`` are the cubic Hermite interpolants of
values and slopes, ``bilinear`` takes the slope on the floor side, ``fourier`` is the trigonometric polynomial. Slopes
are fixed sums over neighbours, so the derivative of any displacement at t = 0 is two matrix products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["PAPER", "Interpolation", "Padding", "Resampling", "displace", "grid_sample", "slopes"]

Interpolation = Literal["bspline", "cubic", "bilinear", "fourier"]
Padding = Literal["reflection", "border", "zeros", "circular"]

_SPLINE_POLE = math.sqrt(3.0) - 2.0
# 0.268^40 is 1e-23: what the recursive filter of the spline would add beyond is below float64 rounding.
_SPLINE_REACH = 40


@dataclass(frozen=True)
class Resampling:
    """How images are read between and beyond their pixels: the stencil that every derivative carries.

    Args:
        interpolation: ``"bspline"``, the cubic B-spline through the pixels (Unser 1999), twice differentiable and the
            most exact of the local ones; ``"cubic"``, Keys' kernel with a = -1/2 (Keys 1981), whose slope is the
            central difference; ``"bilinear"``, whose slope at a pixel is taken on the floor side, towards larger
            indices; ``"fourier"``, the trigonometric polynomial through the pixels, exact for band-limited periodic
            images (without the slope of the Nyquist frequency).
        padding: What lies beyond the frame: ``"reflection"`` (about the pixels' outer edges, or about the outermost
            pixel centres with ``align_corners=True``), ``"border"``, ``"zeros"`` or ``"circular"``. The default is
            ``"reflection"``, and ``"circular"`` for ``"fourier"``. Fourier interpolation needs a periodic extension:
            ``"circular"``, or ``"reflection"`` (the cosine series).
        align_corners: Whether -1 and 1 are the centres of the outermost pixels (True) or their outer edges (False), as
            in :func:`torch.nn.functional.grid_sample`. It fixes the unit of length: half of the shorter side.

    Raises:
        ValueError: If a name is unknown, or Fourier interpolation is asked for with a padding that is not periodic.
        TypeError: If ``align_corners`` is not a bool.

    Example:
        >>> Resampling()
        Resampling(interpolation='bspline', padding='reflection', align_corners=False)
        >>> Resampling("fourier").padding
        'circular'
    """

    interpolation: Interpolation = "bspline"
    padding: Padding | None = None
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"`interpolation` must be one of {get_args(Interpolation)}, got {self.interpolation!r}. "
                "The default is 'bspline'; the convention of the paper is `lie_metric.PAPER`."
            )
        if self.padding is None:
            object.__setattr__(self, "padding", "circular" if self.interpolation == "fourier" else "reflection")
        if self.padding not in get_args(Padding):
            raise ValueError(f"`padding` must be one of {get_args(Padding)}, got {self.padding!r}.")
        if self.interpolation == "fourier" and self.padding not in {"circular", "reflection"}:
            raise ValueError(
                f"`padding` must be periodic for Fourier interpolation, got {self.padding!r}. "
                "Choose 'circular' or 'reflection', or another interpolation."
            )
        if not isinstance(self.align_corners, bool):
            raise TypeError(f"`align_corners` must be True or False, got {self.align_corners!r}.")

    def __str__(self) -> str:
        corners = "corners aligned" if self.align_corners else "pixel areas"
        return f"{self.interpolation}, {self.padding}, {corners}"


PAPER = Resampling("bilinear", "reflection", align_corners=True)
"""The convention of Gruver et al. (2023), with the slope always taken on the floor side."""


def coordinate_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which coordinates are computed: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def working_precision(image: Tensor) -> Tensor:
    """A tensor in the dtype in which it is resampled and measured: half types in float32.

    Args:
        image: Any shape, floating point.

    Returns:
        The tensor itself, or in float32.

    Example:
        >>> working_precision(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return image.float() if image.dtype in {torch.float16, torch.bfloat16} else image


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Sets autocast aside, under which matrix products would round pixels to half precision, even at t = 0."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _fold(index: Tensor, size: int, resampling: Resampling) -> tuple[Tensor, Tensor, Tensor]:
    """The pixel that stands at each index of the extended row, the sign of its slope there, and whether it is one."""
    sign = torch.ones_like(index)
    inside = torch.ones_like(index)
    if resampling.padding == "circular":
        return index.remainder(size), sign, inside
    if resampling.padding == "reflection":
        period = _period(size, resampling)
        source = index.remainder(period)
        mirrored = source >= size
        last = period if resampling.align_corners else period - 1
        return torch.where(mirrored, last - source, source), sign - 2 * mirrored.to(sign.dtype), inside
    if resampling.padding == "zeros":
        inside = ((index >= 0) & (index < size)).to(index.dtype)
    return index.clamp(0, size - 1), sign, inside


def _period(size: int, resampling: Resampling) -> int:
    if resampling.padding == "circular":
        return size
    return max(2 * size - 2, 1) if resampling.align_corners else 2 * size


def _margin(resampling: Resampling, dimension: int) -> int:
    """Extended indices beyond the frame at which slopes differ from those of a folded pixel."""
    if resampling.padding in {"circular", "reflection"} or resampling.interpolation == "bilinear":
        return 0 if resampling.padding in {"circular", "reflection"} else 1
    if resampling.interpolation == "cubic":
        return 2
    # The cube of 40 more on each side is a memory full; 0.268^24 is 2e-14.
    return _SPLINE_REACH if dimension < 3 else 24


def _taps(size: int, resampling: Resampling) -> list[tuple[int, float]]:
    """The slope at a pixel as a sum of (offset, weight) over the pixels of the extended row."""
    if resampling.interpolation == "bilinear":
        return [(1, 1.0), (0, -1.0)]
    if resampling.interpolation == "cubic":
        return [(1, 0.5), (-1, -0.5)]
    if resampling.interpolation == "bspline":
        weights = [(k, -3.0 * _SPLINE_POLE**k) for k in range(1, _SPLINE_REACH + 1)]
        return [(side * k, side * weight) for k, weight in weights for side in (1, -1)]
    period = _period(size, resampling)
    taps = []
    for k in range(1, period):
        angle = math.pi * k / period
        ratio = 1.0 / math.sin(angle) if period % 2 else math.cos(angle) / math.sin(angle)
        taps.append((k, -((-1.0) ** k) * math.pi / period * ratio))
    return taps


@lru_cache(maxsize=256)
def _slope_matrix_float64(size: int, resampling: Resampling, margin: int) -> Tensor:
    # Plain tensors even when first asked for under inference mode or a functorch transform.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.arange(-margin, size + margin)
        matrix = torch.zeros(len(rows), size, dtype=torch.float64)
        for offset, weight in _taps(size, resampling):
            source, _, inside = _fold(rows + offset, size, resampling)
            matrix[torch.arange(len(rows)), source] += weight * inside.to(torch.float64)
        return matrix


@lru_cache(maxsize=256)
def _slope_matrix(size: int, resampling: Resampling, margin: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _slope_matrix_float64(size, resampling, margin).to(dtype).to(device)


def slopes(
    image: Tensor, resampling: Resampling, channels_last: bool = False, dimension: int = 2
) -> tuple[Tensor, ...]:
    """The derivatives of the interpolated image, signal or volume at its samples.

    Convention:
        Per pixel: x along the last axis, y along the one before, z along the one before that. With the ``bilinear``
        stencil they are the one-sided slopes towards larger indices, the derivative that :func:`displace` has at zero
        displacement.

    Args:
        image: Shape (..., H, W), float32 or float64; (..., T) in one dimension and (..., D, H, W) in three.
        resampling: The stencil.
        channels_last: Whether the shape is (..., H, W, C) instead.
        dimension: How many axes the grid has: d.

    Returns:
        ∂x image, ∂y image and so on, d of them, each of the shape of ``image``.

    Example:
        >>> ramp = torch.arange(8.0).repeat(8, 1)
        >>> slopes(ramp, Resampling("cubic"))[0][0, 1:-1].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    found = []
    with _full_precision(image.device):
        for axis in range(dimension):
            behind = axis + channels_last
            matrix = _slope_matrix(image.shape[-1 - behind], resampling, 0, image.dtype, image.device)
            found.append(_along(matrix, image, behind))
    return tuple(found)


def _along(matrix: Tensor, image: Tensor, behind: int) -> Tensor:
    """A matrix applied along the axis that has so many behind it."""
    if behind == 0:
        return image @ matrix.mT
    if behind == 1:
        return matrix @ image
    return (matrix @ image.flatten(-behind)).unflatten(-1, image.shape[-behind:])


def displace(image: Tensor, displacement: Tensor, resampling: Resampling) -> Tensor:
    """The image read at its own pixels moved by a displacement; at zero displacement the image itself, bit for bit.

    Differentiable to any order in image and displacement, in forward and reverse mode and under ``vmap``.

    Args:
        image: Shape (N, C, H, W), any floating-point dtype; half types are computed in float32. Signals (N, C, T) and
            volumes (N, C, D, H, W) likewise.
        displacement: Shape (N or 1, H, W, 2): for each pixel, the step (x, y) in pixels to the point that is read; of
            a volume (N or 1, D, H, W, 3), the step (x, y, z), with x along the last axis.
        resampling: The stencil and padding.

    Returns:
        The shape and dtype of ``image``.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> step = torch.zeros(1, 1, 4, 2); step[..., 0] = 1
        >>> displace(image, step, Resampling(padding="border")).flatten().tolist()
        [1.0, 2.0, 3.0, 3.0]
    """
    places = [
        displacement[..., axis]
        + torch.arange(image.shape[-1 - axis], dtype=displacement.dtype, device=image.device).reshape(-1, *[1] * axis)
        for axis in range(displacement.shape[-1])
    ]
    return _interpolate(image, places, resampling)


def grid_sample(image: Tensor, grid: Tensor, resampling: Resampling | None = None) -> Tensor:
    """The image read at the points of a grid, as :func:`torch.nn.functional.grid_sample`, differentiable to any order.

    Convention:
        Grid points are (x, y) with -1 and 1 at the outer edges of the image, or at the centres of the outermost
        pixels when ``align_corners`` is set; each axis is normalised by its own length.

    Args:
        image: Shape (N, C, H, W), any floating-point dtype; half types are computed in float32. Or a signal (N, C, T),
            or a volume (N, C, D, H, W).
        grid: Shape (N or 1, H', W', 2), floating point and finite; (N or 1, T', 1) for signals, and points (x, y, z) of
            shape (N or 1, D', H', W', 3) for volumes.
        resampling: The stencil and padding; the default is ``Resampling()``.

    Returns:
        Shape (N, C, H', W'), (N, C, T') or (N, C, D', H', W'), in the dtype of ``image``.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If a shape does not fit.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> grid_sample(image, torch.zeros(1, 1, 1, 2), Resampling("cubic")).item()
        1.5
    """
    resampling = resampling or Resampling()
    for name, value in (("image", image), ("grid", grid)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor, got {got}. Convert it with `.float()`.")
    dimension = grid.ndim - 2
    names = _AXES.get(dimension)
    if names is None or grid.shape[-1] != dimension:
        raise ValueError(
            f"`grid` must have shape (N or 1, H', W', 2), or (N or 1, T', 1) for signals and (N or 1, D', H', W', 3) "
            f"for volumes, got {tuple(grid.shape)}."
        )
    if image.ndim != grid.ndim or 0 in image.shape[2:]:
        raise ValueError(
            f"`image` must have shape (N, C, {', '.join(names)}) for a grid of shape {tuple(grid.shape)}, got "
            f"{tuple(image.shape)}. Add the missing axes."
        )
    if grid.shape[0] not in {1, image.shape[0]}:
        raise ValueError(
            f"`grid` must have shape (N or 1, {', '.join(name + chr(39) for name in names)}, {dimension}) with N = "
            f"{image.shape[0]}, got {tuple(grid.shape)}."
        )
    size = torch.tensor(image.shape[:1:-1], dtype=grid.dtype, device=grid.device)
    position = (grid + 1) * (size - 1) / 2 if resampling.align_corners else ((grid + 1) * size - 1) / 2
    return _interpolate(image, position.unbind(-1), resampling)


_AXES = {1: ("T",), 2: ("H", "W"), 3: ("D", "H", "W")}


def _interpolate(image: Tensor, places: Sequence[Tensor], resampling: Resampling) -> Tensor:
    """The image at positions in pixels along x, y, ..., each (N or 1, H', W') in the coordinates' dtype."""
    dtype = image.dtype
    image = working_precision(image)
    sample = _trigonometric if resampling.interpolation == "fourier" else _piecewise
    # Positions are split into pixel and fraction before they take the image's dtype, so that nothing of the fraction
    # is lost to the size of the pixel index.
    pixels = [place.detach().floor() for place in places]
    fractions = [(place - pixel).to(image.dtype) for place, pixel in zip(places, pixels, strict=True)]
    with _full_precision(image.device):
        return sample(image, [pixel.long() for pixel in pixels], fractions, resampling).to(dtype)


def _piecewise(image: Tensor, pixels: list[Tensor], fractions: list[Tensor], resampling: Resampling) -> Tensor:
    """Tensor-product Hermite interpolation of degree 1 (bilinear) or 3 (values and slopes)."""
    batch, channels = image.shape[:2]
    axes = range(len(pixels))
    sizes = image.shape[:1:-1]
    margins = [_margin(resampling, len(pixels))] * len(pixels)
    smooth = resampling.interpolation != "bilinear"
    # Slopes along every set of axes: bit k of a set's number says whether axis k is one of them.
    fields = [image]
    for chosen in range(1, 2 ** len(pixels) if smooth else 1):
        axis = (chosen & -chosen).bit_length() - 1
        matrix = _slope_matrix(sizes[axis], resampling, margins[axis], image.dtype, image.device)
        fields.append(_along(matrix, fields[chosen & (chosen - 1)], axis))
    for chosen, field in enumerate(fields):
        for axis in axes:
            if not chosen >> axis & 1:
                field = _extend(field, sizes[axis], margins[axis], axis, resampling)
        fields[chosen] = field
    stacked = torch.stack(fields, dim=1).flatten(3)
    ends = []
    for axis in axes:
        pair = []
        for side in (0, 1):
            source, sign = _locate(pixels[axis] + side, sizes[axis], margins[axis], resampling)
            value, slope = _hermite(fractions[axis], side, smooth)
            pair.append((source, (value, slope * sign)))
        ends.append(pair)
    total: Tensor | None = None
    for corner in itertools.product((0, 1), repeat=len(pixels)):
        sides = [ends[axis][side] for axis, side in zip(axes, reversed(corner), strict=True)]
        index = sides[-1][0]
        for axis in reversed(axes[:-1]):
            index = index * (sizes[axis] + 2 * margins[axis]) + sides[axis][0]
        found = stacked.gather(3, index.flatten(1)[:, None, None].expand(batch, len(fields), channels, -1))
        weight = [
            math.prod((sides[axis][1][chosen >> axis & 1] for axis in axes[1:]), start=sides[0][1][chosen & 1])
            for chosen in range(len(fields))
        ]
        part = (found.unflatten(3, index.shape[1:]) * torch.stack(weight, dim=1)[:, :, None]).sum(1)
        total = part if total is None else total + part
    if total is None:
        raise RuntimeError("interpolation has corners")
    return total


def _extend(image: Tensor, size: int, margin: int, axis: int, resampling: Resampling) -> Tensor:
    """The image with the padding's pixels written out over the margin of an axis."""
    if margin == 0:
        return image
    source, _, inside = _fold(torch.arange(-margin, size + margin, device=image.device), size, resampling)
    image = image.index_select(-1 - axis, source)
    return image * inside.reshape(-1, *[1] * axis).to(image.dtype)


def _locate(index: Tensor, size: int, margin: int, resampling: Resampling) -> tuple[Tensor, Tensor]:
    """Where a pixel of the endless row stands in the extended one, and the sign of its slope."""
    if resampling.padding in {"circular", "reflection"}:
        source, sign, _ = _fold(index, size, resampling)
        return source, sign
    return index.clamp(-margin, size - 1 + margin) + margin, torch.ones_like(index)


def _hermite(u: Tensor, side: int, smooth: bool) -> tuple[Tensor, Tensor]:
    """Weights of value and slope at the near (side 0) or far end of a unit interval; exact at u = 0."""
    w = 1 - u
    if not smooth:
        return (u if side else w), u
    if side:
        return u * u * (3 - 2 * u), -u * u * w
    return (1 + 2 * u) * w * w, u * w * w


def _trigonometric(image: Tensor, pixels: list[Tensor], fractions: list[Tensor], resampling: Resampling) -> Tensor:
    """Trigonometric interpolation as sums with weights that are exactly 0 and 1 at whole pixels."""
    batch, shape = image.shape[0], pixels[0].shape[1:]
    if len(shape) > 2:
        # The weights of all points of a volume at once would be as many numbers for each of its voxels.
        slabs = [
            _trigonometric(image, [each[:, k] for each in pixels], [each[:, k] for each in fractions], resampling)
            for k in range(shape[0])
        ]
        return torch.stack(slabs, dim=2)
    weights = [
        _dirichlet(pixel, fraction, image.shape[-1 - axis], resampling)
        for axis, (pixel, fraction) in enumerate(zip(pixels, fractions, strict=True))
    ]
    if len(shape) == 1:
        weights = [each[:, None] for each in weights]
    rows = []
    # One row of output points at a time: the intermediate of all points at once would hold H · H' · W' numbers.
    for row in zip(*(each.unbind(1) for each in weights), strict=True):
        values = image
        for axis, weight in enumerate(row):
            weight = weight.expand(batch, -1, -1).reshape(batch, *[1] * (values.ndim - 3), *weight.shape[1:])
            values = (values * weight.mT).sum(-2) if axis else values @ weight.mT
        rows.append(values)
    return torch.stack(rows, dim=-2) if len(shape) > 1 else rows[0]


def _dirichlet(index: Tensor, fraction: Tensor, size: int, resampling: Resampling) -> Tensor:
    """The weight of each of ``size`` pixels at the positions index + fraction: shape (*index.shape, size).

    The periodic kernel is a sum of waves, smooth in the fraction to any order where its closed form is 0/0. The waves
    at the whole pixel are taken off and the pixel put in their place, so that a zero fraction gives it exactly.
    """
    period = _period(size, resampling)
    dtype, device = fraction.dtype, fraction.device
    frequency = torch.arange(period // 2 + 1, dtype=coordinate_dtype(device), device=device)
    amplitude = torch.full_like(frequency, 2.0 / period)
    amplitude[0] = 1.0 / period
    if period % 2 == 0:
        amplitude[-1] = 1.0 / period
    source = torch.arange(period, device=device)
    whole = 2 * math.pi / period * (frequency * index.remainder(period)[..., None].to(frequency.dtype))
    step = 2 * math.pi / period * frequency * fraction[..., None].to(frequency.dtype)
    table = 2 * math.pi / period * frequency[:, None] * source.to(frequency.dtype)
    # cos(whole + step - table) - cos(whole - table), with step = 0 giving zero exactly.
    cosine, sine = whole.cos() * amplitude, whole.sin() * amplitude
    change, turn = step.cos() - 1, step.sin()
    weights = (cosine * change - sine * turn) @ table.cos() + (sine * change + cosine * turn) @ table.sin()
    weights = weights + (index.remainder(period)[..., None] == source).to(weights.dtype)
    pixel, _, _ = _fold(source, size, resampling)
    folded = torch.zeros(*weights.shape[:-1], size, dtype=weights.dtype, device=device)
    return folded.index_add(-1, pixel, weights).to(dtype)
