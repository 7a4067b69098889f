"""From networks to rates of change of states (B, n, 6) = (q, p, mass, stiffness), planar."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = ["Hamiltonian", "VectorField"]


class Hamiltonian(nn.Module):
    """Hamilton's equations of H = Σ p²/2m + V(q; m, k), where V is learned.

    H is conserved along its own flow whatever V is; by Noether's theorem momentum is if V is invariant to translation,
    and spin if V is to rotation.

    Args:
        potential: From places (B, n, 2) and constants (B, n, 2) to energies (B,), in units of ``unit``.
        unit: An energy of the size that occurs, so that fresh networks are neither stiff nor flat.
    """

    def __init__(self, potential: nn.Module, unit: float = 1.0) -> None:
        super().__init__()
        self.potential = potential
        self.unit = unit

    def hamiltonian(self, states: Tensor) -> Tensor:
        """The energy H, (B,)."""
        places, momenta, constants = states.split(2, dim=-1)
        kinetic = (momenta.square().sum(-1) / (2 * constants[..., 0])).sum(1)
        return kinetic + self.unit * self.potential(places, constants)

    def forward(self, states: Tensor) -> Tensor:
        """The rates (∂H/∂p, -∂H/∂q, 0, 0), of the shape of the states."""
        gradient = torch.func.grad(lambda z: self.hamiltonian(z).sum())(states)
        by_place, by_momentum, constants = gradient.split(2, dim=-1)
        return torch.cat([by_momentum, -by_place, torch.zeros_like(constants)], dim=-1)


class VectorField(nn.Module):
    """A neural ODE: rates of change by a perceptron, which owe nothing to an energy.

    Args:
        bodies: n.
        units: A velocity and a force of the sizes that occur.
        hidden: Width of its two hidden layers.
    """

    units: Tensor

    def __init__(self, bodies: int, units: tuple[float, float] = (1.0, 1.0), hidden: int = 128) -> None:
        super().__init__()
        velocity, force = units
        self.register_buffer("units", torch.tensor([velocity, velocity, force, force]))
        self.network = perceptron((6 * bodies, hidden, hidden, 4 * bodies))

    def forward(self, states: Tensor) -> Tensor:
        """The rates, of the shape of the states; masses and stiffnesses stay."""
        rates = self.network(states.flatten(1)).reshape(*states.shape[:-1], 4)
        return torch.cat([rates * self.units, torch.zeros_like(states[..., 4:])], dim=-1)
