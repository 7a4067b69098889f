"""What a stencil reports on functions whose derivatives are known: the floor under every measured value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lie_metric.algebra import generators as resolve
from lie_metric.lie import Generators
from lie_metric.randomness import validate_seed
from lie_metric.resampling import Resampling, coordinate_dtype, slopes
from lie_metric.transforms import check_image, from_slopes

__all__ = ["Control", "below_floor", "noise_floor"]

Control = Literal["square", "mean_square", "identity"]


def noise_floor(
    images: Tensor,
    generators: Generators = "affine",
    control: Control = "square",
    *,
    resampling: Resampling | None = None,
    count: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""The error of a stencil on a function with a known answer, in the units of ``relative``.

    .. math:: \mathrm{floor}_X = \sqrt{ \frac{1}{n} \sum_i \|\hat L_X f(x_i) - L_X f(x_i)\|^2 \Big/
        \frac{1}{n - 1} \sum_i \|f(x_i) - E f\|^2 }

    :math:`\hat L` is what the stencil gives, L the analytic derivative, and f one of

    - ``"square"``: :math:`f(x) = x^2` in every pixel, equivariant to each affine X. The stencil is off by as much as it
      breaks the chain rule, :math:`2 x\,\hat X x - \hat X x^2`. The floor of networks with an image-valued output.
    - ``"mean_square"``: the mean of :math:`x^2` over the image, invariant to circular translations; the error is the
      mean of :math:`2 x\,(\hat X x - X x)`. The floor of networks that pool over positions. Errors of opposite
      sign cancel in it; with circular padding those of an antisymmetric slope cancel altogether.
    - ``"identity"``: the pixels themselves, as an invariant output; the error :math:`\hat X x - X x` of the tangent
      image, before any network has smoothed it.

    The x are Gaussian random sums of plane waves with the power spectrum of the images given, without their mean, at
    their size. The waves continue beyond the frame as the padding has it, so that the answer is known in every pixel:
    cosines of half periods for reflection, full periods for circular padding. No such waves continue as ``border`` or
    ``zeros``; they are measured on cosines, and what they do to the slope at the frame is part of their floor.

    A measured value at or below the floor cannot be told from 0. The floor is that of these controls: a network that
    amplifies high frequencies has a higher one.

    Args:
        images: Shape (B, C, H, W), floating point and finite, the kind that is measured.
        generators: As in :func:`lie_metric.lie_derivative`. Intensities are exact in every stencil and add nothing.
        control: ``"square"``, ``"mean_square"`` or ``"identity"``.
        resampling: The stencil; the default is ``Resampling()``.
        count: How many control images are drawn, at least two.
        seed: Fixes them.

    Returns:
        For each generator's name a float64 number of no axes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the images are constant, which leaves no spectrum.

    Example:
        >>> import torch, lie_metric as lm
        >>> images = torch.rand(4, 3, 16, 16)
        >>> bilinear = noise_floor(images, "rotation", "identity", resampling=lm.PAPER)["rotation"]
        >>> spline = noise_floor(images, "rotation", "identity")["rotation"]
        >>> fourier = noise_floor(images, "rotation", "identity", resampling=lm.Resampling("fourier"))["rotation"]
        >>> bool(fourier < 1e-12 < spline < bilinear)
        True
    """
    asked = resolve(generators)
    resampling = resampling or Resampling()
    _validate(images, control, resampling, count, seed)
    x, true_x, true_y = _controls(images, resampling, count, seed)
    found_x, found_y = slopes(x, resampling)
    nothing = torch.zeros_like(x)
    error = from_slopes(nothing, found_x - true_x, found_y - true_y, asked, resampling)
    f = x
    if control == "square":
        f = x.square()
        square_x, square_y = slopes(f, resampling)
        error = from_slopes(nothing, 2 * x * found_x - square_x, 2 * x * found_y - square_y, asked, resampling)
    elif control == "mean_square":
        f, error = x.square().mean((-2, -1)), (2 * x * error).mean((-2, -1))
    values = (error.square().flatten(1).sum(1) / (f - f.mean()).square().sum() * (count - 1) / count).sqrt()
    return dict(zip((generator.name for generator in asked), values.unbind(), strict=True))


def below_floor(
    values: Mapping[str, Tensor] | Mapping[str, float], floors: Mapping[str, Tensor] | Mapping[str, float]
) -> dict[str, bool]:
    """Which values cannot be told from 0.

    Args:
        values: A measure in the units of ``relative`` for each generator's name.
        floors: The floors, see :func:`noise_floor`; a generator without one is not marked.

    Returns:
        For each name in ``values``, whether the value is at or below its floor.

    Example:
        >>> below_floor({"rotation": 0.1, "scale": 0.3, "shear_x": 0.0}, {"rotation": 0.2, "scale": 0.2})
        {'rotation': True, 'scale': False, 'shear_x': False}
    """
    return {name: name in floors and float(value) <= float(floors[name]) for name, value in values.items()}


def _validate(images: object, control: Control, resampling: Resampling, count: int, seed: int) -> None:
    check_image(images, "images")
    if not isinstance(resampling, Resampling):
        raise TypeError(f"`resampling` must be a `Resampling`, got {resampling!r}. Pass e.g. Resampling('bspline').")
    if control not in get_args(Control):
        raise ValueError(f"`control` must be one of {get_args(Control)}, got {control!r}.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"`count` must be an integer of at least 2, got {count!r}. One image has no spread.")
    validate_seed(seed)


def _controls(images: Tensor, resampling: Resampling, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Control images (count, 1, H, W) with the spectrum of the images, and their analytic ∂x and ∂y, per pixel."""
    dtype, device = coordinate_dtype(images.device), images.device
    (along_y, slope_y), (along_x, slope_x) = (
        tuple(part.to(device, dtype) for part in _waves(size, resampling)) for size in images.shape[-2:]
    )
    amplitudes = torch.linalg.pinv(along_y) @ images.to(dtype) @ torch.linalg.pinv(along_x).mT
    power = amplitudes.square().flatten(0, -3).mean(0)
    power[0, 0] = 0  # the mean brightness, on which no stencil errs
    if not bool(torch.isfinite(power).all()):
        raise ValueError("`images` must be finite, got NaN or infinite entries. Check the normalisation of the images.")
    # Rounding of a constant image, or of the mean brightness, is no content.
    if not bool(power.sum() > 1e-12 * images.to(dtype).square().mean()):
        raise ValueError(
            "`images` must vary over positions, got constant ones, which have no spectrum. Pass images like those "
            "that are measured."
        )
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 1, *power.shape, generator=source, dtype=torch.float64).to(power)
    drawn = drawn * power.sqrt()
    return along_y @ drawn @ along_x.mT, along_y @ drawn @ slope_x.mT, slope_y @ drawn @ along_x.mT


def _waves(size: int, resampling: Resampling) -> tuple[Tensor, Tensor]:
    """One axis: waves that continue beyond the frame as the padding has it, as columns, and their slopes.

    The wave of half a cycle per pixel is left out: between its pixels any amplitude fits.
    """
    place = torch.arange(size, dtype=torch.float64)[:, None]
    if resampling.padding == "circular":
        frequency = 2 * math.pi / size * torch.arange((size + 1) // 2, dtype=torch.float64)
        sine, cosine = (place * frequency).sin(), (place * frequency).cos()
        # The sine of frequency 0 is nothing.
        return torch.cat([cosine, sine[:, 1:]], 1), torch.cat([-frequency * sine, (frequency * cosine)[:, 1:]], 1)
    period, count = (max(size - 1, 1), max(size - 1, 1)) if resampling.align_corners else (size, size)
    place = place if resampling.align_corners else place + 0.5
    frequency = math.pi / period * torch.arange(count, dtype=torch.float64)
    return (place * frequency).cos(), -frequency * (place * frequency).sin()
