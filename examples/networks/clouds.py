"""One convolutional network on point clouds, whose symmetry is a matter of what it is told of pairs and points."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = ["CloudConvolution", "CloudNetwork"]

Pairs = Literal["distances", "differences", "positions"]
Features = Literal["none", "scalars", "vectors", "frame"]
SOFT = 0.1
"""Lengths are sqrt(l² + 0.01): a distance has no derivative where two points meet, and a point meets itself."""

SHARP = 2.0
"""How much steeper kernels begin than layers usually do: clouds are some two units across, and have parts."""


def soft_length(square: Tensor) -> Tensor:
    """A smooth length of its square."""
    return (square + SOFT**2).sqrt()


class CloudConvolution(nn.Module):
    r"""A separable group convolution, by a kernel over places and one over orientations, with a residual.

    .. math:: h_{in} = \frac1{m} \sum_{n'} k'(o_n \cdot o_{n'}) \, \sum_j k(a_{ijn'}) f_{jn'}

    after Bekkers et al. (2024, "Fast, expressive SE(n) equivariant networks"). Kernels are linear in functions
    of a, and of o · o', that all layers share.

    Args:
        width: Channels.
        kernels: How many functions.
    """

    def __init__(self, width: int, kernels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(kernels * width)
        self.mix = nn.Linear(kernels * width, width)
        self.around = nn.Linear(kernels, width, bias=False)
        self.point = nn.Sequential(nn.BatchNorm1d(width), perceptron((width, 2 * width, width)))

    def forward(self, features: Tensor, basis: Tensor, fibre: Tensor) -> Tensor:
        """New features of the shape of the old ones.

        Args:
            features: (B, n, N, width), with n orientations and N points.
            basis: Functions of all pairs, (B, n, N, N, K): the point that is summed over comes first.
            fibre: Functions of all pairs of orientations, (n, n, K).

        Returns:
            (B, n, N, width).
        """
        count, points = features.shape[1:3]
        gathered = (features.mT @ basis.flatten(3)).unflatten(3, (points, -1)).movedim(2, 3).flatten(3)
        # Means over many points, and over orientations, vary little beside what all have in common: without norms over
        # clouds nothing is learned for long.
        mixed = self.mix(self.norm(gathered.flatten(0, 2))).unflatten(0, gathered.shape[:3])
        spread = torch.einsum("nmc,bmic->bnic", self.around(fibre) / count, mixed)
        return features + self.point(spread.flatten(0, 2)).unflatten(0, spread.shape[:3])


class CloudNetwork(nn.Module):
    """Convolutions over R³, or over R³ × S² with a grid of orientations (Vadgama et al. 2025), and a mean over all.

    By what the kernels see of two points x, x' the outputs do not change under

    - "distances", |x' - x|: all rotations, reflections and translations;
    - "differences", x' - x: translations;
    - "positions", x and x': nothing.

    With a grid of directions o kernels see o · (x' - x) and |x' - x - (o · (x' - x)) o|, the invariants of a pair of
    places with an orientation (Bekkers et al. 2024), and o · o'. Outputs do not change under translations and under
    those rotations that permute the grid, and under others as far as its means are those over the sphere. What points
    are told takes symmetries away: their coordinates as three numbers ("scalars") all of them; o · x ("vectors")
    translations alone; coordinates about the centroid in a frame that is given ("frame") rotations, unless the frame is
    turned too.

    Args:
        outputs: How many numbers.
        pairs: What kernels see of two points.
        grid: Directions (n, 3); None for R³.
        features: What points are told.
        width: Channels.
        kernels: Functions of a basis of kernels.
        depth: How many convolutions.

    Raises:
        ValueError: If a name is unknown, or a choice needs a grid and has none, or the reverse.

    Example:
        >>> CloudNetwork(6)(torch.zeros(2, 10, 3)).shape
        torch.Size([2, 6])
    """

    grid: Tensor

    def __init__(
        self,
        outputs: int,
        pairs: Pairs = "distances",
        grid: Tensor | None = None,
        features: Features = "none",
        width: int = 16,
        kernels: int = 6,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if pairs not in get_args(Pairs) or features not in get_args(Features):
            raise ValueError(
                f"`pairs` and `features` must be of {get_args(Pairs)} and {get_args(Features)}, got {pairs!r} and "
                f"{features!r}."
            )
        if (grid is not None and pairs != "distances") or (grid is None and features == "vectors"):
            raise ValueError(
                f"`grid` must be given with invariant pairs alone, and for vectors, got pairs {pairs!r} and features "
                f"{features!r} with{'out a' if grid is None else ' a'} grid. Pass e.g. `grid=GRIDS['icosahedron']`."
            )
        self.pairs: Pairs = pairs
        self.features: Features = features
        # In double precision whatever the weights are: of a rounded grid no rotation is an exact symmetry.
        self.register_buffer("grid", torch.zeros(0, 3) if grid is None else grid.clone())
        seen = 2 if grid is not None else {"distances": 1, "differences": 3, "positions": 6}[pairs]
        told = {"none": 1, "scalars": 3, "vectors": 1, "frame": 3}[features]
        self.kernel = nn.Sequential(nn.Linear(seen, kernels), nn.SiLU())
        with torch.no_grad():
            for weights in self.kernel.parameters():
                weights *= SHARP
        self.around = nn.Sequential(nn.Linear(1, kernels), nn.SiLU())
        self.lift = nn.Linear(told, width)
        self.layers = nn.ModuleList(CloudConvolution(width, kernels) for _ in range(depth))
        self.read = nn.Sequential(nn.BatchNorm1d(width), perceptron((width, 2 * width, outputs)))

    def seen(self, points: Tensor) -> Tensor:
        """What kernels see of pairs (x_j, x_i): (B, n, N, N, a)."""
        theirs, ours = points[:, None, :, None], points[:, None, None]
        apart = theirs - ours
        if self.pairs == "differences":
            return apart
        if self.pairs == "positions":
            return torch.cat([ours.expand_as(apart), theirs.expand_as(apart)], dim=-1)
        square = apart.square().sum(-1)
        if not len(self.grid):
            return soft_length(square)[..., None]
        heights = (points @ self.grid.to(points.dtype).T).mT
        along = heights[..., None] - heights[:, :, None]
        return torch.stack([along, soft_length(square - along.square())], dim=-1)

    def told(self, points: Tensor, frame: Tensor | None) -> Tensor:
        """What points are told: (B, n or 1, N, features)."""
        if self.features == "none":
            return torch.ones_like(points[:, None, :, :1])
        if self.features == "scalars":
            return points[:, None]
        if self.features == "vectors":
            return (points @ self.grid.to(points.dtype).T).mT[..., None]
        centred = points - points.mean(1, keepdim=True)
        return (centred if frame is None else centred @ frame.mT)[:, None]

    def forward(self, points: Tensor, frame: Tensor | None = None) -> Tensor:
        """The outputs.

        Args:
            points: (B, N, 3).
            frame: Three unit vectors, (B, 3, 3), a row each, for features "frame"; the default is the axes.

        Returns:
            (B, outputs).
        """
        count = max(len(self.grid), 1)
        basis = self.kernel(self.seen(points))
        inner = self.grid @ self.grid.T if len(self.grid) else torch.ones(1, 1)
        fibre = self.around(inner[..., None].to(points))
        features = self.lift(self.told(points, frame)).expand(-1, count, -1, -1)
        for layer in self.layers:
            features = layer(features, basis, fibre)
        return self.read(features.mean((1, 2)))
