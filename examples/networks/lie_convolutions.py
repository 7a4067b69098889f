"""Convolutions over groups that move the plane, for points with values: LieConv of Finzi et al. (2020)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = [
    "LieClassifier",
    "LieConvolution",
    "Motions",
    "PlaneGroup",
    "Rotations",
    "ScaledRotations",
    "Shifts",
    "even_turns",
]


class PlaneGroup(Protocol):
    """A group that moves the plane, as a convolution needs it.

    An element is told by coordinates, and after them come the numbers of the orbit in which the point stands.
    """

    algebra: int
    """Dimension of the group."""
    orbit: int
    """How many numbers tell its orbits apart."""
    several: bool
    """Whether several elements take the origin to a point, so that it is lifted to as many."""
    widths: tuple[float, ...]
    """How far neighbours are in each coordinate, for a disc of radius 1."""
    limits: tuple[float, ...]
    """Beyond which distance there is no logarithm."""

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """Points (B, n, 2) to elements (B, n · k, algebra + orbit); k angles of lifts are (k,) or (n, k)."""

    def apart(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of all coordinates, (..., algebra + orbit), whose size the group keeps."""

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        """log(v⁻¹ u) of elements v and others u, (..., algebra)."""


def angle(turn: Tensor) -> Tensor:
    """An angle in [-π, π)."""
    return torch.remainder(turn + math.pi, 2 * math.pi) - math.pi


class Shifts:
    """T(2), the translations: a point is the element that takes the origin to it; there is one orbit."""

    algebra, orbit, several = 2, 0, False
    widths, limits = (0.35, 0.35), (math.inf, math.inf)

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """The places themselves."""
        return places

    def apart(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of places."""
        return other - at

    relative = apart


class Rotations:
    """SO(2), the rotations about the origin: an angle; the orbits are circles, told apart by their radius."""

    algebra, orbit, several = 1, 1, False
    widths, limits = (1.0, 0.3), (math.pi, math.inf)

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """(θ, r) of each point; at the origin there is no angle."""
        return torch.stack([torch.atan2(places[..., 1], places[..., 0]), places.norm(dim=-1)], dim=-1)

    def apart(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of angle and radius."""
        turn, further = (other - at).unbind(-1)
        return torch.stack([angle(turn), further], dim=-1)

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of angles."""
        return angle(other[..., :1] - at[..., :1])


class ScaledRotations:
    """R*×SO(2), rotations and scale about the origin: (θ, log r); all points but the origin are one orbit."""

    algebra, orbit, several = 2, 0, False
    widths, limits = (0.7, 0.7), (math.pi, math.inf)

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """(θ, log r) of each point; the origin has neither."""
        return torch.stack([torch.atan2(places[..., 1], places[..., 0]), places.norm(dim=-1).log()], dim=-1)

    def apart(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of both."""
        turn, larger = (other - at).unbind(-1)
        return torch.stack([angle(turn), larger], dim=-1)

    relative = apart


class Motions:
    """SE(2), translations and rotations: (x, y, θ). The origin gets to a point by any θ, so a point is lifted to many.

    With k angles a sum stands in place of the integral over the circle: rotations by others than their differences are
    kept as far as the two are the same.
    """

    algebra, orbit, several = 3, 0, True
    widths, limits = (0.35, 0.35, math.pi), (math.inf, math.inf, math.pi)

    def lift(self, places: Tensor, turns: Tensor) -> Tensor:
        """(x, y, θ) for each point and each of its angles."""
        angles = turns.expand(*places.shape[:2], turns.shape[-1])
        both = places[:, :, None].expand(*angles.shape, 2)
        return torch.cat([both, angles[..., None]], dim=-1).flatten(1, 2)

    def apart(self, at: Tensor, other: Tensor) -> Tensor:
        """Differences of places and angles."""
        step = other - at
        return torch.cat([step[..., :2], angle(step[..., 2:])], dim=-1)

    def relative(self, at: Tensor, other: Tensor) -> Tensor:
        r"""(V⁻¹ t, φ) of the motion (t, φ) from one to the other, in the frame of the first.

        .. math:: V^{-1} = \frac\varphi2 \begin{pmatrix} \cot\varphi/2 & 1 \\ -1 & \cot\varphi/2 \end{pmatrix}
        """
        dx, dy, turn = self.apart(at, other).unbind(-1)
        cos, sin = at[..., 2].cos(), at[..., 2].sin()
        x, y = cos * dx + sin * dy, cos * dy - sin * dx
        half = turn / 2
        along = half.cos() / torch.sinc(half / math.pi)  # φ/2 cot φ/2, without a hole at 0
        return torch.stack([along * x + half * y, along * y - half * x, turn], dim=-1)


def even_turns(count: int, offset: Tensor | float = 0.0) -> Tensor:
    """Angles (count,) that are evenly spread over the circle."""
    return offset + 2 * math.pi / count * torch.arange(count, dtype=torch.float64)


class LieConvolution(nn.Module):
    r"""A convolution over a group, with the nearest of its elements (Finzi et al. 2020, Eqs. 6 and 9).

    .. math:: h_v = W \, \frac{\sum_u w_{vu} \, k(\log v^{-1}u, q_v, q_u) \otimes f_u}{\sum_u w_{vu}}

    k is a small network, q tells the orbits, and w = (1 - d²)² for a distance d < 1, in which each coordinate counts in
    units of its width. The sum goes over all elements nearer than that, and not, as in the paper, over a number of the
    nearest: on a lattice many have one distance, and rounding would choose among them. Widths of angles are at most π,
    where the logarithm jumps: there w is zero.

    Exact: what the group moves, it moves v⁻¹u, q, d, and so h, not at all.

    Args:
        group: The group.
        inside: Channels of f.
        outside: Channels of h.
        reach: How many times the group's widths neighbours are away at most.
        kernels: How many numbers k returns.
        hidden: Width of the kernel's network.
    """

    widths: Tensor

    def __init__(
        self, group: PlaneGroup, inside: int, outside: int, reach: float = 1.0, kernels: int = 8, hidden: int = 16
    ) -> None:
        super().__init__()
        self.group = group
        widths = [min(reach * width, limit) for width, limit in zip(group.widths, group.limits, strict=True)]
        self.register_buffer("widths", torch.tensor(widths, dtype=torch.float64))
        self.kernel = perceptron((group.algebra + 2 * group.orbit, hidden, hidden, kernels))
        self.mix = nn.Linear(kernels * inside, outside)

    def forward(self, at: Tensor, elements: Tensor, features: Tensor) -> Tensor:
        """The convolved features.

        Args:
            at: Elements v where they are wanted, (P, V, e). P is 1 where places are the same for all, and else B.
            elements: Elements u, (P, U, e).
            features: (B, U, inside).

        Returns:
            (B, V, outside).
        """
        algebra = self.group.algebra
        far = (self.group.apart(at[:, :, None], elements[:, None]) / self.widths).square().sum(-1)
        count = int((far < 1).sum(-1).max())
        squared, index = far.topk(count, dim=-1, largest=False)
        window = (1 - squared).clamp(min=0).square()
        rows = torch.arange(len(elements), device=elements.device)[:, None, None]
        near, here = elements[rows, index], at[:, :, None].expand(-1, -1, count, -1)
        seen = torch.cat([self.group.relative(here, near), here[..., algebra:], near[..., algebra:]], dim=-1)
        # A fresh network is nearly linear in numbers below 1, and kernels should not be.
        units = torch.cat([self.widths, self.widths[algebra:]]) / 8
        weights = self.kernel(seen / units) * (window / window.sum(-1, keepdim=True))[..., None]
        # Samples that share their places are columns of one matrix.
        columns = features.unflatten(0, (len(elements), -1)).transpose(1, 2)  # (P, U, B / P, inside)
        gathered = weights.mT @ columns.flatten(2)[rows, index]  # (P, V, kernels, B / P · inside)
        gathered = gathered.unflatten(-1, columns.shape[2:]).permute(0, 3, 1, 2, 4)
        return self.mix(gathered.flatten(3).flatten(0, 1))


class LieClassifier(nn.Module):
    """Scores of classes by convolutions over a group, and the mean over what they give.

    Exact: scores stay as they are when all points are moved by an element of the group, whatever the weights; for
    several lifts, by a translation, and by a rotation that takes their angles to one another. The order of points is
    one of places: ``centres`` go by it.

    Args:
        group: The group.
        centres: Numbers of the points at which convolutions are evaluated, (V,).
        lifts: Angles for each point, where the group has them; evenly spread, in training from a random one on.
        classes: How many.
        channels: Between convolutions; they are reduced to a quarter before each, as in the paper's blocks.
        depth: How many convolutions; those after the first are added to their inputs.
        reach: How many times the group's widths neighbours are away, in the first convolution and in later ones.
    """

    centres: Tensor

    def __init__(
        self,
        group: PlaneGroup,
        centres: Tensor,
        lifts: int = 4,
        classes: int = 10,
        channels: int = 32,
        depth: int = 3,
        reach: tuple[float, float] = (1.0, 2.0),
    ) -> None:
        super().__init__()
        self.group, self.lifts = group, lifts
        self.register_buffer("centres", centres)
        narrow = channels // 4
        self.first = LieConvolution(group, 1, channels, reach[0])
        self.reduce = nn.ModuleList(nn.Linear(channels, narrow) for _ in range(depth - 1))
        self.later = nn.ModuleList(LieConvolution(group, narrow, channels, reach[1]) for _ in range(depth - 1))
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(depth))
        self.read = nn.Linear(channels, classes)

    def forward(self, places: Tensor, values: Tensor, turns: Tensor | None = None) -> Tensor:
        """The scores.

        Args:
            places: (B, n, 2), or (1, n, 2) where they are the same for all; rotations are about the origin.
            values: At these places, (B, n).
            turns: Angles of the lifts, (k,) or (n, k), in place of its own.

        Returns:
            (B, classes).
        """
        if turns is None:
            turns = even_turns(self.lifts, 2 * math.pi * torch.rand(()).item() if self.training else 0.0)
        count = turns.shape[-1] if self.group.several else 1
        elements = self.group.lift(places, turns.to(places))
        at = elements.unflatten(1, (-1, count))[:, self.centres].flatten(1, 2)
        lifted = values.repeat_interleave(count, dim=1)[..., None]
        features = self._activated(0, self.first(at, elements, lifted))
        for k, (reduce, layer) in enumerate(zip(self.reduce, self.later, strict=True), start=1):
            features = features + self._activated(k, layer(at, at, reduce(features)))
        return self.read(features.mean(1))

    def _activated(self, layer: int, features: Tensor) -> Tensor:
        return nn.functional.silu(self.norms[layer](features.mT).mT)
