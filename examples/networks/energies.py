"""Potential energies V(q; m, k) of bodies with masses and stiffnesses, from no symmetry to all of the plane's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.layers import ContinuousConvolution, TurningConvolution, perceptron

__all__ = ["CentredPotential", "ConvolutionalPotential", "PairwisePotential", "PlainPotential", "TurningPotential"]


def centred(places: Tensor, constants: Tensor) -> Tensor:
    """Places (B, n, 2) about the centre of mass."""
    masses = constants[..., :1]
    return places - (masses * places).sum(1, keepdim=True) / masses.sum(1, keepdim=True)


class PlainPotential(nn.Module):
    """A perceptron on the numbers as they are: no symmetry, not even that of the order of bodies.

    Args:
        bodies: n.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, bodies: int, hidden: int = 128) -> None:
        super().__init__()
        self.network = perceptron((4 * bodies, hidden, hidden, 1))

    def forward(self, places: Tensor, constants: Tensor) -> Tensor:
        """The energy.

        Args:
            places: (B, n, 2).
            constants: Mass and stiffness, (B, n, 2).

        Returns:
            (B,).
        """
        return self.network(torch.cat([places, constants], dim=-1).flatten(1))[:, 0]


class CentredPotential(PlainPotential):
    """The same perceptron on places about the centre of mass: exactly invariant to translation, and to nothing else."""

    def forward(self, places: Tensor, constants: Tensor) -> Tensor:
        """The energy, of the same arguments."""
        return super().forward(centred(places, constants), constants)


class PairwisePotential(nn.Module):
    """A sum over pairs of a perceptron of squared distances: invariant to translation, rotation, mirror images, order.

    Args:
        bodies: Not used: it takes any number.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, bodies: int, hidden: int = 32) -> None:
        super().__init__()
        self.network = perceptron((5, hidden, hidden, 1))

    def forward(self, places: Tensor, constants: Tensor) -> Tensor:
        """The energy, of the same arguments."""
        i, j = torch.triu_indices(places.shape[1], places.shape[1], 1, device=places.device)
        # A squared distance, not a distance: that has no derivative where two bodies meet.
        apart = (places[:, i] - places[:, j]).square().sum(-1, keepdim=True)
        ways = [torch.cat([apart, constants[:, a], constants[:, b]], dim=-1) for a, b in ((i, j), (j, i))]
        return self.network(torch.stack(ways)).sum((0, 2, 3)) / 2


class ConvolutionalPotential(nn.Module):
    """Continuous convolutions over T(2): exactly invariant to translation and order, to rotation as far as it learns.

    Args:
        bodies: Not used: it takes any number.
        hidden: Channels.
        depth: How many convolutions, each added to its input.
    """

    convolution: type[ContinuousConvolution] = ContinuousConvolution

    def __init__(self, bodies: int, hidden: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.lift = nn.Linear(2, hidden)
        self.layers = nn.ModuleList(self.convolution(hidden, hidden) for _ in range(depth))
        self.read = perceptron((hidden, hidden, 1))

    def forward(self, places: Tensor, constants: Tensor) -> Tensor:
        """The energy, of the same arguments."""
        features = self.lift(constants)
        for layer in self.layers:
            features = features + nn.functional.silu(layer(places, features))
        return self.read(features).sum((1, 2))


class TurningPotential(ConvolutionalPotential):
    """The same with convolutions over SO(2) about the centre of mass: exactly invariant to translation and rotation."""

    convolution = TurningConvolution

    def forward(self, places: Tensor, constants: Tensor) -> Tensor:
        """The energy, of the same arguments."""
        return super().forward(centred(places, constants), constants)
