"""How generators move images, signals and volumes: coordinates, tangents and finite maps of grids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lie_metric.algebra import Generator, exponential, generators
from lie_metric.resampling import Resampling, coordinate_dtype, displace, slopes, working_precision

__all__ = [
    "Parameter",
    "Spacing",
    "apply",
    "check_image",
    "check_spacing",
    "from_slopes",
    "move",
    "pixels_per_unit",
    "reads_inside",
    "tangents",
    "warp",
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


def _coordinates(
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
        >>> ramp = torch.arange(4.0).expand(1, 4, 4)
        >>> X = generators("translation_x", "saturation")
        >>> tangents(ramp, X, Resampling("cubic"))[:, 0, 0, 1].tolist()  # one unit of length is two pixels
        [2.0, 1.0]
    """
    dtype, dimension = image.dtype, _dimension(asked)
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
    matrices = tuple(generator.matrix for generator in asked)
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
            (velocity[..., None] if channels_last else velocity, slope)
            for row, velocity, slope in zip(generator.matrix, along, steep, strict=True)
            if any(row)
        ]
        if generator.intensity or not terms:
            total = torch.mul(image, generator.intensity, out=place)
        else:
            total = torch.mul(*terms.pop(0), out=place)
        for velocity, slope in terms:
            total = torch.addcmul(total, velocity, slope, out=place)
        results.append(total)
    if together is not None:
        return together
    return torch.stack(results) if results else image.new_zeros((0, *image.shape))


def _dimension(asked: Sequence[Generator]) -> int:
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
    """The vector fields of affine generators in pixels: for each, its components along x, y, ..., of the grid's shape.

    Yields:
        The components of one generator.
    """
    with torch.inference_mode(False), torch.no_grad():
        coordinates, units = _coordinates(size, resampling, device, spacing)
        made = [torch.tensor(matrix, dtype=coordinates.dtype, device=device).mT for matrix in matrices]
    for matrix in made:
        with torch.inference_mode(False), torch.no_grad():
            field = units * (coordinates @ matrix)
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

    .. math:: v_X = \sqrt{ \tfrac{1}{HW} \sum_p \| A \tilde p \|^2 }

    Args:
        generator: The generator.
        size: Height and width of the image, the length of a signal, or depth, height and width of a volume.
        resampling: The stencil, which fixes the unit of length.
        spacing: As in :func:`apply`.

    Returns:
        Pixels per unit of t, each axis in its own samples; 0 for intensities.

    Example:
        >>> translation, rotation = generators("translation_x", "rotation")
        >>> pixels_per_unit(translation, (8, 8), Resampling())  # half of the side
        4.0
        >>> round(pixels_per_unit(rotation, (224, 224), Resampling()) / 112, 4)  # sqrt(2 / 3) of it
        0.8165
    """
    _check_dimension(generator, len(size))
    ((first, *others),) = _fresh_velocities(
        (generator.matrix,), tuple(size), resampling, torch.float64, torch.device("cpu"), tuple(spacing)
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


def apply(
    image: Tensor,
    generator: Generator | str,
    t: Parameter,
    resampling: Resampling | None = None,
    *,
    dimension: int | None = None,
    spacing: Spacing = (),
) -> Tensor:
    r"""The finite action :math:`(T_t x)(p) = e^{ts} x(\exp(tA)\,p)` of a one-parameter group.

    At t = 0 it returns the image bit for bit, and T_s T_t = T_(s+t) up to interpolation. Usable as an augmentation:
    ``t`` may differ from image to image, and gradients flow to image and ``t``.

    Convention:
        Isotropic coordinates centred at the image centre, x to the right, y down, 1 = half of the shorter side. In
        volumes x runs along the last axis, y along the one before, z along the one before that.

    Args:
        image: Shape (C, H, W) or (N, C, H, W), any floating-point dtype; half types are computed in float32. Or a
            signal (C, T) or (N, C, T), or a volume (C, D, H, W) or (N, C, D, H, W).
        generator: A generator, or the name of one.
        t: Group parameter: a number, a tensor of no axes, or of shape (N,). Units: half of the shorter side
            (translation), radian (rotation), rapidity (hyperbolic rotation), log factor (scale, stretch, saturation),
            slope (shear).
        resampling: The stencil and padding; the default is ``Resampling()``.
        dimension: How many axes the grid has; by default those of the generator, 2 for names.
        spacing: Distances between samples along x, y, ..., the last axis first, where they differ: voxels of
            1 × 1 × 3 mm are ``(1, 1, 3)``. The unit of length is then half of the shortest side in these, so that
            rotations turn in physical space. By default all are 1.

    Returns:
        The transformed image, of the shape and dtype of ``image``.

    Raises:
        TypeError: If the image is no floating-point tensor or ``t`` is no number.
        ValueError: If the name is not that of one generator, or a shape does not fit.

    Example:
        >>> image = torch.rand(2, 3, 8, 8)
        >>> bool((apply(image, "rotation", 0.0) == image).all())
        True
        >>> turned = apply(image, "rotation", torch.tensor([0.1, -0.1]))
        >>> turned.shape
        torch.Size([2, 3, 8, 8])
        >>> apply(torch.rand(1, 4, 8, 8), "rotation_z", 0.1, dimension=3, spacing=(1, 1, 2)).shape
        torch.Size([1, 4, 8, 8])
    """
    if dimension is None:
        dimension = generator.dimension if isinstance(generator, Generator) else 2
    if dimension not in {1, 2, 3}:
        raise ValueError(
            f"`dimension` must be 1 for signals, 2 for images or 3 for volumes, got {dimension!r}. Give the generator "
            "a matrix of as many rows."
        )
    check_image(image, dimension=dimension)
    check_spacing(spacing, dimension)
    resampling = resampling or Resampling()
    found = generators(generator, dimension=dimension)
    if len(found) != 1:
        raise ValueError(
            f"`generator` must be a single generator, got the group {generator!r}. "
            f"Choose one of {[entry.name for entry in found]}."
        )
    batch = image if image.ndim == dimension + 2 else image[None]
    result = warp(batch, found, _parameter(t, batch)[:, None], resampling, spacing)
    return result if image.ndim == dimension + 2 else result[0]


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


def warp(image: Tensor, asked: Sequence[Generator], t: Tensor, resampling: Resampling, spacing: Spacing = ()) -> Tensor:
    r"""The finite action of :math:`\exp(\sum_k t_k X_k)`, with its own parameters for each image.

    Args:
        image: Shape (N, C, H, W); with generators of one dimension (N, C, T), of three (N, C, D, H, W).
        asked: K generators.
        t: Shape (N or 1, K), in the dtype of coordinates.
        resampling: The stencil and padding.
        spacing: As in :func:`apply`.

    Returns:
        The transformed images, of the shape and dtype of ``image``.

    Raises:
        ValueError: If the generators are of another dimension than the grid.

    Example:
        >>> row = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> step = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
        >>> warp(row, generators("translation"), step, Resampling("bilinear", "border"))[0, 0, 0].tolist()
        [1.0, 2.0, 3.0, 3.0]
    """
    if image.ndim != _dimension(asked) + 2:
        raise ValueError(
            f"`generators` must be of the dimension of the grid, {image.ndim - 2} for shape {tuple(image.shape)}, got "
            f"{[generator.name for generator in asked]} of {_dimension(asked)}. Take them by name with `dimension=`, "
            f"e.g. `generators('translation', dimension={image.ndim - 2})`."
        )
    result = image
    if any(any(map(any, generator.matrix)) for generator in asked):
        result = move(image, exponential(asked, t)[:, :-1], resampling, spacing)
    if any(generator.intensity for generator in asked):
        intensity = torch.tensor([generator.intensity for generator in asked], dtype=t.dtype, device=t.device)
        factor = (t @ intensity).exp()
        result = result * factor.reshape(-1, *[1] * (image.ndim - 1)).to(result.dtype)
    return result


def move(image: Tensor, maps: Tensor, resampling: Resampling, spacing: Spacing = ()) -> Tensor:
    """The image read at the places to which affine maps take its own, (T x)(p) = x(M p + b).

    Args:
        image: Shape (N, C, *grid).
        maps: M and b side by side, shape (N or 1, d, d + 1), in the dtype of coordinates.
        resampling: The stencil and padding.
        spacing: As in :func:`apply`.

    Returns:
        The moved images, of the shape and dtype of ``image``.

    Example:
        >>> step = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
        >>> move(torch.arange(4.0)[None, None], step, Resampling("bilinear", "border")).tolist()
        [[[1.0, 2.0, 3.0, 3.0]]]
    """
    dimension = maps.shape[-2]
    coordinates, units = _coordinates(image.shape[-dimension:], resampling, image.device, spacing)
    step = maps - torch.eye(dimension, dimension + 1, dtype=maps.dtype, device=maps.device)
    displacement = units * (_everywhere(step) @ coordinates[..., None])[..., 0]
    return displace(image, displacement, resampling)


def _everywhere(maps: Tensor) -> Tensor:
    """Maps (N, d, d + 1) with an axis of one for each of the grid."""
    dimension = maps.shape[-2]
    return maps.reshape(-1, *[1] * dimension, dimension, dimension + 1)


def reads_inside(
    image: Tensor, asked: Sequence[Generator], t: Tensor, resampling: Resampling, spacing: Spacing = ()
) -> Tensor:
    """Which pixels of :func:`warp` are read inside the frame of the image.

    Args:
        image: Shape (N, C, H, W), of which the size counts; or as in :func:`warp`.
        asked: K generators.
        t: Shape (N or 1, K).
        resampling: Tells where the frame ends: at the outer edges of the pixels, or at the centres of the outermost.
        spacing: As in :func:`apply`.

    Returns:
        Booleans of shape (N or 1, H, W).

    Example:
        >>> step = torch.tensor([[0.5]], dtype=torch.float64)  # one pixel of four
        >>> reads_inside(torch.zeros(1, 1, 4, 4), generators("translation_x"), step, Resampling())[0, 0].tolist()
        [True, True, True, False]
    """
    size = image.shape[-_dimension(asked) :]
    coordinates, units = _coordinates(size, resampling, image.device, spacing)
    points = (_everywhere(exponential(asked, t)[:, :-1]) @ coordinates[..., None])[..., 0]
    edge = 0 if resampling.align_corners else 1
    reach = torch.tensor([length - 1 + edge for length in size[::-1]], dtype=points.dtype, device=points.device) / 2
    # Rounding must not take away what stands on the frame itself.
    return (units * points.abs() <= reach + 1e-9).all(-1)


def _parameter(t: Parameter, batch: Tensor) -> Tensor:
    """The group parameters as a tensor of shape (N,) or (1,), in the dtype of coordinates."""
    if not isinstance(t, (int, float, Tensor)) or isinstance(t, bool):
        raise TypeError(f"`t` must be a number or a tensor, got {type(t).__name__}. Pass e.g. 0.1.")
    # A number goes to float64 at once: by way of the default dtype it would lose half of its digits.
    parameter = torch.as_tensor(t, dtype=coordinate_dtype(batch.device), device=batch.device)
    if parameter.ndim == 0:
        return parameter[None]
    if parameter.shape != (batch.shape[0],):
        raise ValueError(
            f"`t` must be a number or of shape ({batch.shape[0]},), one for each image, got {tuple(parameter.shape)}."
        )
    return parameter
