"""Finite and infinitesimal actions of generators on images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lie_metric.algebra import GENERATORS, Generator, exponential, generators
from lie_metric.resampling import Resampling, coordinate_dtype, displace, slopes, working_precision

__all__ = [
    "apply",
    "hyperbolic_rotate",
    "rotate",
    "saturate",
    "scale",
    "shear",
    "stretch",
    "tangents",
    "translate",
]

Parameter = float | Tensor
Axis = Literal["x", "y"]


def check_image(image: object, name: str = "image") -> None:
    """Refuses what is no finite-size floating-point image (..., H, W).

    Args:
        image: What was given.
        name: The argument's name, for the message.

    Raises:
        TypeError: If it is no floating-point tensor.
        ValueError: If it has fewer than three or more than four axes, or is empty.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(image).__name__}. Convert it to a float tensor first.")
    if not image.is_floating_point():
        raise TypeError(
            f"`{name}` must have a floating-point dtype, got {image.dtype}. Convert and scale it, e.g. `{name} / 255`."
        )
    if image.ndim not in {3, 4} or image.numel() == 0:
        raise ValueError(
            f"`{name}` must be a non-empty image (C, H, W) or batch (N, C, H, W), got shape {tuple(image.shape)}."
        )


def _coordinates(size: Sequence[int], resampling: Resampling, device: torch.device) -> tuple[Tensor, float]:
    """Isotropic homogeneous coordinates of the pixels, shape (H, W, 3), and the unit of length in pixels."""
    height, width = size
    shorter = min(height, width)
    unit = (shorter - 1) / 2 if resampling.align_corners else shorter / 2
    if unit == 0 and max(height, width) > 1:
        raise ValueError(
            f"`image` must be at least two pixels wide and high when corners are aligned, got {height}×{width}: the "
            "unit of length is half of the distance between the outermost pixel centres. Use `align_corners=False`."
        )
    dtype = coordinate_dtype(device)
    x = torch.arange(width, dtype=dtype, device=device) - (width - 1) / 2
    y = torch.arange(height, dtype=dtype, device=device) - (height - 1) / 2
    # A single pixel with aligned corners has no extent; its one point is the origin.
    x, y = (coordinate / (unit or 1.0) for coordinate in (x, y))
    plane = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    return torch.nn.functional.pad(plane, (0, 1), value=1.0), unit


def tangents(image: Tensor, asked: Sequence[Generator], resampling: Resampling, channels_last: bool = False) -> Tensor:
    r"""The infinitesimal actions :math:`X_k \cdot x = d/dt\,T_t x` at t = 0, one for each generator.

    They equal the derivative of :func:`apply` at t = 0, at the cost of two matrix products for all generators.

    Args:
        image: Shape (..., H, W), floating point; half types are computed in float32.
        asked: K generators.
        resampling: The stencil.
        channels_last: Whether the shape is (..., H, W, C) instead.

    Returns:
        Shape (K, ..., H, W), or (K, ..., H, W, C), in the dtype of ``image``.

    Example:
        >>> ramp = torch.arange(4.0).expand(1, 4, 4)
        >>> X = generators("translation_x", "saturation")
        >>> tangents(ramp, X, Resampling("cubic"))[:, 0, 0, 1].tolist()  # one unit of length is two pixels
        [2.0, 1.0]
    """
    dtype = image.dtype
    image = working_precision(image)
    return from_slopes(image, *slopes(image, resampling, channels_last), asked, resampling, channels_last).to(dtype)


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
    size = (image.shape[-3], image.shape[-2]) if channels_last else (image.shape[-2], image.shape[-1])
    matrices = tuple(generator.matrix for generator in asked)
    velocities = _velocities(matrices, size, resampling, image.dtype, image.device)
    # Tangents are many times the image: where nothing is differentiated, each is written into its place at once.
    places: list[Tensor | None] = [None] * len(asked)
    together = None
    if not _differentiated(slope_x):
        together = image.new_empty((len(asked), *image.shape))
        places = list(together)
    results = []
    for generator, (along_x, along_y), place in zip(asked, velocities, places, strict=True):
        if channels_last:
            along_x, along_y = along_x[..., None], along_y[..., None]
        # Terms that vanish are left out, and each of the others is one pass over the image.
        terms = [
            (velocity, slope)
            for row, velocity, slope in zip(generator.matrix, (along_x, along_y), (slope_x, slope_y), strict=True)
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


def _differentiated(tensor: Tensor) -> bool:
    """Whether operations on a tensor may be recorded or transformed, so that they cannot write in place."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return torch.is_grad_enabled() or wrapped or forward_ad.unpack_dual(tensor).tangent is not None


@lru_cache(maxsize=32)
def _velocities(
    matrices: tuple[Any, ...], size: tuple[int, int], resampling: Resampling, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The vector fields of affine generators in pixels: for each, its x and y components of shape (H, W)."""
    with torch.inference_mode(False), torch.no_grad():
        coordinates, unit = _coordinates(size, resampling, device)
        fields = [
            unit * (coordinates @ torch.tensor(matrix, dtype=coordinates.dtype, device=device).mT)
            for matrix in matrices
        ]
        return [(field[..., 0].to(dtype), field[..., 1].to(dtype)) for field in fields]


def pixels_per_unit(generator: Generator, size: tuple[int, int], resampling: Resampling) -> float:
    r"""How far a generator moves pixels per unit of t: the root mean square of its velocity over the frame.

    .. math:: v_X = \sqrt{ \tfrac{1}{HW} \sum_p \| A \tilde p \|^2 }

    Args:
        generator: The generator.
        size: Height and width of the image.
        resampling: The stencil, which fixes the unit of length.

    Returns:
        Pixels per unit of t; 0 for intensities.

    Example:
        >>> translation, rotation = generators("translation_x", "rotation")
        >>> pixels_per_unit(translation, (8, 8), Resampling())  # half of the side
        4.0
        >>> round(pixels_per_unit(rotation, (224, 224), Resampling()) / 112, 4)  # sqrt(2 / 3) of it
        0.8165
    """
    ((along_x, along_y),) = _velocities((generator.matrix,), size, resampling, torch.float64, torch.device("cpu"))
    return float((along_x.square() + along_y.square()).mean().sqrt())


def apply(image: Tensor, generator: Generator | str, t: Parameter, resampling: Resampling | None = None) -> Tensor:
    r"""The finite action :math:`(T_t x)(p) = e^{ts} x(\exp(tA)\,p)` of a one-parameter group.

    At t = 0 it returns the image bit for bit, and T_s T_t = T_(s+t) up to interpolation. Usable as an augmentation:
    ``t`` may differ from image to image, and gradients flow to image and ``t``.

    Convention:
        Isotropic coordinates centred at the image centre, x to the right, y down, 1 = half of the shorter side.

    Args:
        image: Shape (C, H, W) or (N, C, H, W), any floating-point dtype; half types are computed in float32.
        generator: A generator, or the name of one.
        t: Group parameter: a number, a tensor of no axes, or of shape (N,). Units: half of the shorter side
            (translation), radian (rotation), rapidity (hyperbolic rotation), log factor (scale, stretch, saturation),
            slope (shear).
        resampling: The stencil and padding; the default is ``Resampling()``.

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
    """
    check_image(image)
    resampling = resampling or Resampling()
    found = generators(generator)
    if len(found) != 1:
        raise ValueError(
            f"`generator` must be a single generator, got the group {generator!r}. "
            f"Choose one of {[entry.name for entry in found]}."
        )
    batch = image if image.ndim == 4 else image[None]
    result = warp(batch, found, _parameter(t, batch)[:, None], resampling)
    return result if image.ndim == 4 else result[0]


def warp(image: Tensor, asked: Sequence[Generator], t: Tensor, resampling: Resampling) -> Tensor:
    r"""The finite action of :math:`\exp(\sum_k t_k X_k)`, with its own parameters for each image.

    Args:
        image: Shape (N, C, H, W).
        asked: K generators.
        t: Shape (N or 1, K), in the dtype of coordinates.
        resampling: The stencil and padding.

    Returns:
        The transformed images, of the shape and dtype of ``image``.

    Example:
        >>> row = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> step = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
        >>> warp(row, generators("translation"), step, Resampling("bilinear", "border"))[0, 0, 0].tolist()
        [1.0, 2.0, 3.0, 3.0]
    """
    result = image
    if any(any(map(any, generator.matrix)) for generator in asked):
        coordinates, unit = _coordinates(image.shape[-2:], resampling, image.device)
        step = exponential(asked, t)[:, None, None, :2] - torch.eye(2, 3, dtype=t.dtype, device=t.device)
        displacement = unit * (step @ coordinates[..., None])[..., 0]
        result = displace(image, displacement, resampling)
    if any(generator.intensity for generator in asked):
        intensity = torch.tensor([generator.intensity for generator in asked], dtype=t.dtype, device=t.device)
        result = result * (t @ intensity).exp()[:, None, None, None].to(result.dtype)
    return result


def reads_inside(image: Tensor, asked: Sequence[Generator], t: Tensor, resampling: Resampling) -> Tensor:
    """Which pixels of :func:`warp` are read inside the frame of the image.

    Args:
        image: Shape (N, C, H, W), of which the size counts.
        asked: K generators.
        t: Shape (N or 1, K).
        resampling: Tells where the frame ends: at the outer edges of the pixels, or at the centres of the outermost.

    Returns:
        Booleans of shape (N or 1, H, W).

    Example:
        >>> step = torch.tensor([[0.5]], dtype=torch.float64)  # one pixel of four
        >>> reads_inside(torch.zeros(1, 1, 4, 4), generators("translation_x"), step, Resampling())[0, 0].tolist()
        [True, True, True, False]
    """
    coordinates, unit = _coordinates(image.shape[-2:], resampling, image.device)
    points = (exponential(asked, t)[:, None, None, :2] @ coordinates[..., None])[..., 0]
    (height, width), edge = image.shape[-2:], 0 if resampling.align_corners else 1
    reach = torch.tensor([width - 1 + edge, height - 1 + edge], dtype=points.dtype, device=points.device) / 2
    # Rounding must not take away what stands on the frame itself.
    return (unit * points.abs() <= reach + 1e-9).all(-1)


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


def _axis(axis: Axis) -> Axis:
    if axis not in {"x", "y"}:
        raise ValueError(f"`axis` must be 'x' (to the right) or 'y' (down), got {axis!r}.")
    return axis


def translate(image: Tensor, t: Parameter, axis: Axis = "x", resampling: Resampling | None = None) -> Tensor:
    """The image read ``t`` half sides further along an axis: (T_t x)(p) = x(p + t e).

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Shift in halves of the shorter side; positive moves the content to the left ("x") or up ("y").
        axis: ``"x"`` or ``"y"``.
        resampling: The stencil and padding.

    Returns:
        The translated image.

    Example:
        >>> row = torch.arange(4.0).expand(1, 4, 4)
        >>> translate(row, 0.5, resampling=Resampling("bilinear", "border"))[0, 0].tolist()
        [1.0, 2.0, 3.0, 3.0]
    """
    return apply(image, GENERATORS[f"translation_{_axis(axis)}"], t, resampling)


def rotate(image: Tensor, angle: Parameter, resampling: Resampling | None = None) -> Tensor:
    """The image rotated about its centre: (T_t x)(p) = x(R_t p).

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        angle: Radians; positive turns the content clockwise as displayed (y down).
        resampling: The stencil and padding.

    Returns:
        The rotated image.

    Example:
        >>> image = torch.zeros(1, 3, 3); image[0, 0, 1] = 1.0  # top centre
        >>> rotate(image, torch.pi / 2)[0].round().abs().tolist()  # right centre
        [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    return apply(image, GENERATORS["rotation"], angle, resampling)


def scale(image: Tensor, t: Parameter, resampling: Resampling | None = None) -> Tensor:
    """The image enlarged by the factor exp(t) about its centre: (T_t x)(p) = x(exp(-t) p).

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Logarithm of the factor.
        resampling: The stencil and padding.

    Returns:
        The scaled image.

    Example:
        >>> image = torch.zeros(1, 5, 5); image[0, 2, 3] = 1.0
        >>> round(scale(image, torch.tensor(2.0).log(), Resampling("bilinear"))[0, 2, 4].item(), 6)
        1.0
    """
    return apply(image, GENERATORS["scale"], t, resampling)


def stretch(image: Tensor, t: Parameter, axis: Axis = "x", resampling: Resampling | None = None) -> Tensor:
    """The image compressed by the factor exp(t) along an axis: (T_t x)(p) = x(p with its coordinate times exp(t)).

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Logarithm of the factor.
        axis: ``"x"`` or ``"y"``.
        resampling: The stencil and padding.

    Returns:
        The stretched image.

    Example:
        >>> image = torch.rand(1, 8, 8)
        >>> both = stretch(stretch(image, 0.0, "x"), 0.0, "y")
        >>> bool((both == image).all())
        True
    """
    return apply(image, GENERATORS[f"stretch_{_axis(axis)}"], t, resampling)


def shear(image: Tensor, t: Parameter, axis: Axis = "x", resampling: Resampling | None = None) -> Tensor:
    """The image sheared along an axis: (T_t x)(p) = x(p_x + t p_y, p_y) for ``axis="x"``.

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Slope of the shear.
        axis: The axis along which points move.
        resampling: The stencil and padding.

    Returns:
        The sheared image.

    Example:
        >>> image = torch.rand(1, 8, 8)
        >>> bool((shear(image, 0.0, axis="y") == image).all())
        True
    """
    return apply(image, GENERATORS[f"shear_{_axis(axis)}"], t, resampling)


def hyperbolic_rotate(image: Tensor, t: Parameter, resampling: Resampling | None = None) -> Tensor:
    """The image squeezed along one diagonal and stretched along the other by exp(t): a hyperbolic rotation.

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Rapidity: the map is ((cosh t, sinh t), (sinh t, cosh t)).
        resampling: The stencil and padding.

    Returns:
        The transformed image.

    Example:
        >>> image = torch.rand(1, 8, 8)
        >>> bool((hyperbolic_rotate(image, 0.0) == image).all())
        True
    """
    return apply(image, GENERATORS["hyperbolic_rotation"], t, resampling)


def saturate(image: Tensor, t: Parameter) -> Tensor:
    """The image with intensities multiplied by exp(t).

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Logarithm of the factor.

    Returns:
        The image times exp(t).

    Example:
        >>> saturate(torch.ones(1, 1, 1), torch.tensor(3.0).log()).round().item()
        3.0
    """
    return apply(image, GENERATORS["saturation"], t)
