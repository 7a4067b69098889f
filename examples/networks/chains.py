"""Pendulum chains: Hamiltonians in Cartesian coordinates with explicit constraints, and in angles.

States are (B, n, 2 d) = (q, p) of n bobs, of which the first hangs from the origin and each other from the one before;
up is the last axis. Constraints are Φ = (φ, dφ/dt) with φ_i = (|q_i - q_{i-1}|² - l_i²) / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.layers import perceptron

__all__ = [
    "AngularField",
    "AngularHamiltonian",
    "ConstrainedHamiltonian",
    "FreeField",
    "HeightPotential",
    "InAngles",
    "PlacePotential",
    "Rods",
]


class Rods(nn.Module):
    """The constraints of a chain, and the projection of rates of change onto what they allow.

    Args:
        lengths: l_i, of each rod.
    """

    lengths: Tensor

    def __init__(self, lengths: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("lengths", torch.tensor(lengths, dtype=torch.float64))

    @staticmethod
    def along(vectors: Tensor) -> Tensor:
        """Differences r_i = v_i - v_{i-1} along the chain, of the same shape (..., n, d)."""
        return torch.cat([vectors[..., :1, :], vectors[..., 1:, :] - vectors[..., :-1, :]], dim=-2)

    @staticmethod
    def along_transposed(vectors: Tensor) -> Tensor:
        """The transpose of :meth:`along`: v_i - v_{i+1}."""
        return torch.cat([vectors[..., :-1, :] - vectors[..., 1:, :], vectors[..., -1:, :]], dim=-2)

    def stretch(self, states: Tensor) -> Tensor:
        """φ, how far rods are from their lengths, (..., n)."""
        places = states.chunk(2, dim=-1)[0]
        return (self.along(places).square().sum(-1) - self.lengths.square()) / 2

    def values(self, states: Tensor, inverse: Tensor) -> Tensor:
        """Φ = (φ, dφ/dt), (..., 2 n).

        Args:
            states: (..., n, 2 d).
            inverse: 1 / m of each bob, (n, 1).
        """
        places, momenta = states.chunk(2, dim=-1)
        speed = (self.along(places) * self.along(inverse * momenta)).sum(-1)
        return torch.cat([self.stretch(states), speed], dim=-1)

    def project(self, states: Tensor, rates: Tensor, inverse: Tensor) -> Tensor:
        r"""The rates times P, so that no constraint changes, on and off the constraints (Eq. 7 of the paper).

        .. math:: P = I - J \, d\Phi^T (d\Phi \, J \, d\Phi^T)^{-1} d\Phi

        The matrix in brackets is ((0, A), (-A, S)) with A = dφ M⁻¹ dφᵀ, tridiagonal and positive, and S skew: two
        solutions with A are enough.

        Args:
            states: (B, n, 2 d).
            rates: Of the same shape.
            inverse: 1 / m of each bob, (n, 1).

        Returns:
            Of the same shape.
        """
        places, momenta = states.chunk(2, dim=-1)
        moved, pushed = rates.chunk(2, dim=-1)
        rods, speeds = self.along(places), self.along(inverse * momenta)

        def across(one: Tensor, other: Tensor) -> Tensor:
            """Σ_k w_k D_ik D_jk one_i · other_j, where D takes differences."""
            near = inverse[:, 0]
            middle = torch.diag_embed(near + torch.cat([torch.zeros_like(near[:1]), near[:-1]]))
            beside = torch.diag_embed(-near[:-1], 1)
            return (middle + beside + beside.mT) * (one @ other.mT)

        def dot(one: Tensor, other: Tensor) -> Tensor:
            return (one * other).sum(-1, keepdim=True)

        size = across(rods, rods)
        mixed = across(speeds, rods)
        first = dot(rods, self.along(moved))
        second = dot(speeds, self.along(moved)) + dot(rods, self.along(inverse * pushed))
        factor = torch.linalg.cholesky(size)
        mu = torch.cholesky_solve(first, factor)
        lam = torch.cholesky_solve((mixed - mixed.mT) @ mu - second, factor)
        step = inverse * self.along_transposed(rods * mu)
        pull = self.along_transposed(rods * lam + speeds * mu)
        return torch.cat([moved - step, pushed + pull], dim=-1)


class ConstrainedHamiltonian(nn.Module):
    """H = Σ p²/2m + V(q) with constraints: V and the masses are learned (Finzi, Wang & Wilson 2020, Sec. 4).

    The flow keeps H and every constraint, whatever V and the masses are. It depends on V along the constraints alone:
    a term of V that is zero wherever the rods have their lengths changes nothing.

    Args:
        potential: From places (B, n, d) to energies (B,).
        lengths: Of the rods, which are given.
        masses: Where the learned masses begin; 1 each by default.
    """

    def __init__(self, potential: nn.Module, lengths: Sequence[float], masses: Sequence[float] | None = None) -> None:
        super().__init__()
        self.potential = potential
        self.rods = Rods(lengths)
        start = torch.ones(len(lengths)) if masses is None else torch.tensor(masses, dtype=torch.float64)
        self.log_masses = nn.Parameter(start.log()[:, None])

    @property
    def inverse(self) -> Tensor:
        """1 / m of each bob, (n, 1)."""
        return (-self.log_masses).exp()

    def hamiltonian(self, states: Tensor) -> Tensor:
        """The energy H, (B,)."""
        places, momenta = states.chunk(2, dim=-1)
        return (self.inverse * momenta.square()).sum((-1, -2)) / 2 + self.potential(places)

    def constraints(self, states: Tensor) -> Tensor:
        """Φ = (φ, dφ/dt) by the learned masses, (B, 2 n)."""
        return self.rods.values(states, self.inverse)

    def forward(self, states: Tensor) -> Tensor:
        """The rates P J ∇H, of the shape of the states."""
        places, momenta = states.chunk(2, dim=-1)
        slope = torch.func.grad(lambda q: self.potential(q).sum())(places)
        return self.rods.project(states, torch.cat([self.inverse * momenta, -slope], dim=-1), self.inverse)


class PlacePotential(nn.Module):
    """V(q) by a perceptron of all coordinates: no symmetry.

    Args:
        bobs: n.
        dimension: d.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, bobs: int, dimension: int, hidden: int = 64) -> None:
        super().__init__()
        self.network = perceptron((bobs * dimension, hidden, hidden, 1))

    def forward(self, places: Tensor) -> Tensor:
        """Energies (B,) of places (B, n, d)."""
        return self.network(places.flatten(1))[:, 0]


class HeightPotential(nn.Module):
    """V of the heights alone: exactly invariant to level translations and to rotations about the vertical.

    Args:
        bobs: n.
        dimension: Not used: there is one height in any.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, bobs: int, dimension: int = 0, hidden: int = 64) -> None:
        super().__init__()
        self.network = perceptron((bobs, hidden, hidden, 1))

    def forward(self, places: Tensor) -> Tensor:
        """Energies (B,) of places (B, n, d)."""
        return self.network(places[..., -1])[:, 0]


class FreeField(nn.Module):
    """A neural ODE in Cartesian coordinates: rates by a perceptron, which know of no constraint and no energy.

    Args:
        bobs: n.
        dimension: d.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, bobs: int, dimension: int, hidden: int = 128) -> None:
        super().__init__()
        size = 2 * bobs * dimension
        self.network = perceptron((size, hidden, hidden, size))

    def forward(self, states: Tensor) -> Tensor:
        """The rates, of the shape of the states (B, n, 2 d)."""
        return self.network(states.flatten(1)).reshape(states.shape)


def _wrapped(angles: Tensor) -> Tensor:
    """Sines and cosines, (B, 2 n): the same after a full turn."""
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AngularHamiltonian(nn.Module):
    """H = pᵀ L(θ) L(θ)ᵀ p / 2 + V(θ) in angles: L, lower triangular with a positive diagonal, and V are learned.

    Args:
        bobs: n.
        hidden: Width of the two hidden layers of both networks.
    """

    def __init__(self, bobs: int, hidden: int = 64) -> None:
        super().__init__()
        self.potential = perceptron((2 * bobs, hidden, hidden, 1))
        self.factor = perceptron((2 * bobs, hidden, hidden, bobs * bobs))

    def lower(self, angles: Tensor) -> Tensor:
        """L, (B, n, n): its square L Lᵀ is the inverse of the mass matrix."""
        size = angles.shape[-1]
        square = self.factor(_wrapped(angles)).unflatten(-1, (size, size))
        diagonal = nn.functional.softplus(square.diagonal(dim1=-2, dim2=-1))
        return square.tril(-1) + torch.diag_embed(diagonal)

    def hamiltonian(self, state: Tensor) -> Tensor:
        """The energy (B,) of (θ, p_θ), (B, 2 n)."""
        angles, momenta = state.chunk(2, dim=-1)
        half = (momenta[..., None, :] @ self.lower(angles))[..., 0, :]
        return half.square().sum(-1) / 2 + self.potential(_wrapped(angles))[..., 0]

    def forward(self, state: Tensor) -> Tensor:
        """The rates (∂H/∂p, -∂H/∂θ), (B, 2 n)."""
        by_angle, by_momentum = torch.func.grad(lambda z: self.hamiltonian(z).sum())(state).chunk(2, dim=-1)
        return torch.cat([by_momentum, -by_angle], dim=-1)


class AngularField(nn.Module):
    """A neural ODE in angles: rates of (θ, p_θ) by a perceptron of sines, cosines and momenta.

    Args:
        bobs: n.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, bobs: int, hidden: int = 128) -> None:
        super().__init__()
        self.network = perceptron((3 * bobs, hidden, hidden, 2 * bobs))

    def forward(self, state: Tensor) -> Tensor:
        """The rates, (B, 2 n)."""
        angles, momenta = state.chunk(2, dim=-1)
        return self.network(torch.cat([_wrapped(angles), momenta], dim=-1))


class InAngles(nn.Module):
    """Dynamics in angles, seen in Cartesian coordinates of the plane: they keep the rods by construction.

    θ_i is the angle of a rod from straight down, p_θi its canonical momentum. The way back to Cartesian momenta takes
    the true masses: it is how data are written, not a part of the model.

    Args:
        inner: From (θ, p_θ), (B, 2 n), to their rates; with ``hamiltonian`` or without.
        lengths: Of the rods.
        masses: Of the bobs.
    """

    masses: Tensor

    def __init__(self, inner: nn.Module, lengths: Sequence[float], masses: Sequence[float]) -> None:
        super().__init__()
        self.inner = inner
        self.rods = Rods(lengths)
        self.register_buffer("masses", torch.tensor(masses, dtype=torch.float64))

    def enter(self, states: Tensor) -> Tensor:
        """(θ, p_θ), (..., 2 n), of states (..., n, 4)."""
        places, momenta = states.chunk(2, dim=-1)
        rods = Rods.along(places)
        angles = torch.atan2(rods[..., 0], -rods[..., 1])
        below = momenta.flip(-2).cumsum(-2).flip(-2)  # of all bobs that hang from a rod
        return torch.cat([angles, self.rods.lengths * (self._level(angles) * below).sum(-1)], dim=-1)

    def leave(self, state: Tensor) -> Tensor:
        """States (..., n, 4) of (θ, p_θ), (..., 2 n)."""
        angles, momenta = state.chunk(2, dim=-1)
        lengths, below = self.rods.lengths, self.masses.flip(0).cumsum(0).flip(0)
        index = torch.arange(len(lengths), device=state.device)
        heavy = below[torch.maximum(index[:, None], index)]
        mass = heavy * lengths[:, None] * lengths * (angles[..., :, None] - angles[..., None, :]).cos()
        # Forward mode over forward mode is wrong for torch.linalg.solve (torch 2.14), and right for Cholesky's factor.
        speeds = torch.cholesky_solve(momenta[..., None], torch.linalg.cholesky(mass))
        rods = lengths[:, None] * torch.stack([angles.sin(), -angles.cos()], dim=-1)
        velocities = (lengths[:, None] * speeds * self._level(angles)).cumsum(-2)
        return torch.cat([rods.cumsum(-2), self.masses[:, None] * velocities], dim=-1)

    def hamiltonian(self, states: Tensor) -> Tensor:
        """The inner energy (B,) of states (B, n, 4)."""
        return self.inner.hamiltonian(self.enter(states))

    def forward(self, states: Tensor) -> Tensor:
        """The rates, of the shape of the states."""
        state = self.enter(states)
        return torch.func.jvp(self.leave, (state,), (self.inner(state),))[1]

    @staticmethod
    def _level(angles: Tensor) -> Tensor:
        """The direction in which a rod's end moves when its angle grows."""
        return torch.stack([angles.cos(), angles.sin()], dim=-1)
