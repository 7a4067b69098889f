r"""Translations and rotations of band-limited images by Lanczos filters, and where their results are whole.

The kernel is :math:`s(u) = \mathrm{sinc}(u)\,\mathrm{sinc}(u / 3)` for :math:`|u| < 3`, in two dimensions
:math:`s(u_x) s(u_y)` (Karras et al. 2021, arXiv 2106.12423, Appendix E).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["REACH", "low_pass", "rotate", "shift", "translate"]

REACH = 3
"""Half width of the Lanczos kernel in pixels."""

# Points for each pixel of the finer lattice on which a rotated image is low-passed.
_FINE = 4


def _lanczos(u: Tensor) -> Tensor:
    return torch.sinc(u) * torch.sinc(u / REACH) * (u.abs() < REACH)


def _along(image: Tensor, steps: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """An axis of each image moved by its own step, and which pixels have all that they are made of in the frame."""
    size = image.shape[axis]
    place = torch.arange(size, dtype=image.dtype, device=image.device)
    points = place + steps.to(image)[:, None]
    weights = _lanczos(points[:, :, None] - place)
    whole = steps.to(image).round() == steps.to(image)
    reach = torch.where(whole, 0, REACH - 1).to(image)[:, None]
    inside = (points.floor() - reach >= 0) & (points.ceil() + reach <= size - 1)
    # The sum of a row differs from 1 by up to a percent, which would dim the image.
    weights = weights / weights.sum(-1, keepdim=True).where(inside[:, :, None], torch.ones_like(points[:, :, None]))
    moved = torch.einsum("npk,nchk->nchp" if axis == -1 else "npk,nckw->ncpw", weights, image)
    return moved, inside


def translate(image: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Images moved by parts of pixels: y(p) = Σ_k x(k) s(p + step - k), weights adding up to 1.

    Args:
        image: Shape (N, C, H, W).
        steps: Shape (N, 2): pixels along x and y; positive moves the content to the left and up.

    Returns:
        The moved images, and booleans (N, H, W): pixels whose filter lies within the frame.

    Example:
        >>> moved, inside = translate(torch.ones(1, 1, 8, 8), torch.tensor([[0.5, 0.0]]))
        >>> moved[inside[:, None]].unique().round(decimals=6).tolist(), inside[0, 0].int().tolist()
        ([1.0], [0, 0, 1, 1, 1, 0, 0, 0])
    """
    moved, inside_x = _along(image, steps[:, 0], -1)
    moved, inside_y = _along(moved, steps[:, 1], -2)
    return moved, inside_y[:, :, None] & inside_x[:, None, :]


def shift(image: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Images moved by whole pixels, exactly; zeros enter.

    Args:
        image: Shape (N, C, H, W).
        steps: Shape (N, 2), integers: pixels along x and y.

    Returns:
        The moved images, and booleans (N, H, W): pixels that were in the frame before.

    Example:
        >>> moved, inside = shift(torch.arange(1.0, 4.0).reshape(1, 1, 1, 3), torch.tensor([[1, 0]]))
        >>> moved.flatten().tolist(), inside.flatten().tolist()
        ([2.0, 3.0, 0.0], [True, True, False])
    """
    height, width = image.shape[-2:]
    j = torch.arange(width, device=image.device) + steps[:, :1].to(image.device)
    i = torch.arange(height, device=image.device) + steps[:, 1:].to(image.device)
    inside = ((i >= 0) & (i < height))[:, :, None] & ((j >= 0) & (j < width))[:, None, :]
    rows = torch.arange(len(image), device=image.device)[:, None, None]
    moved = image.movedim(1, -1)[rows, i.clamp(0, height - 1)[:, :, None], j.clamp(0, width - 1)[:, None, :]]
    return moved.movedim(-1, 1) * inside[:, None], inside


def _matrices(angles: Tensor) -> Tensor:
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], -2)


def _lattice(size: tuple[int, int], margin: int, image: Tensor) -> Tensor:
    """Points (x, y) of the finer lattice about the centre, over the frame and a margin of pixels: shape (h, w, 2)."""
    axes = []
    for length in (size[1], size[0]):
        count = _FINE * (length + 2 * margin)
        step = (torch.arange(count, dtype=image.dtype, device=image.device) + 0.5) / _FINE
        axes.append(step - (length + 2 * margin) / 2)
    x, y = axes
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)


def _read(image: Tensor, points: Tensor) -> Tensor:
    """An image (C, H, W) read at points (..., 2) about its centre by the Lanczos kernel; zero outside of the frame."""
    height, width = image.shape[-2:]
    x, y = points[..., 0] + (width - 1) / 2, points[..., 1] + (height - 1) / 2
    i, j = y.floor().long(), x.floor().long()
    flat, total = image.flatten(1), torch.zeros(len(image), *x.shape, dtype=image.dtype, device=image.device)
    taps = range(1 - REACH, REACH + 1)
    along_x = [_lanczos(x - (j + b)) for b in taps]
    along_y = [_lanczos(y - (i + a)) for a in taps]
    # As in `translate`, weights add up to 1.
    whole = torch.stack(along_x).sum(0) * torch.stack(along_y).sum(0)
    for a, weight_y in zip(taps, along_y, strict=True):
        for b, weight_x in zip(taps, along_x, strict=True):
            inside = (i + a >= 0) & (i + a < height) & (j + b >= 0) & (j + b < width)
            weight = weight_y * weight_x * inside / whole
            index = (i + a).clamp(0, height - 1) * width + (j + b).clamp(0, width - 1)
            total += weight * flat[:, index]
    return total


def _thin(fine: Tensor, size: tuple[int, int], margin: int, turned: Tensor | None) -> Tensor:
    """A finer image low-passed by the kernel, turned by a matrix if one is given, at the pixels of the frame."""
    reach = _FINE * margin
    # Between a pixel's centre and the points of the finer lattice lie odd multiples of half of a step.
    step = (torch.arange(-reach, reach, dtype=fine.dtype, device=fine.device) + 0.5) / _FINE
    x, y = step.expand(len(step), -1), step[:, None].expand(-1, len(step))
    if turned is not None:
        x, y = turned[0, 0] * x + turned[0, 1] * y, turned[1, 0] * x + turned[1, 1] * y
    kernel = _lanczos(x) * _lanczos(y)
    kernel = (kernel / kernel.sum())[None, None]
    # The first window is centred at the first pixel of the frame.
    start = _FINE // 2
    windows = fine[:, None, start:, start:]
    return F.conv2d(windows, kernel, stride=_FINE)[:, 0, : size[0], : size[1]]


_MARGIN = 5
"""Pixels by which the kernel reaches when it is turned, 3 √2, rounded up."""


def rotate(image: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    r"""Images rotated, keeping the frequencies that both lattices carry.

    The image is read by the Lanczos kernel on a lattice four times as fine as that of the result, and there low-passed
    by the result's own kernel: :math:`y(p) = \sum_q s(p - q) \sum_k x(k)\, s(R q - k)`.

    Args:
        image: Shape (N, C, H, W).
        angles: Shape (N,), radians; positive turns the content clockwise as displayed.

    Returns:
        The rotated images, and booleans (N, H, W): pixels whose filters lie within the frame.

    Example:
        >>> turned, inside = rotate(torch.ones(1, 1, 24, 24), torch.tensor([0.5]))
        >>> bool((turned[inside[:, None]] - 1).abs().max() < 0.02)
        True
    """
    size = (int(image.shape[-2]), int(image.shape[-1]))
    lattice = _lattice(size, REACH, image)
    turns = _matrices(angles.to(image))
    turned = [_thin(_read(one, lattice @ turn.mT), size, REACH, None) for one, turn in zip(image, turns, strict=True)]
    return torch.stack(turned), _whole(image, turns)


def low_pass(image: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Images of which only those frequencies are kept that :func:`rotate` would keep, in their place.

    What a rotated image went through twice, its model's output goes through once more: the comparison of both is then
    one of equal bands (the pseudo-rotation of Karras et al. 2021).

    Args:
        image: Shape (N, C, H, W).
        angles: Shape (N,), of the rotation with which they are compared.

    Returns:
        The filtered images, and booleans (N, H, W): pixels whose filters lie within the frame.

    Example:
        >>> filtered, inside = low_pass(torch.ones(1, 1, 24, 24), torch.tensor([0.5]))
        >>> bool((filtered[inside[:, None]] - 1).abs().max() < 0.02)
        True
    """
    size = (int(image.shape[-2]), int(image.shape[-1]))
    lattice = _lattice(size, _MARGIN, image)
    turns = _matrices(angles.to(image))
    filtered = [_thin(_read(one, lattice), size, _MARGIN, turn) for one, turn in zip(image, turns, strict=True)]
    return torch.stack(filtered), _whole(image, torch.eye(2).to(image).expand(len(image), 2, 2))


def _whole(image: Tensor, turns: Tensor) -> Tensor:
    """Pixels from which a filter of the image's kernel and of a turned one stays in the frame."""
    height, width = image.shape[-2:]
    x = torch.arange(width, dtype=image.dtype, device=image.device) - (width - 1) / 2
    y = torch.arange(height, dtype=image.dtype, device=image.device) - (height - 1) / 2
    plane = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    points = (plane @ turns.mT[:, None]).abs()
    reach = torch.tensor([width, height], dtype=image.dtype, device=image.device) / 2 - REACH - REACH * 2**0.5
    return (points <= reach).all(-1)
