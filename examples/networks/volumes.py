"""A U-Net for volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["UNet3d"]


def block(inside: int, outside: int) -> nn.Module:
    """Two convolutions with instance norms."""
    layers = []
    for first in (inside, outside):
        layers += [nn.Conv3d(first, outside, 3, padding=1), nn.InstanceNorm3d(outside, affine=True), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """Three scales with skips, as segmentation networks of medical volumes have them. It claims no symmetry.

    Args:
        inside: Channels of the volume.
        outside: Channels of the result.
        width: Channels at the finest scale.

    Example:
        >>> UNet3d()(torch.zeros(1, 1, 8, 8, 8)).shape
        torch.Size([1, 2, 8, 8, 8])
    """

    def __init__(self, inside: int = 1, outside: int = 2, width: int = 8) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(block(a, b) for a, b in zip((inside, *widths), widths, strict=False))
        self.up = nn.ModuleList(block(b + a, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.read = nn.Conv3d(width, outside, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Volumes (B, C, D, H, W) with sides that are multiples of four to maps of the same size."""
        kept = []
        for scale, layer in enumerate(self.down):
            volume = layer(volume if scale == 0 else nn.functional.avg_pool3d(volume, 2))
            kept.append(volume)
        for layer, fine in zip(self.up, kept[-2::-1], strict=True):
            coarse = nn.functional.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)
            volume = layer(torch.cat([coarse, fine], dim=1))
        return self.read(volume)
