"""Convolutions over groups that move the plane, for points with values: LieConv of Finzi et al. (2020)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = ["LieConvolution", "LieConvolutionalNetwork", "Motions", "PlaneGroup", "Rotations", "ScaledRotations", "Shifts"]


class PlaneGroup(Protocol):
    """A group that moves the plane, as a convolution needs it.

    Elements are given by coordinates, and with them go the numbers of the orbit in which the point stands. Angles of
    ``relative`` lie in (-π, π].
    """

    algebra: int
    """Dimension of the group."""
    orbit: int
    """How many numbers tell its orbits apart."""
    several: bool
    """Whether more than one element takes the origin to a point, so that points are lifted several times."""

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """Points (B, n, 2) to elements (B, n · k, algebra + orbit), of which ``turns`` (k,) or (n, k) tells the k."""

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        """log(v⁻¹ u) of elements v ``at`` a place and ``other`` ones u, (..., algebra)."""


def angle(turn: Tensor) -> Tensor:
    """An angle in (-π, π].

    The cut lies a hair beyond π: of what is just opposite, as pixels of a lattice are, rounding would choose the side.
    """
    return math.pi - 1e-6 - torch.remainder(math.pi - 1e-6 - turn, 2 * math.pi)


class Shifts:
    """T(2), the translations: a point is the element that takes the origin to it; there is one orbit."""

    algebra, orbit, several = 2, 0, False

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """The places themselves."""
        return places

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of places."""
        return other - at


class Rotations:
    """SO(2), the rotations about the origin: an angle; the orbits are circles, told apart by their radius."""

    algebra, orbit, several = 1, 1, False

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """(θ, r) of each point; at the origin there is no angle."""
        return torch.stack([torch.atan2(places[..., 1], places[..., 0]), places.norm(dim=-1)], dim=-1)

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of angles."""
        return angle(other[..., :1] - at[..., :1])


class ScaledRotations:
    """R*×SO(2), rotations and scale about the origin: (log r, θ); all points but the origin are one orbit."""

    algebra, orbit, several = 2, 0, False

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """(log r, θ) of each point; the origin has none."""
        return torch.stack([places.norm(dim=-1).log(), torch.atan2(places[..., 1], places[..., 0])], dim=-1)

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of both."""
        scale, turn = (other - at).unbind(-1)
        return torch.stack([scale, angle(turn)], dim=-1)


class Motions:
    """SE(2), translations and rotations: (x, y, θ). Any θ takes the origin to a point, so that there are as many lifts.

    The convolution is over all of them: with k angles it is a sum in place of an integral over the circle.
    """

    algebra, orbit, several = 3, 0, True

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """(x, y, θ) for each point and each of its angles."""
        angles = turns.expand(*places.shape[:2], turns.shape[-1])
        both = places[:, :, None].expand(*angles.shape, 2)
        return torch.cat([both, angles[..., None]], dim=-1).flatten(1, 2)

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        r"""(V⁻¹ t, φ) of the motion (t, φ) from one to the other, in the frame of the first.

        .. math:: V^{-1} = \frac\varphi2 \begin{pmatrix} \cot\varphi/2 & 1 \\ -1 & \cot\varphi/2 \end{pmatrix}
        """
        turn = angle(other[..., 2] - at[..., 2])
        dx, dy = (other - at)[..., :2].unbind(-1)
        cos, sin = at[..., 2].cos(), at[..., 2].sin()
        x, y = cos * dx + sin * dy, cos * dy - sin * dx
        half = turn / 2
        # φ/2 cot φ/2 = cos φ/2 / sinc(φ/2π), which has no hole at 0.
        along = half.cos() / torch.sinc(half / math.pi)
        return torch.stack([along * x + half * y, along * y - half * x, turn], dim=-1)


class LieConvolution(nn.Module):
    r"""A convolution over a group, by the nearest of its elements (Finzi et al. 2020, Eqs. 6 and 9).

    .. math:: h_v = W \, \frac{\sum_u w_{vu} \, k(\log v^{-1}u, q_v, q_u) \otimes f_u}{\sum_u w_{vu}}

    k is a small network, q are orbits. The sum goes over the ``fill``-th part of all elements that is nearest to v in
    d² = |log v⁻¹u|² + |q_v - q_u|², with the window w = (1 - d²/d_max²)²: of elements equally far away, as a lattice has
    them, rounding chooses which are the nearest, and here those at the rim have no weight.

    Args:
        group: The group.
        inside: Channels of f.
        outside: Channels of h.
        fill: Which part of all elements are neighbours.
        kernels: How many numbers k returns.
        hidden: Width of the kernel's network.
    """

    def __init__(
        self, group: PlaneGroup, inside: int, outside: int, fill: float, kernels: int = 8, hidden: int = 16
    ) -> None:
        super().__init__()
        self.group, self.fill = group, fill
        self.kernel = perceptron((group.algebra + 2 * group.orbit, hidden, hidden, kernels))
        self.mix = nn.Linear(kernels * inside, outside)

    def forward(self, at: Tensor, elements: Tensor, features: Tensor) -> Tensor:
        """The convolved features.

        Args:
            at: Elements v where they are wanted, (B, V, e), or (1, V, e) where they are the same for all.
            elements: Elements u, (B or 1, U, e).
            features: (B, U, inside).

        Returns:
            (B, V, outside).
        """
        algebra = self.group.algebra
        apart = self.group.relative(at[:, :, None], elements[:, None])
        far = torch.cat([apart, (elements[:, None] - at[:, :, None])[..., algebra:]], dim=-1).square().sum(-1)
        squared, index = far.topk(max(2, round(self.fill * elements.shape[1])), dim=-1, largest=False)
        window = (1 - squared / squared[..., -1:]).square()
        rows = torch.arange(len(elements), device=elements.device)[:, None, None]
        near = elements[rows, index]
        offsets = torch.cat([self.group.relative(at[:, :, None], near)], -1)
        if self.group.orbit:
            offsets = torch.cat([offsets, at[:, :, None, algebra:].expand_as(near[..., algebra:]), near[..., algebra:]], -1)
        weights = self.kernel(offsets) * (window / window.sum(-1, keepdim=True))[..., None]
        if len(elements) == 1:
            rows = torch.arange(len(features), device=elements.device)[:, None, None]
        gathered = torch.einsum("bvmk,bvmc->bvkc", weights, features[rows, index])
        return self.mix(gathered.flatten(2))


class LieConvolutionalNetwork(nn.Module):
    def __init__(self, group: PlaneGroup, places, centres, classes: int = 10, channels: int = 32, depth: int = 3, lifts: int = 4, fill=(0.1, 0.3)) -> None:
        super().__init__()
        self.group = group
        self.lifts = lifts if group.several else 1
        self.register_buffer("centres", centres)
        inside = [1] + [channels] * (depth - 1)
        self.layers = nn.ModuleList(LieConvolution(group, c, channels, fill[k > 0]) for k, c in enumerate(inside))
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in inside)
        self.read = nn.Linear(channels, classes)

    def forward(self, places: Tensor, values: Tensor, turns: Tensor | None = None) -> Tensor:
        if turns is None:
            turns = torch.arange(self.lifts, dtype=places.dtype) * (2 * math.pi / self.lifts)
            if self.training and self.group.several:
                turns = turns + 2 * math.pi * torch.rand((), dtype=places.dtype)
        k = turns.shape[-1] if self.group.several else 1
        elements = self.group.lift(places, turns)
        features = values[..., None].repeat_interleave(k, 1)
        rows = (self.centres[:, None] * k + torch.arange(k)).flatten()
        at = elements[:, rows]
        for n, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            new = layer(at, elements, features)
            new = nn.functional.silu(norm(new.flatten(0, 1)).unflatten(0, new.shape[:2]))
            features = new if n == 0 else features + new
            elements = at
        return self.read(features.mean(1))
