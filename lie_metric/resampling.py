"""The differentiable grid-sample op: an image, extended beyond its frame, read between its pixels.

A stencil is the slope it gives to a row of pixels. ``bspline`` and ``cubic`` are the cubic Hermite interpolants of
values and slopes, ``bilinear`` takes the slope on the floor side, ``fourier`` is the trigonometric polynomial. Slopes
are fixed sums over neighbours, so the derivative of any displacement at t = 0 is two matrix products.
"""

from __future__ import annotations

import math
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


def _margin(size: int, resampling: Resampling) -> int:
    """Extended indices beyond the frame at which slopes differ from those of a folded pixel."""
    if resampling.padding in {"circular", "reflection"} or resampling.interpolation == "bilinear":
        return 0 if resampling.padding in {"circular", "reflection"} else 1
    return 2 if resampling.interpolation == "cubic" else _SPLINE_REACH


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


def slopes(image: Tensor, resampling: Resampling, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """The derivatives of the interpolated image at its pixels.

    Convention:
        Per pixel: x along the last axis, y along the one before. With the ``bilinear`` stencil they are the one-sided
        slopes towards larger indices, the derivative that :func:`displace` has at zero displacement.

    Args:
        image: Shape (..., H, W), float32 or float64.
        resampling: The stencil.
        channels_last: Whether the shape is (..., H, W, C) instead.

    Returns:
        ∂x image and ∂y image, each of the shape of ``image``.

    Example:
        >>> ramp = torch.arange(8.0).repeat(8, 1)
        >>> slopes(ramp, Resampling("cubic"))[0][0, 1:-1].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    height, width = image.shape[-3:-1] if channels_last else image.shape[-2:]
    along_x = _slope_matrix(width, resampling, 0, image.dtype, image.device)
    along_y = _slope_matrix(height, resampling, 0, image.dtype, image.device)
    with _full_precision(image.device):
        if channels_last:
            return along_x @ image, (along_y @ image.flatten(-2)).unflatten(-1, image.shape[-2:])
        return image @ along_x.mT, along_y @ image


def displace(image: Tensor, displacement: Tensor, resampling: Resampling) -> Tensor:
    """The image read at its own pixels moved by a displacement; at zero displacement the image itself, bit for bit.

    Differentiable to any order in image and displacement, in forward and reverse mode and under ``vmap``.

    Args:
        image: Shape (N, C, H, W), any floating-point dtype; half types are computed in float32.
        displacement: Shape (N or 1, H, W, 2): for each pixel, the step (x, y) in pixels to the point that is read.
        resampling: The stencil and padding.

    Returns:
        Shape (N, C, H, W), in the dtype of ``image``.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> step = torch.zeros(1, 1, 4, 2); step[..., 0] = 1
        >>> displace(image, step, Resampling(padding="border")).flatten().tolist()
        [1.0, 2.0, 3.0, 3.0]
    """
    height, width = image.shape[-2:]
    column = torch.arange(width, dtype=displacement.dtype, device=image.device)
    row = torch.arange(height, dtype=displacement.dtype, device=image.device)
    return _interpolate(image, displacement[..., 0] + column, displacement[..., 1] + row[:, None], resampling)


def grid_sample(image: Tensor, grid: Tensor, resampling: Resampling | None = None) -> Tensor:
    """The image read at the points of a grid, as :func:`torch.nn.functional.grid_sample`, differentiable to any order.

    Convention:
        Grid points are (x, y) with -1 and 1 at the outer edges of the image, or at the centres of the outermost
        pixels when ``align_corners`` is set; each axis is normalised by its own length.

    Args:
        image: Shape (N, C, H, W), any floating-point dtype; half types are computed in float32.
        grid: Shape (N or 1, H', W', 2), floating point and finite.
        resampling: The stencil and padding; the default is ``Resampling()``.

    Returns:
        Shape (N, C, H', W'), in the dtype of ``image``.

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
    if image.ndim != 4 or 0 in image.shape[-2:]:
        raise ValueError(f"`image` must have shape (N, C, H, W), got {tuple(image.shape)}. Add the missing axes.")
    if grid.ndim != 4 or grid.shape[-1] != 2 or grid.shape[0] not in {1, image.shape[0]}:
        raise ValueError(
            f"`grid` must have shape (N or 1, H', W', 2) with N = {image.shape[0]}, got {tuple(grid.shape)}."
        )
    size = torch.tensor([image.shape[-1], image.shape[-2]], dtype=grid.dtype, device=grid.device)
    position = (grid + 1) * (size - 1) / 2 if resampling.align_corners else ((grid + 1) * size - 1) / 2
    return _interpolate(image, position[..., 0], position[..., 1], resampling)


def _interpolate(image: Tensor, x: Tensor, y: Tensor, resampling: Resampling) -> Tensor:
    """The image at the pixel positions x and y, each of shape (N or 1, H', W') and in the coordinates' dtype."""
    dtype = image.dtype
    image = working_precision(image)
    sample = _trigonometric if resampling.interpolation == "fourier" else _piecewise
    # Positions are split into pixel and fraction before they take the image's dtype, so that nothing of the fraction
    # is lost to the size of the pixel index.
    i, j = x.detach().floor(), y.detach().floor()
    u, v = (x - i).to(image.dtype), (y - j).to(image.dtype)
    with _full_precision(image.device):
        return sample(image, i.long(), u, j.long(), v, resampling).to(dtype)


def _piecewise(image: Tensor, i: Tensor, u: Tensor, j: Tensor, v: Tensor, resampling: Resampling) -> Tensor:
    """Tensor-product Hermite interpolation of degree 1 (bilinear) or 3 (values and slopes)."""
    batch, channels, height, width = image.shape
    margin_x, margin_y = _margin(width, resampling), _margin(height, resampling)
    extended = _extend(_extend(image, width, margin_x, -1, resampling), height, margin_y, -2, resampling)
    fields = [extended]
    smooth = resampling.interpolation != "bilinear"
    if smooth:
        along_x = _slope_matrix(width, resampling, margin_x, image.dtype, image.device)
        along_y = _slope_matrix(height, resampling, margin_y, image.dtype, image.device)
        slope_x = _extend(image @ along_x.mT, height, margin_y, -2, resampling)
        slope_y = along_y @ image
        fields += [slope_x, _extend(slope_y, width, margin_x, -1, resampling), slope_y @ along_x.mT]
    stacked = torch.stack(fields, dim=1).flatten(3)
    stride = width + 2 * margin_x
    total: Tensor | None = None
    for b in (0, 1):
        source_y, sign_y = _locate(j + b, height, margin_y, resampling)
        weights_y = _hermite(v, b, smooth)
        for a in (0, 1):
            source_x, sign_x = _locate(i + a, width, margin_x, resampling)
            weights_x = _hermite(u, a, smooth)
            index = (source_y * stride + source_x).flatten(1)[:, None, None]
            corner = stacked.gather(3, index.expand(batch, len(fields), channels, -1)).unflatten(3, i.shape[1:])
            weight = [weights_x[0] * weights_y[0]]
            if smooth:
                steep_x, steep_y = weights_x[1] * sign_x, weights_y[1] * sign_y
                weight += [steep_x * weights_y[0], weights_x[0] * steep_y, steep_x * steep_y]
            part = (corner * torch.stack(weight, dim=1)[:, :, None]).sum(1)
            total = part if total is None else total + part
    if total is None:
        raise RuntimeError("interpolation has four corners")
    return total


def _extend(image: Tensor, size: int, margin: int, axis: int, resampling: Resampling) -> Tensor:
    """The image with the padding's pixels written out over the margin of an axis."""
    if margin == 0:
        return image
    source, _, inside = _fold(torch.arange(-margin, size + margin, device=image.device), size, resampling)
    image = image.index_select(axis, source)
    return image * (inside[:, None] if axis == -2 else inside).to(image.dtype)


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


def _trigonometric(image: Tensor, i: Tensor, u: Tensor, j: Tensor, v: Tensor, resampling: Resampling) -> Tensor:
    """Trigonometric interpolation as two sums with weights that are exactly 0 and 1 at whole pixels."""
    batch = image.shape[0]
    height, width = image.shape[-2:]
    weights_x = _dirichlet(i, u, width, resampling)
    weights_y = _dirichlet(j, v, height, resampling)
    rows = []
    # One row of output points at a time: the intermediate of all points at once would hold H · H' · W' numbers.
    for wx, wy in zip(weights_x.unbind(1), weights_y.unbind(1), strict=True):
        wx, wy = (w.expand(batch, -1, -1)[:, None] for w in (wx, wy))
        rows.append(((image @ wx.mT) * wy.mT).sum(-2))
    return torch.stack(rows, dim=-2)


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
