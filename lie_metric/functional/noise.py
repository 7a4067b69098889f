"""Random directions of the size and kind of tangents, with which a model's response to them is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lie_metric.randomness import noise, phase_randomised
from lie_metric.representations import Masked, Packed, Parts, Representation, map_grid
from lie_metric.representations.affine import Affine
from lie_metric.representations.composite import samples

__all__ = ["like_tangents"]


def like_tangents(tangents: Tensor, carrier: Representation, indices: Sequence[int], seed: int) -> Tensor:
    r"""Directions as large as tangents, and of no transform.

    On grids the phases of the tangents' spectra are turned at random. Points, vectors and the like have a random
    direction at each position, as long as the tangent there. Parts of an input each have noise of their own. What is
    none of these is taken as one long row.

    Args:
        tangents: Shape (K, B, ...).
        carrier: How the inputs are laid out.
        indices: The running numbers of the samples.
        seed: The seed.

    Returns:
        Shape (K, B, ...).

    Example:
        >>> from lie_metric.representations import Points
        >>> moved = like_tangents(torch.ones(1, 2, 5, 3), Points(3), [0, 1], 0)
        >>> bool(torch.allclose(moved.norm(dim=-1), torch.tensor(3.0).sqrt())), bool(moved.std() > 0.1)
        (True, True)
    """
    if isinstance(carrier, Parts):
        parts = zip(carrier.representations.values(), carrier.split(tangents), strict=True)
        drawn = [like_tangents(part, one, indices, seed + place) for place, (one, part) in enumerate(parts)]
        return torch.stack([carrier.join([part[k] for part in drawn]) for k in range(len(tangents))])
    if isinstance(carrier, Masked):
        return like_tangents(tangents, carrier.of, indices, seed)  # nothing is drawn where nothing moves
    if isinstance(carrier, Packed):
        graphs = [list(samples(carrier, each)) for each in tangents]
        rows = [
            like_tangents(torch.stack(graph), carrier.of, [index], seed)[:, 0]
            for graph, index in zip(zip(*graphs, strict=True), indices, strict=True)
        ]
        return torch.cat(rows, dim=1)
    if callable(getattr(carrier, "map", None)):
        dimension = getattr(carrier, "dimension", None) or 2

        def randomised(image: Tensor) -> Tensor:
            return phase_randomised(image, indices, seed, dimension)

        return torch.stack([map_grid(carrier, each, randomised) for each in tangents])
    if isinstance(carrier, Affine):
        moved = carrier.rows(tangents)
        random = noise(moved[0], indices, seed).to(moved)
        turned = random / random.norm(dim=-1, keepdim=True) * moved.norm(dim=-1, keepdim=True)
        return turned.reshape(tangents.shape)
    return phase_randomised(tangents.flatten(2)[:, :, None, None], indices, seed).reshape(tangents.shape)
