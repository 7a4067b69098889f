"""Energies and forces of molecules, padded to one length: what of space a network sees, and where forces are from.

A batch is a mapping with places ``pos`` (B, N, 3), atomic numbers ``numbers`` (B, N), and ``mask`` (B, N), True for the
atoms that are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = ["AtomNetwork", "GradientForces", "PairForces"]

Molecules = Mapping[str, Tensor]


class AtomNetwork(nn.Module):
    r"""Features of atoms by continuous filters (Schütt et al. 2017, Section 3), with all atoms as neighbours.

    .. math:: h_i \leftarrow h_i + u\Big(\sum_{j \ne i} a(h_j) \odot w(e_{ij}) / \sqrt 8\Big)

    With ``directions=False`` e are Gaussians of the distance: features are exactly invariant to translation, rotation,
    mirror images and to the order of the others. With True they are told the unit vector from i to j too: that is all
    the difference, and rotations and mirror images change the features as far as the weights use it.

    Args:
        directions: Whether filters see directions.
        width: Features of an atom.
        layers: How many times atoms hear of each other.
        gaussians: How many.
        reach: The largest centre of a Gaussian, in angstrom.
        elements: Atomic numbers are smaller.

    Example:
        >>> batch = {"pos": torch.rand(2, 3, 3), "numbers": torch.ones(2, 3).long(), "mask": torch.ones(2, 3).bool()}
        >>> AtomNetwork()(batch)[0].shape
        torch.Size([2, 3, 32])
    """

    centres: Tensor

    def __init__(
        self,
        directions: bool = False,
        width: int = 32,
        layers: int = 2,
        gaussians: int = 16,
        reach: float = 5.0,
        elements: int = 10,
    ) -> None:
        super().__init__()
        self.directions, self.width = directions, width
        self.register_buffer("centres", torch.linspace(0.5, reach, gaussians))
        self.pairs = gaussians + 3 * directions
        self.embedding = nn.Embedding(elements, width)
        self.filter = nn.ModuleList(perceptron((self.pairs, width, width)) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.update = nn.ModuleList(perceptron((width, width, width)) for _ in range(layers))

    def forward(self, batch: Molecules) -> tuple[Tensor, Tensor, Tensor]:
        """What is known of atoms and pairs.

        Args:
            batch: See the head of this file.

        Returns:
            Features (B, N, width), what filters see of pairs (B, N, N, pairs), and unit vectors from i to j
            (B, N, N, 3), 0 where there is no pair.
        """
        pos, mask = batch["pos"], batch["mask"]
        count = pos.shape[1]
        pair = mask[:, :, None] & mask[:, None] & ~torch.eye(count, dtype=torch.bool, device=pos.device)
        apart = (pos[:, None] - pos[:, :, None]) * pair[..., None]
        # A root has no derivative at zero, where an atom meets itself.
        distance = (apart.square().sum(-1) + ~pair).sqrt()[..., None]
        unit = apart / distance
        spacing = self.centres[1] - self.centres[0]
        seen = torch.exp(-0.5 * ((distance - self.centres) / spacing).square())
        if self.directions:
            seen = torch.cat([seen, unit], dim=-1)
        features = self.embedding(batch["numbers"])
        for see, mix, update in zip(self.filter, self.mix, self.update, strict=True):
            weights = see(seen) * pair[..., None]
            # A sum and not a mean, so that far atoms weigh nothing; the root is the size of that over eight neighbours.
            heard = torch.einsum("bijc,bjc->bic", weights, mix(features)) / math.sqrt(8)
            features = features + update(heard)
        return features, seen, unit


class GradientForces(nn.Module):
    """An energy that is a sum over atoms, and forces that are its negative gradient.

    Forces add up to nothing, because only differences of places are seen, and do no work around a closed path. Their
    torque is the derivative of the energy by rotation: nothing if the energy is invariant.

    Args:
        atoms: The network of atoms.
        unit: A force of the size that occurs, in eV/angstrom, so that fresh networks are neither stiff nor flat.
    """

    def __init__(self, atoms: AtomNetwork, unit: float = 1.0) -> None:
        super().__init__()
        self.atoms, self.unit = atoms, unit
        self.read = perceptron((atoms.width, atoms.width, 1))

    def energy(self, batch: Molecules) -> Tensor:
        """The energy (B,)."""
        return self.unit * (self.read(self.atoms(batch)[0])[..., 0] * batch["mask"]).sum(1)

    def forward(self, batch: Molecules) -> dict[str, Tensor]:
        """Energies (B,) and forces (B, N, 3)."""

        def total(pos: Tensor) -> tuple[Tensor, Tensor]:
            energy = self.energy({**batch, "pos": pos})
            return energy.sum(), energy

        gradient, energy = torch.func.grad(total, has_aux=True)(batch["pos"])
        return {"energy": energy, "forces": -gradient}


class PairForces(nn.Module):
    r"""An energy, and forces that are sums over pairs and owe the energy nothing.

    .. math:: F_i = \sum_{j \ne i} \phi(h_i, h_j, e_{ij}) \, (r_j - r_i) / |r_j - r_i|

    That is the form of Satorras, Hoogeboom & Welling (2021), Eq. 4: where features are invariant, forces turn with the
    molecule exactly. Of features that see directions \phi is three numbers, and any vector can come of it.
    In neither is \phi made alike for both of a pair, so that forces need not add up to nothing: equivariance alone
    conserves neither momentum, nor spin, nor energy.

    Args:
        atoms: The network of atoms.
        unit: As in :class:`GradientForces`.
    """

    def __init__(self, atoms: AtomNetwork, unit: float = 1.0) -> None:
        super().__init__()
        self.atoms, self.unit = atoms, unit
        self.read = perceptron((atoms.width, atoms.width, 1))
        self.pull = perceptron((2 * atoms.width + atoms.pairs, atoms.width, 3 if atoms.directions else 1))

    def energy(self, batch: Molecules) -> Tensor:
        """The energy (B,)."""
        return self._energy(batch, self.atoms(batch)[0])

    def _energy(self, batch: Molecules, features: Tensor) -> Tensor:
        return self.unit * (self.read(features)[..., 0] * batch["mask"]).sum(1)

    def forward(self, batch: Molecules) -> dict[str, Tensor]:
        """Energies (B,) and forces (B, N, 3)."""
        features, seen, unit = self.atoms(batch)
        count = features.shape[1]
        mine, other = (features.unsqueeze(axis).expand(-1, count, count, -1) for axis in (2, 1))
        pull = self.pull(torch.cat([mine, other, seen], dim=-1))
        # Padded atoms and an atom itself are no neighbours; the unit vectors are 0 there, and only there.
        pull = pull * (unit != 0).any(-1, keepdim=True) if self.atoms.directions else pull * unit
        return {"energy": self._energy(batch, features), "forces": self.unit * pull.sum(2)}
