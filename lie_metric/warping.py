"""Finite maps of images, signals and volumes, and what of them stays in the frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lie_metric.algebra import Generator, check_horizon, exponential, generators, horizon, moves, projective_step
from lie_metric.motion import (
    Parameter,
    Spacing,
    check_image,
    check_spacing,
    grid_coordinates,
    grid_dimension,
    pixels_per_unit,
)
from lie_metric.resampling import Resampling, coordinate_dtype, displace

__all__ = ["apply", "move", "parameter_of", "reads_inside", "warp"]


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

    Under a projective generator x is read at :math:`\varphi_t(p)`, see :class:`~lie_metric.Generator`.

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
            slope (shear), the inverse of the distance to the horizon in halves of the shorter side (perspective).
        resampling: The stencil and padding; the default is ``Resampling()``.
        dimension: How many axes the grid has; by default those of the generator, 2 for names.
        spacing: Distances between samples along x, y, ..., the last axis first, where they differ: voxels of
            1 × 1 × 3 mm are ``(1, 1, 3)``. The unit of length is then half of the shortest side in these, so that
            rotations turn in physical space. By default all are 1.

    Returns:
        The transformed image, of the shape and dtype of ``image``.

    Raises:
        TypeError: If the image is no floating-point tensor or ``t`` is no number.
        ValueError: If the name is not that of one generator, a shape does not fit, ``t`` is NaN or infinite, or the
            horizon of a projective map is in the frame.

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


@lru_cache(maxsize=64)
def parameter_of(generator: Generator, pixels: float, size: tuple[int, ...], resampling: Resampling) -> float:
    r"""The t > 0 at which a generator moves the pixels of a frame by a distance, the root mean square over them.

    Affine ones move them by t times :func:`pixels_per_unit` (a shift exactly so, a rotation by as much along its arc).
    Under a projective one the distances :math:`\|\varphi_t(p) - p\|` themselves are taken: they grow faster than t.

    Args:
        generator: A generator that moves places.
        pixels: How far.
        size: As in :func:`pixels_per_unit`.
        resampling: As in :func:`pixels_per_unit`.

    Returns:
        t.

    Raises:
        ValueError: If a projective generator does not move pixels so far while the horizon is outside of the frame.

    Example:
        >>> parameter_of(generators("translation_x")[0], 2.0, (8, 8), Resampling())  # half sides
        0.5
        >>> sideways = generators("perspective_x")[0]
        >>> [round(parameter_of(sideways, pixels, (32, 32), Resampling()), 3) for pixels in (1.0, 8.0)]
        [0.111, 0.598]
    """
    linear = pixels / pixels_per_unit(generator, size, resampling)
    if not horizon(generator):
        return linear
    coordinates, units = grid_coordinates(size, resampling, torch.device("cpu"))

    def distance(t: float) -> float:
        maps = exponential(generator, torch.tensor(t, dtype=torch.float64))
        if float(_least(maps, _reach(size, resampling))) <= 1e-3:
            return math.inf
        step = projective_step(maps - torch.eye(len(maps), dtype=maps.dtype), coordinates)
        return float((units * step).square().sum(-1).mean().sqrt())

    low, high = 0.0, linear
    for _ in range(8):
        if not distance(high) < pixels:
            break
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if distance(middle) >= pixels else (middle, high)
    if not abs(distance(low) - pixels) < 1e-6 * pixels:
        raise ValueError(
            f"`pixels` must be a distance that is reached while the horizon is outside of the frame, got {pixels:g} "
            f"for {generator.name!r} and images of {'×'.join(map(str, size))}, where it comes to {distance(low):.3g}. "
            "Pass fewer."
        )
    return low


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
    if image.ndim != grid_dimension(asked) + 2:
        raise ValueError(
            f"`generators` must be of the dimension of the grid, {image.ndim - 2} for shape {tuple(image.shape)}, got "
            f"{[generator.name for generator in asked]} of {grid_dimension(asked)}. Take them by name with "
            f"`dimension=`, e.g. `generators('translation', dimension={image.ndim - 2})`."
        )
    result = image
    if any(moves(generator) for generator in asked):
        maps = exponential(asked, t)
        projective = any(horizon(generator) for generator in asked)
        result = move(image, maps if projective else maps[:, :-1], resampling, spacing)
    if any(generator.intensity for generator in asked):
        intensity = torch.tensor([generator.intensity for generator in asked], dtype=t.dtype, device=t.device)
        factor = (t @ intensity).exp()
        result = result * factor.reshape(-1, *[1] * (image.ndim - 1)).to(result.dtype)
    return result


def move(image: Tensor, maps: Tensor, resampling: Resampling, spacing: Spacing = ()) -> Tensor:
    """The image read at the places to which affine or projective maps take its own, (T x)(p) = x(M p + b).

    Args:
        image: Shape (N, C, *grid).
        maps: M and b side by side, shape (N or 1, d, d + 1), in the dtype of coordinates; or homogeneous matrices
            (N or 1, d + 1, d + 1), by whose last coordinate points are divided.
        resampling: The stencil and padding.
        spacing: As in :func:`apply`.

    Returns:
        The moved images, of the shape and dtype of ``image``.

    Raises:
        ValueError: If the horizon of a projective map is in the frame.

    Example:
        >>> step = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
        >>> move(torch.arange(4.0)[None, None], step, Resampling("bilinear", "border")).tolist()
        [[[1.0, 2.0, 3.0, 3.0]]]
    """
    dimension = maps.shape[-1] - 1
    coordinates, units = grid_coordinates(image.shape[-dimension:], resampling, image.device, spacing)
    step = _everywhere(maps - torch.eye(*maps.shape[-2:], dtype=maps.dtype, device=maps.device))
    if maps.shape[-2] == dimension:
        displacement = units * (step @ coordinates[..., None])[..., 0]
    else:
        size = image.shape[-dimension:]
        reach = _reach(size, resampling, spacing)
        limits = " and ".join(
            f"|t| < {1 / far:.3g} along {axis}" for axis, far in zip("xyz", reach, strict=False) if far
        )
        check_horizon(
            _least(maps, reach),
            f"a frame of {'×'.join(map(str, size))} pixels",
            f"Take a smaller t, of a perspective alone {limits}.",
        )
        displacement = units * projective_step(step, coordinates)
    return displace(image, displacement, resampling)


def _everywhere(maps: Tensor) -> Tensor:
    """Maps (N, rows, d + 1) with an axis of one for each of the grid."""
    return maps.reshape(-1, *[1] * (maps.shape[-1] - 1), *maps.shape[-2:])


def _reach(size: Sequence[int], resampling: Resampling, spacing: Spacing = ()) -> list[float]:
    """How far the frame reaches from its centre along x, y, ..., in units of length."""
    apart = tuple(spacing) or (1.0,) * len(size)
    sides = [
        (length - int(resampling.align_corners)) * step for length, step in zip(reversed(size), apart, strict=True)
    ]
    return [side / (min(sides) or 1.0) for side in sides]


def _least(maps: Tensor, reach: Sequence[float]) -> Tensor:
    """The least last coordinate in a frame under homogeneous maps (..., d + 1, d + 1): that of a corner."""
    last = maps[..., -1, :]
    return last[..., -1] - last[..., :-1].abs() @ torch.tensor(reach, dtype=maps.dtype, device=maps.device)


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
    size = image.shape[-grid_dimension(asked) :]
    coordinates, units = grid_coordinates(size, resampling, image.device, spacing)
    maps = exponential(asked, t)
    if any(horizon(generator) for generator in asked):
        step = _everywhere(maps - torch.eye(*maps.shape[-2:], dtype=maps.dtype, device=maps.device))
        points = coordinates[..., :-1] + projective_step(step, coordinates)  # NaN, which is not inside
    else:
        points = (_everywhere(maps[:, :-1]) @ coordinates[..., None])[..., 0]
    edge = 0 if resampling.align_corners else 1
    reach = torch.tensor([length - 1 + edge for length in size[::-1]], dtype=points.dtype, device=points.device) / 2
    # Rounding must not take away what stands on the frame itself.
    return (units * points.abs() <= reach + 1e-9).all(-1)


def _parameter(t: Parameter, batch: Tensor) -> Tensor:
    """The group parameters as a tensor of shape (N,) or (1,), in the dtype of coordinates."""
    if not isinstance(t, (int, float, Tensor)) or isinstance(t, bool):
        raise TypeError(f"`t` must be a number or a tensor, got {type(t).__name__}. Pass e.g. 0.1.")
    _check_finite(t)
    # A number goes to float64 at once: by way of the default dtype it would lose half of its digits.
    parameter = torch.as_tensor(t, dtype=coordinate_dtype(batch.device), device=batch.device)
    if parameter.ndim == 0:
        return parameter[None]
    if parameter.shape != (batch.shape[0],):
        raise ValueError(
            f"`t` must be a number or of shape ({batch.shape[0]},), one for each image, got {tuple(parameter.shape)}."
        )
    return parameter


def _check_finite(t: Parameter) -> None:
    if not isinstance(t, Tensor):
        bad = [] if math.isfinite(t) else [t]
    elif torch.compiler.is_compiling():  # values are not known then
        return
    else:
        plain = t.detach()
        # Under `vmap` and the like the values are those of what is wrapped.
        while torch._C._functorch.is_functorch_wrapped_tensor(plain):
            plain = torch._C._functorch.get_unwrapped(plain)
        finite = plain.isfinite()
        bad = [] if bool(finite.all()) else plain[~finite].flatten()[:1].tolist()
    if bad:
        raise ValueError(f"`t` must be finite, got {bad[0]}. Check what the number is made of.")
