"""How generators move images, signals and volumes at once: coordinates and tangents of grids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lie_metric.algebra import Generator, flow_rows, horizon, velocity
from lie_metric.resampling import Resampling, coordinate_dtype, slopes, working_precision

__all__ = [
    "Parameter",
    "Spacing",
    "check_image",
    "check_spacing",
    "from_slopes",
    "grid_coordinates",
    "grid_dimension",
    "pixels_per_unit",
    "tangents",
]

Parameter = float | Tensor
Spacing = tuple[float, ...]


def check_image(image: object, name: str = "image", dimension: int = 2) -> None:
    """Refuses what is no finite-size floating-point image (..., H, W), signal or volume.

    Args:
        image: What was given.
        name: The argument's name, for the message.
        dimension: How many axes the grid has.

    Raises:
        TypeError: If it is no floating-point tensor.
        ValueError: If it has fewer axes than the grid and one for channels, or more than one besides, or is empty.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(image).__name__}. Convert it to a float tensor first.")
    if not image.is_floating_point():
        raise TypeError(
            f"`{name}` must have a floating-point dtype, got {image.dtype}. Convert and scale it, e.g. `{name} / 255`."
        )
    if image.ndim not in {dimension + 1, dimension + 2} or image.numel() == 0:
        kind = {1: "signal (C, T) or batch (N, C, T)", 3: "volume (C, D, H, W) or batch (N, C, D, H, W)"}
        raise ValueError(
            f"`{name}` must be a non-empty {kind.get(dimension, 'image (C, H, W) or batch (N, C, H, W)')}, got shape "
            f"{tuple(image.shape)}."
        )


def grid_coordinates(
    size: Sequence[int], resampling: Resampling, device: torch.device, spacing: Spacing = ()
) -> tuple[Tensor, Tensor]:
    """Isotropic homogeneous coordinates of the pixels, shape (H, W, 3), and the unit of length in pixels along x, y."""
    size = tuple(size)
    apart = tuple(spacing) or (1.0,) * len(size)
    corners = int(resampling.align_corners)
    # Sizes are in the order of axes, distances in that of x, y and z.
    unit = min((length - corners) * step for length, step in zip(reversed(size), apart, strict=True)) / 2
    if unit == 0 and max(size) > 1:
        raise ValueError(
            f"`image` must be at least two pixels wide{' and high' if len(size) > 1 else ''} when corners are aligned, "
            f"got {'×'.join(map(str, size))}: the unit of length is half of the distance between the outermost pixel "
            "centres. Use `align_corners=False`."
        )
    dtype = coordinate_dtype(device)
    # A single pixel with aligned corners has no extent; its one point is the origin.
    places = [
        ((torch.arange(length, dtype=dtype, device=device) - (length - 1) / 2) / (unit / step or 1.0))
        .reshape(-1, *[1] * axis)
        .expand(size)
        for axis, (length, step) in enumerate(zip(reversed(size), apart, strict=True))
    ]
    units = torch.tensor([unit / step for step in apart], dtype=dtype, device=device)
    return torch.nn.functional.pad(torch.stack(places, dim=-1), (0, 1), value=1.0), units


def tangents(
    image: Tensor,
    asked: Sequence[Generator],
    resampling: Resampling,
    channels_last: bool = False,
    spacing: Spacing = (),
) -> Tensor:
    r"""The infinitesimal actions :math:`X_k \cdot x = d/dt\,T_t x` at t = 0, one for each generator.

    They equal the derivative of :func:`apply` at t = 0, at the cost of a matrix product for each axis of the grid.

    Args:
        image: Shape (..., H, W), floating point; half types are computed in float32. With generators of one dimension
            it is a signal (..., T), of three a volume (..., D, H, W).
        asked: K generators of one dimension.
        resampling: The stencil.
        channels_last: Whether the shape is (..., H, W, C) instead.
        spacing: Distances between samples along x, y, ..., the last axis first; by default all are 1.

    Returns:
        Shape (K, ..., H, W), or (K, ..., H, W, C), in the dtype of ``image``.

    Example:
        >>> from lie_metric.algebra import generators
        >>> ramp = torch.arange(4.0).expand(1, 4, 4)
        >>> X = generators("translation_x", "saturation")
        >>> tangents(ramp, X, Resampling("cubic"))[:, 0, 0, 1].tolist()  # one unit of length is two pixels
        [2.0, 1.0]
    """
    dtype, dimension = image.dtype, grid_dimension(asked)
    check_spacing(spacing, dimension)
    image = working_precision(image)
    steep = slopes(image, resampling, channels_last, dimension)
    return _from_slopes(image, steep, asked, resampling, channels_last, spacing).to(dtype)


def from_slopes(
    image: Tensor,
    slope_x: Tensor,
    slope_y: Tensor,
    asked: Sequence[Generator],
    resampling: Resampling,
    channels_last: bool = False,
) -> Tensor:
    """The infinitesimal actions, with the slopes of the image given.

    Args:
        image: Shape (..., H, W), float32 or float64.
        slope_x: ∂x image per pixel, of the shape of ``image``.
        slope_y: ∂y image per pixel.
        asked: K generators.
        resampling: The stencil, which fixes the unit of length.
        channels_last: Whether shapes are (..., H, W, C) instead.

    Returns:
        Shape (K, ..., H, W), or (K, ..., H, W, C).

    Example:
        >>> from lie_metric.algebra import generators
        >>> one = torch.ones(1, 2, 2)
        >>> from_slopes(0 * one, one, 0 * one, generators("rotation"), Resampling())[0, 0].tolist()  # y ∂x, y in pixels
        [[-0.5, -0.5], [0.5, 0.5]]
    """
    return _from_slopes(image, (slope_x, slope_y), asked, resampling, channels_last)


def _from_slopes(
    image: Tensor,
    steep: Sequence[Tensor],
    asked: Sequence[Generator],
    resampling: Resampling,
    channels_last: bool,
    spacing: Spacing = (),
) -> Tensor:
    end = image.ndim - channels_last
    size = tuple(image.shape[end - len(steep) : end])
    matrices = tuple(flow_rows(generator) for generator in asked)
    # Volumes are many and their fields large: those are made when they are used, one generator at a time.
    known = _velocities if len(size) < 3 else _fresh_velocities
    velocities = known(matrices, size, resampling, image.dtype, image.device, tuple(spacing))
    # Tangents are many times the image: where nothing is differentiated, each is written into its place at once.
    places: list[Tensor | None] = [None] * len(asked)
    together = None
    if not _differentiated(steep[0]):
        together = image.new_empty((len(asked), *image.shape))
        places = list(together)
    results = []
    for generator, along, place in zip(asked, velocities, places, strict=True):
        # Terms that vanish are left out, and each of the others is one pass over the image.
        terms = [
            (speed[..., None] if channels_last else speed, slope)
            for row, speed, slope in zip(generator.matrix, along, steep, strict=True)
            if any(row) or horizon(generator)
        ]
        if generator.intensity or not terms:
            total = torch.mul(image, generator.intensity, out=place)
        else:
            total = torch.mul(*terms.pop(0), out=place)
        for speed, slope in terms:
            total = torch.addcmul(total, speed, slope, out=place)
        results.append(total)
    if together is not None:
        return together
    return torch.stack(results) if results else image.new_zeros((0, *image.shape))


def grid_dimension(asked: Sequence[Generator]) -> int:
    """That of generators; of none, that of the plane."""
    found = sorted({generator.dimension for generator in asked}) or [2]
    if len(found) > 1 or found[0] not in {1, 2, 3}:
        raise ValueError(
            f"`generators` must be of one dimension from 1 to 3 to move signals, images or volumes, got {found} of "
            f"{[generator.name for generator in asked]}. Give all matrices as many rows as the grid has axes."
        )
    return found[0]


def _differentiated(tensor: Tensor) -> bool:
    """Whether operations on a tensor may be recorded or transformed, so that they cannot write in place."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return torch.is_grad_enabled() or wrapped or forward_ad.unpack_dual(tensor).tangent is not None


def _fresh_velocities(
    matrices: tuple[Any, ...],
    size: tuple[int, ...],
    resampling: Resampling,
    dtype: torch.dtype,
    device: torch.device,
    spacing: Spacing,
) -> Iterator[tuple[Tensor, ...]]:
    """The vector fields of generators in pixels: for each, its components along x, y, ..., of the grid's shape.

    Yields:
        The components of one generator.
    """
    with torch.inference_mode(False), torch.no_grad():
        coordinates, units = grid_coordinates(size, resampling, device, spacing)
        made = [torch.tensor(matrix, dtype=coordinates.dtype, device=device) for matrix in matrices]
    for matrix in made:
        with torch.inference_mode(False), torch.no_grad():
            field = units * velocity(matrix, coordinates)
            components = tuple(component.to(dtype) for component in field.unbind(-1))
        yield components


@lru_cache(maxsize=32)
def _velocities(
    matrices: tuple[Any, ...],
    size: tuple[int, ...],
    resampling: Resampling,
    dtype: torch.dtype,
    device: torch.device,
    spacing: Spacing,
) -> list[tuple[Tensor, ...]]:
    return list(_fresh_velocities(matrices, size, resampling, dtype, device, spacing))


def pixels_per_unit(
    generator: Generator, size: tuple[int, ...], resampling: Resampling, spacing: Spacing = ()
) -> float:
    r"""How far a generator moves pixels per unit of t: the root mean square of its velocity over the frame.

    .. math:: v_X = \sqrt{ \tfrac{1}{HW} \sum_p \| A \tilde p - (w \cdot p)\, p \|^2 }

    Args:
        generator: The generator.
        size: Height and width of the image, the length of a signal, or depth, height and width of a volume.
        resampling: The stencil, which fixes the unit of length.
        spacing: As in :func:`apply`.

    Returns:
        Pixels per unit of t, each axis in its own samples; 0 for intensities.

    Example:
        >>> from lie_metric.algebra import generators
        >>> translation, rotation = generators("translation_x", "rotation")
        >>> pixels_per_unit(translation, (8, 8), Resampling())  # half of the side
        4.0
        >>> round(pixels_per_unit(rotation, (224, 224), Resampling()) / 112, 4)  # sqrt(2 / 3) of it
        0.8165
    """
    _check_dimension(generator, len(size))
    ((first, *others),) = _fresh_velocities(
        (flow_rows(generator),), tuple(size), resampling, torch.float64, torch.device("cpu"), tuple(spacing)
    )
    square = first.square()
    for other in others:
        square = square + other.square()
    return float(square.mean().sqrt())


def _check_dimension(generator: Generator, dimension: int) -> None:
    if generator.dimension != dimension:
        raise ValueError(
            f"`generator` must be of dimension {dimension}, that of the grid, got {generator.name!r} with a matrix of "
            f"{generator.dimension} rows. Take it by `generators({generator.name!r}, dimension={dimension})`, or give "
            f"it {dimension} rows."
        )


def check_spacing(spacing: Spacing, dimension: int) -> None:
    """Refuses what are no distances between samples.

    Args:
        spacing: What was given.
        dimension: How many there have to be, unless there are none.

    Raises:
        ValueError: If there are others, or one is not positive and finite.
    """
    numbers = isinstance(spacing, (tuple, list)) and all(
        isinstance(step, (int, float)) and not isinstance(step, bool) and 0 < step < math.inf for step in spacing
    )
    if not numbers or len(spacing) not in {0, dimension}:
        raise ValueError(
            f"`spacing` must hold {dimension} positive distances between samples, along {', '.join('xyz'[:dimension])} "
            f"with x along the last axis, got {spacing!r}. Leave it out where all are alike."
        )
