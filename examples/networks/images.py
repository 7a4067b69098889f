"""Ordinary networks for images."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["PlainConvolutions"]


class PlainConvolutions(nn.Module):
    """Three convolutions with means of pixels between them, and the mean over what they give. It claims no symmetry.

    Args:
        channels: Of each.
        classes: How many.
    """

    def __init__(self, channels: int = 24, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside in (1, channels, channels):
            layers += [nn.Conv2d(inside, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.SiLU(), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers[:-1])
        self.read = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, H, W) to scores (B, classes)."""
        return self.read(self.layers(images).mean((2, 3)))
