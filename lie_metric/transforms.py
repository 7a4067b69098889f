"""Finite and infinitesimal actions of generators on images, signals and volumes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lie_metric.algebra import GENERATORS, named
from lie_metric.motion import Parameter, check_image, check_spacing, from_slopes, pixels_per_unit, tangents
from lie_metric.resampling import Resampling
from lie_metric.warping import apply, move, parameter_of, reads_inside, warp

__all__ = [
    "apply",
    "check_image",
    "check_spacing",
    "from_slopes",
    "hyperbolic_rotate",
    "move",
    "parameter_of",
    "perspective",
    "pixels_per_unit",
    "reads_inside",
    "rotate",
    "saturate",
    "scale",
    "shear",
    "stretch",
    "tangents",
    "translate",
    "warp",
]

Axis = Literal["x", "y"]


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
        >>> import torch
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
        >>> import torch
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
        >>> import torch
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
        >>> import torch
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
        >>> import torch
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
        >>> import torch
        >>> image = torch.rand(1, 8, 8)
        >>> bool((hyperbolic_rotate(image, 0.0) == image).all())
        True
    """
    return apply(image, GENERATORS["hyperbolic_rotation"], t, resampling)


def perspective(image: Tensor, t: Parameter, axis: Axis = "x", resampling: Resampling | None = None) -> Tensor:
    """The image as seen when its plane is turned away on one side: (T_t x)(p) = x(p / (1 + t p_x)) for ``axis="x"``.

    Convention:
        A positive t enlarges the content at the right ("x") or below ("y"), which comes nearer, and shrinks that at the
        other side; the centre stays as it is. The content at p goes to p / (1 - t p_x). All points with t p_x = -1
        are read infinitely far away: they must be outside of the frame, for square images |t| < 1.

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: The inverse of the distance of the horizon from the centre, in halves of the shorter side.
        axis: ``"x"`` or ``"y"``.
        resampling: The stencil and padding.

    Returns:
        The transformed image.

    Example:
        >>> import torch
        >>> row = torch.arange(4.0).expand(1, 4, 4)
        >>> [round(value, 3) for value in perspective(row, 0.5, resampling=Resampling("bilinear"))[0, 0].tolist()]
        [0.0, 0.929, 1.944, 2.591]
    """
    return apply(image, named(2)[0][f"perspective_{_axis(axis)}"], t, resampling)


def saturate(image: Tensor, t: Parameter) -> Tensor:
    """The image with intensities multiplied by exp(t).

    Args:
        image: Shape (C, H, W) or (N, C, H, W).
        t: Logarithm of the factor.

    Returns:
        The image times exp(t).

    Example:
        >>> import torch
        >>> saturate(torch.ones(1, 1, 1), torch.tensor(3.0).log()).round().item()
        3.0
    """
    return apply(image, GENERATORS["saturation"], t)
