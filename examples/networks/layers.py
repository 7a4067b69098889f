"""What the networks are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["ContinuousConvolution", "TurningConvolution", "perceptron"]


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with a smooth nonlinearity between them.

    Args:
        widths: Of the input, of each hidden layer, and of the output.

    Returns:
        The network, from (..., widths[0]) to (..., widths[-1]).
    """
    layers: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        # Forces are derivatives of the network, and their training takes derivatives of them: ReLU has none.
        layers += [nn.Linear(inside, outside), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class ContinuousConvolution(nn.Module):
    r"""A convolution over scattered points, whose kernel is a small network of the offset.

    .. math:: h_i = W \, \frac1n \sum_j k(q_i - q_j) \otimes f_j

    It is the layer of Finzi et al. (2020) for the group T(d), with all points as neighbours. Only differences of places
    enter, so h is the same wherever the points stand; k is any function of the offset, so turned points are others.

    Args:
        inside: Channels of f.
        outside: Channels of h.
        dimension: d.
        kernels: How many numbers k returns.
        hidden: Width of the kernel's network.
    """

    def __init__(self, inside: int, outside: int, dimension: int = 2, kernels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.kernel = perceptron((dimension, hidden, hidden, kernels))
        self.mix = nn.Linear(kernels * inside, outside)

    def forward(self, places: Tensor, features: Tensor) -> Tensor:
        """The convolved features.

        Args:
            places: (B, n, d).
            features: (B, n, inside).

        Returns:
            (B, n, outside).
        """
        weights = self.kernel(self.seen(places))
        gathered = torch.einsum("bijk,bjc->bikc", weights, features) / places.shape[1]
        return self.mix(gathered.flatten(2))

    def seen(self, places: Tensor) -> Tensor:
        """What the kernel sees of each pair: the offset, (B, n, n, d)."""
        return places[:, :, None] - places[:, None]


class TurningConvolution(ContinuousConvolution):
    r"""The layer of Finzi et al. (2020) for the group SO(2), the rotations of the plane about the origin.

    A point is lifted to its angle θ, and its orbit is the circle of radius r. The kernel sees
    (r_i², r_j², r_i r_j cos(θ_j - θ_i), r_i r_j sin(θ_j - θ_i)): the element v⁻¹u as the entries of its matrix and
    not by its logarithm, which jumps at π, and times both radii, because at the origin there is no angle. So h has
    derivatives everywhere, as forces need them. Mirror images are others.

    Args:
        inside: Channels of f.
        outside: Channels of h.
        kernels: How many numbers k returns.
        hidden: Width of the kernel's network.
    """

    def __init__(self, inside: int, outside: int, kernels: int = 8, hidden: int = 16) -> None:
        super().__init__(inside, outside, 4, kernels, hidden)

    def seen(self, places: Tensor) -> Tensor:
        """What the kernel sees of each pair, (B, n, n, 4)."""
        at, other = torch.broadcast_tensors(places[:, :, None], places[:, None])
        across = at[..., 0] * other[..., 1] - at[..., 1] * other[..., 0]
        return torch.stack([at.square().sum(-1), other.square().sum(-1), (at * other).sum(-1), across], dim=-1)
