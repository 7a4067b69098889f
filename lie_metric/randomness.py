"""Random numbers that a seed and the running number of an image fix, whatever batch or process the image comes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["noise", "phase_randomised", "source", "validate_seed"]


def validate_seed(seed: object) -> None:
    """Refuses what is no seed.

    Args:
        seed: What was given.

    Raises:
        ValueError: If it is no non-negative integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer, got {seed!r}.")


def source(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random source of one image; the global random state has no part in it.

    Args:
        seed: The seed.
        index: The image's running number.
        device: Where it draws.

    Returns:
        A generator at its beginning.

    Example:
        >>> bool(torch.rand((), generator=source(0, 3)) == torch.rand((), generator=source(0, 3)))
        True
    """
    return torch.Generator(device).manual_seed((seed * 1_000_003 + index) % 2**63)


def noise(images: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """One Gaussian image for each image.

    Args:
        images: Shape (B, ...); half types are given noise in float32.
        indices: The B running numbers.
        seed: The seed.

    Returns:
        Independent standard normal numbers, shape (B, ...).

    Example:
        >>> two, one = noise(torch.zeros(2, 3), (5, 8), 0), noise(torch.zeros(1, 3), (8,), 0)
        >>> torch.equal(two[1:], one)
        True
    """
    found = torch.empty(images.shape, dtype=torch.promote_types(images.dtype, torch.float32), device=images.device)
    for row, index in zip(found, indices, strict=True):
        row.normal_(generator=source(seed, index, images.device))
    return found


def phase_randomised(images: Tensor, indices: Sequence[int], seed: int, dimension: int = 2) -> Tensor:
    r"""Images with the phases of their Fourier transform turned at random, those of all channels alike.

    .. math:: \hat u(k) = \hat x(k)\, \hat w(k) / |\hat w(k)|, \qquad w \text{ Gaussian noise}

    Spectrum, norm and correlation of channels stay, and where things are is lost (surrogate data, Theiler et al. 1992).
    It is linear in the images: several that share indices and seed are turned alike.

    Args:
        images: Shape (..., B, C, H, W), or with a grid of another dimension at the end.
        indices: The B running numbers.
        seed: The seed.
        dimension: How many axes the grid has.

    Returns:
        Images of the same shape.

    Example:
        >>> image = torch.rand(1, 3, 8, 8)
        >>> turned = phase_randomised(image, [4], 0)
        >>> round((turned.norm() / image.norm()).item(), 5), bool(torch.allclose(turned, image))
        (1.0, False)
    """
    size, axes = images.shape[-dimension:], tuple(range(-dimension, 0))
    drawn = noise(images.new_empty((len(indices), 1, *size)), indices, seed)
    turn = torch.fft.rfftn(drawn, dim=axes)
    turn = turn / turn.abs().clamp(min=torch.finfo(images.dtype).tiny)
    return torch.fft.irfftn(torch.fft.rfftn(images, dim=axes) * turn, s=size, dim=axes)
