"""A graph network that is equivariant under rotations, translations and reflections by construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = ["EGNN"]


class EGNN(nn.Module):
    """Messages weigh differences of places by distances (Satorras, Hoogeboom & Welling 2021, Eqs. 3 to 6).

    Exact: features and the energy are invariant, places move as places, whatever the weights.

    Args:
        width: Features of a node.
        layers: How many layers.

    Example:
        >>> EGNN()(torch.zeros(2, 5, 3))[0].shape
        torch.Size([2, 5, 3])
    """

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(width))
        self.edge = nn.ModuleList(perceptron((2 * width + 1, width, width)) for _ in range(layers))
        self.step = nn.ModuleList(perceptron((width, width, 1)) for _ in range(layers))
        self.node = nn.ModuleList(perceptron((2 * width, width, width)) for _ in range(layers))

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Places (B, N, 3) to moved places (B, N, 3) and an energy (B,)."""
        count = places.shape[1]
        features = self.start.expand(*places.shape[:2], -1)
        for edge, step, node in zip(self.edge, self.step, self.node, strict=True):
            apart = places[:, :, None] - places[:, None]
            mine, theirs = (features.unsqueeze(axis).expand(-1, count, count, -1) for axis in (2, 1))
            message = edge(torch.cat([mine, theirs, apart.square().sum(-1, keepdim=True)], dim=-1))
            places = places + (apart * step(message)).mean(2)
            features = features + node(torch.cat([features, message.sum(2)], dim=-1))
        return places, features.sum((1, 2))
