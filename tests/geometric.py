"""Models of point clouds, graphs, molecules and dynamics, one a row: seeded, float64, with what they take and return.

Each is a model that is not equivariant under something that it is measured by, so that a derivative which is lost
changes a number that is not zero.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lie_metric.representations import Covectors, Invariant, Packed, Points, Vectors, Velocities

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """One model.

    Attributes:
        name: What it is.
        build: Makes the model.
        inputs: Makes what it takes.
        moves: How the inputs move.
        gives: How the outputs do.
        generators: By what it is measured.
        wanted: "right", or words of the message by which it has to be refused.
        with_gradients: The same where gradients are enabled, if it is something else.
        needs: A library that is imported, or the row is skipped.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], Any]
    moves: Any = field(default_factory=lambda: Points(3))
    gives: Any = field(default_factory=Invariant)
    generators: tuple[str, ...] = ("rotation_z", "scale", "translation_x")
    wanted: str = "right"
    with_gradients: str | None = None
    needs: str | None = None


ROWS: dict[str, Row] = {}


def row(name, inputs, moves=None, gives=None, **options):
    """Enters a model that the decorated function or class builds."""

    def enter(build):
        assert name not in ROWS, name
        ROWS[name] = Row(name, build, inputs, moves or Points(3), gives or Invariant(), **options)
        return build

    return enter


def random(*shape, seed=0):
    """Fixed numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cloud(size=5, count=2):
    """Points (B, N, 3), none of them at another."""
    return random(count, size, 3, seed=3)


def mlp(*widths, activation=nn.SiLU, last=1):
    """A perceptron."""
    layers = []
    for first, second in zip(widths, (*widths[1:], last), strict=True):
        layers += [nn.Linear(first, second), activation()]
    return nn.Sequential(*layers[:-1])


def apart(pos):
    """Differences of all pairs but those of a point with itself, (B, N, N - 1, 3)."""
    size = pos.shape[-2]
    others = torch.tensor([[j for j in range(size) if j != i] for i in range(size)])
    return pos[..., :, None, :] - pos[..., others, :]


# What makes a potential of positions no invariant of rotations, of scale or of translations.
FIELD = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)


class Potential(nn.Module):
    """An energy of pairwise distances in a field, (B, N, 3) to (B,)."""

    def __init__(self, activation=nn.SiLU, norm=None, width=8):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.activation, self.norm = activation(), norm() if norm else None

    def forward(self, pos):
        far = apart(pos).square().sum(-1, keepdim=True).sqrt()
        h = self.activation(self.first(far))
        if self.norm is not None:
            h = self.norm(h.flatten(0, -2)).reshape(h.shape)
        pairs = self.last(self.activation(self.second(h))).sum((-3, -2, -1))
        return pairs + (pos @ FIELD.to(pos)).sin().sum(-1)


class Forces(nn.Module):
    """Energy and forces as machine-learned potentials have them: the gradient is taken inside."""

    def __init__(self, energy=None, how="in place", graph="training"):
        super().__init__()
        self.energy, self.how, self.graph = energy or Potential(), how, graph

    def forward(self, pos):
        if self.how == "detached":
            pos = pos.detach().requires_grad_()
        elif self.how == "cloned":
            pos = pos.clone().requires_grad_(True)
        elif self.how == "attribute":
            pos.requires_grad = True
        else:
            pos.requires_grad_()
        energy = self.energy(pos)
        graph = {"training": self.training, "always": True, "never": False}[self.graph]
        if self.how == "backward":
            pos.retain_grad()
            energy.sum().backward(create_graph=graph)
            return {"energy": energy, "forces": -pos.grad}
        (gradient,) = torch.autograd.grad([energy.sum()], [pos], create_graph=graph, retain_graph=graph)
        return {"energy": energy, "forces": -gradient}


class Enabled(nn.Module):
    """Forces that are asked for with gradients enabled, as in a validation loop."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, pos):
        with torch.enable_grad():
            return self.of(pos)


FORCES = {"energy": Invariant(), "forces": Vectors(3)}
forces = functools.partial(row, inputs=cloud, gives=FORCES)

# ---- Gradients inside ------------------------------------------------------------------------------------------------

for _name, _activation in {
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
}.items():
    forces(f"forces: {_name}")(lambda activation=_activation: Forces(Potential(activation)))

forces("forces: layer_norm")(lambda: Forces(Potential(norm=lambda: nn.LayerNorm(8))))
forces("forces: group_norm")(lambda: Forces(Potential(norm=lambda: nn.GroupNorm(2, 8))))
forces("forces: rms_norm")(lambda: Forces(Potential(norm=lambda: nn.RMSNorm(8))))
forces("forces: batch_norm")(lambda: Forces(Potential(norm=lambda: nn.BatchNorm1d(8))))
forces("forces: cloned positions")(lambda: Forces(how="cloned"))
forces("forces: requires_grad set as an attribute")(lambda: Forces(how="attribute"))
forces("forces: create_graph=True")(lambda: Forces(graph="always"))
forces("forces: create_graph=False")(lambda: Forces(graph="never"))
forces("forces: gradients enabled inside")(lambda: Enabled(Forces()))
forces("forces: detached positions", with_gradients="measure under `torch.no_grad\\(\\)`.*'difference'")(
    lambda: Forces(how="detached")
)
forces("forces: backward()", with_gradients="'difference'")(lambda: Forces(how="backward"))


@forces("forces: torch.func.grad")
class FunctionalForces(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = Potential()

    def forward(self, pos):
        gradient = torch.func.grad(lambda p: self.energy(p).sum())(pos)
        return {"energy": self.energy(pos), "forces": -gradient}


@forces("forces: vmap of grad_and_value")
class MappedForces(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = Potential(nn.Tanh)

    def forward(self, pos):
        gradient, energy = torch.func.vmap(torch.func.grad_and_value(self.energy))(pos)
        return {"energy": energy, "forces": -gradient}


@row("stress: by a displacement", cloud, gives={"forces": Vectors(3), "virial": Invariant()})
class Stress(nn.Module):
    """The gradient by a strain that is zero."""

    def __init__(self):
        super().__init__()
        self.energy = Potential()

    def forward(self, pos):
        pos.requires_grad_(True)
        strain = torch.zeros(len(pos), 3, 3, dtype=pos.dtype)
        strain.requires_grad_(True)
        symmetric = 0.5 * (strain + strain.mT)
        energy = self.energy(pos + torch.bmm(pos, symmetric))
        found = torch.autograd.grad(energy.sum(), [pos, strain], create_graph=self.training)
        return {"forces": -found[0], "virial": found[1]}


@row("forces: cdist inside", cloud, gives=FORCES)
def _():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(1, 8)

        def forward(self, pos):
            far = torch.cdist(pos, pos.flip(-1) + 0.1)
            return self.net(far[..., None]).sum((1, 2, 3))

    return Forces(Distances())


@row("forces: cdist of points with themselves", cloud, gives=FORCES)
def _():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(1, 8)

        def forward(self, pos):
            far = torch.cdist(pos, pos)
            return self.net(torch.exp(-far[..., None])).sum((1, 2, 3)) + pos.sin().sum((1, 2))

    return Forces(Distances())


@forces("forces: a scripted potential", with_gradients="'difference'")
def _():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(3, 8)

        def forward(self, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pos.requires_grad_()
            energy = self.net(pos.sin()).sum((1, 2)) + pos.square().sum((1, 2)).sqrt()
            gradient = torch.autograd.grad([energy.sum()], [pos], create_graph=self.training)[0]
            assert gradient is not None
            return energy, -gradient

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.script(Scripted())

        def forward(self, pos):
            return dict(zip(("energy", "forces"), self.inner(pos), strict=True))

    return Network()


@forces("forces: equilibrated charges, Ewald sums")
def _():
    waves = 2 * random(6, 3, seed=8)

    class Energy(nn.Module):
        """Charges that solve a linear system, screened pairs, and waves of complex numbers."""

        def __init__(self):
            super().__init__()
            self.hardness = nn.Parameter(torch.ones(5) * 3)

        def forward(self, pos):
            far = apart(pos).norm(dim=-1)
            coulomb = torch.diag_embed(self.hardness.expand(len(pos), 5))
            others = ~torch.eye(5, dtype=torch.bool)
            coulomb = coulomb.masked_scatter(others, (torch.erf(far) / far).to(coulomb))
            charges = torch.linalg.solve(coulomb, (pos @ FIELD.to(pos)).sin())
            short = (torch.erfc(far) / far).sum(-1)
            structure = (torch.exp(1j * (pos @ waves.mT.to(pos))) * charges[..., None]).sum(1)
            return (charges * short).sum(-1) + structure.abs().square().sum(-1) + (1 / far).pow(6).sum((1, 2)) * 0.01

    return Forces(Energy())


@row("forces: and a Hessian by batched gradients", cloud, gives={"forces": Vectors(3), "traces": Invariant()})
class Hessian(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = Potential(nn.Tanh, width=4)

    def forward(self, pos):
        pos = pos.requires_grad_()
        (force,) = torch.autograd.grad(-self.energy(pos).sum(), pos, create_graph=True)
        flat = force.flatten(1)
        unit = torch.eye(flat.shape[1], dtype=pos.dtype)[:, None].expand(-1, len(pos), -1)
        (rows,) = torch.autograd.grad(flat, pos, unit, is_grads_batched=True)
        return {"forces": force, "traces": rows.flatten(2).diagonal(dim1=0, dim2=2).sum(-1)}


@forces("forces: a frame of eigenvectors", generators=("rotation_z", "stretch_x"))
def _():
    def energy(pos):
        centred = pos - pos.mean(1, keepdim=True)
        values, frame = torch.linalg.eigh(centred.mT @ centred)
        return (centred @ frame).pow(4).sin().sum((1, 2)) + values.log().sum(-1)

    return Forces(energy)


@forces("forces: by a function of its own, unused inputs allowed")
class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = Potential()

    def forward(self, pos):
        pos.requires_grad_(True)
        energy = self.energy(pos)
        found = torch.autograd.grad([energy], [pos], [torch.ones_like(energy)], retain_graph=self.training,
                                    create_graph=self.training, allow_unused=True)[0]  # fmt: skip
        return {"energy": energy, "forces": torch.zeros_like(pos) if found is None else -found}


# ---- Dynamics --------------------------------------------------------------------------------------------------------

PHASE = {"q": Points(3), "p": Covectors(3)}
FLOW = {"q": Vectors(3), "p": Covectors(3)}


def phase():
    return {"q": random(2, 4, 3, seed=1), "p": random(2, 4, 3, seed=2)}


class Hamiltonian(nn.Module):
    """H(q, p) = Σ p²/2m + V(q), with one sample at a time or several."""

    def __init__(self):
        super().__init__()
        self.potential = Potential(nn.Tanh)
        self.mass = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 1.5]))

    def forward(self, q, p):
        return (p.square().sum(-1) / (2 * self.mass)).sum(-1) + self.potential(q) + 0.1 * (q * p).sum((-2, -1))


@row("hamiltonian: torch.func.grad of both", phase, PHASE, FLOW, generators=("rotation_z", "scale"))
class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = Hamiltonian()

    def forward(self, state):
        dq, dp = torch.func.grad(lambda q, p: self.energy(q, p).sum(), argnums=(0, 1))(state["q"], state["p"])
        return {"q": dp, "p": -dq}


@row("hamiltonian: vmap of grad", phase, PHASE, FLOW, generators=("rotation_z", "scale"))
class MappedField(Field):
    def forward(self, state):
        dq, dp = torch.func.vmap(torch.func.grad(self.energy, argnums=(0, 1)))(state["q"], state["p"])
        return {"q": dp, "p": -dq}


@row("hamiltonian: autograd.grad", phase, PHASE, FLOW, generators=("rotation_z", "scale"))
class InnerField(Field):
    def forward(self, state):
        with torch.enable_grad():
            q, p = state["q"].requires_grad_(), state["p"].requires_grad_()
            dq, dp = torch.autograd.grad(self.energy(q, p).sum(), (q, p), create_graph=self.training)
        return {"q": dp, "p": -dq}


@row(
    "hamiltonian: jacobian of torch.autograd.functional",
    phase,
    PHASE,
    FLOW,
    generators=("rotation_z", "scale"),
    with_gradients="measure under `torch.no_grad\\(\\)`.*'difference'",
)
class FunctionalField(Field):
    def forward(self, state):
        dq, dp = torch.autograd.functional.jacobian(lambda q, p: self.energy(q, p).sum(), (state["q"], state["p"]))
        return {"q": dp, "p": -dq}


@row("hamiltonian: leapfrog steps", phase, PHASE, PHASE, generators=("rotation_z", "scale"))
class Leapfrog(Field):
    def forward(self, state):
        q, p = state["q"], state["p"]
        force = torch.func.grad(lambda q: -self.energy.potential(q).sum())
        for _ in range(3):
            p = p + 0.05 * force(q)
            q = q + 0.1 * p / self.energy.mass[:, None]
            p = p + 0.05 * force(q)
        return {"q": q, "p": p}


@row(
    "lagrangian: hessian and solve",
    lambda: {"q": random(2, 3, seed=1), "v": random(2, 3, seed=2)},
    {"q": Points(3), "v": Velocities(3)},
    Vectors(3),
    generators=("rotation_z", "scale", "boost_x"),
)
class Lagrangian(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(6, 8, activation=nn.Softplus)

    def energy(self, q, v):
        return (v.square().sum() + 0.1 * self.net(torch.cat([q, v])).sum()) * (1 + 0.1 * q.sin().sum())

    def acceleration(self, q, v):
        mass = torch.func.hessian(self.energy, 1)(q, v)
        mixed = torch.func.jacrev(torch.func.grad(self.energy, 1), 0)(q, v)
        return torch.linalg.solve(mass, torch.func.grad(self.energy, 0)(q, v) - mixed @ v)

    def forward(self, state):
        return torch.vmap(self.acceleration)(state["q"], state["v"])


@row("neural ODE: Runge-Kutta with a divergence", cloud, gives={"pos": Points(3), "log_density": Invariant()})
class Flow(nn.Module):
    """The trace of the Jacobian by a gradient for each coordinate, as continuous flows have it."""

    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, activation=nn.Tanh, last=3)

    def slope(self, pos):
        with torch.enable_grad():
            pos = pos.requires_grad_(True)
            speed = self.net(pos)
            trace = 0
            for axis in range(3):
                trace = trace + torch.autograd.grad(speed[..., axis].sum(), pos, create_graph=True)[0][..., axis]
        return speed, trace.sum(-1)

    def forward(self, pos):
        density = 0
        for _ in range(2):
            first, _ = self.slope(pos)
            second, trace = self.slope(pos + 0.05 * first)
            pos, density = pos + 0.1 * second, density - 0.1 * trace
        return {"pos": pos, "log_density": density}


@row("dynamics: recurrent over time", lambda: random(2, 6, 3), Points(3), Points(3))
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return x + self.head(self.cell(x)[0])


# ---- Distances and what they are undefined at ------------------------------------------------------------------------


@row("distances: cdist", cloud)
class Cdist(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.net, self.options = mlp(1, 8), options

    def forward(self, pos):
        return self.net(torch.cdist(pos, pos.flip(-1) + 0.1, **self.options)[..., None]).sum((1, 2, 3))


row("distances: cdist, p=1", cloud)(lambda: Cdist(p=1.0))
row("distances: cdist, p=3", cloud)(lambda: Cdist(p=3.0))
row("distances: cdist, largest", cloud)(lambda: Cdist(p=float("inf")))
row("distances: cdist by matrix product", cloud)(lambda: Cdist(compute_mode="use_mm_for_euclid_dist"))
row("distances: pdist", lambda: random(5, 3), gives=Invariant(), generators=("rotation_z", "scale"))(
    lambda: lambda pos: torch.pdist(pos * torch.arange(1, 4)).exp().sum()[None].expand(5) + pos.sin().sum(-1)
)
row("distances: cdist with themselves, beyond a kernel", cloud)(
    lambda: lambda pos: torch.exp(-torch.cdist(pos, pos).square()).sum((1, 2)) + pos.sin().sum((1, 2))
)
row("distances: pairwise_distance, cosine_similarity", cloud)(
    lambda: (
        lambda pos: (
            F.pairwise_distance(pos[:, 0], pos[:, 1])
            + F.cosine_similarity(pos[:, 2], pos[:, 3])
            + pos.sin().sum((1, 2))
        )
    )
)


def _norms(kind):
    def run(pos):
        differences = pos[:, :, None] - pos[:, None]
        if kind == "norm":
            far = differences.norm(dim=-1)
        elif kind == "sqrt":
            far = differences.square().sum(-1).sqrt()
        elif kind == "vector_norm":
            far = torch.linalg.vector_norm(differences, dim=-1)
        else:
            far = differences.square().sum(-1).pow(0.5)
        return far.exp().mean((1, 2)) + pos.sin().sum((1, 2))

    return run


row("at zero: sqrt of squares, self pairs", cloud, wanted="`sqrt`.*no self pairs.*add a small number.*'difference'")(
    lambda: _norms("sqrt")
)
row("at zero: power of squares, self pairs", cloud, wanted="`pow`.*no self pairs.*add a small number.*'difference'")(
    lambda: _norms("power")
)
row("at zero: norm, self pairs", cloud)(lambda: _norms("norm"))
row("at zero: vector_norm, self pairs", cloud)(lambda: _norms("vector_norm"))


@row(
    "at zero: padded atoms",
    lambda: torch.cat([cloud(), torch.zeros(2, 2, 3).double()], 1),
    wanted="`sqrt`.*no self pairs.*add a small number.*'difference'",
)
class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(1, 8)

    def forward(self, pos):
        there = pos.any(-1)
        far = pos.square().sum(-1).sqrt()
        return (self.net(far[..., None])[..., 0] * there).sum(-1) + pos.sin().sum((1, 2))


@row("at zero: forces of norms, self pairs", cloud, gives=FORCES)
def _():
    return Forces(_norms("norm"))


# ---- Graphs and sums over edges --------------------------------------------------------------------------------------


def edges(size=5):
    return torch.tensor([[i, j] for i in range(size) for j in range(size) if i != j]).mT


def _summed(how):
    def run(self, pos):
        i, j = edges(pos.shape[1])
        messages = self.net(pos[:, i] - 0.5 * pos[:, j])
        held = torch.zeros(*pos.shape[:2], messages.shape[-1], dtype=pos.dtype)
        index = i[None, :, None].expand_as(messages)
        if how == "index_add_":
            held.index_add_(1, i, messages)
        elif how == "scatter_add_":
            held.scatter_add_(1, index, messages)
        elif how == "scatter_add":
            held = held.scatter_add(1, index, messages)
        elif how == "scatter_reduce_":
            held.scatter_reduce_(1, index, messages, "amax", include_self=False)
        elif how == "scatter_reduce, mean":
            held = held.scatter_reduce(1, index, messages, "mean", include_self=False)
        elif how == "scatter_reduce, prod":
            held = held.scatter_reduce(1, index, messages, "prod", include_self=False)
        elif how == "assignment":
            for node in range(pos.shape[1]):
                held[:, node] = messages[:, i == node].sum(1)
        elif how == "assignment of numbers":
            held = torch.zeros(*pos.shape[:2], 4, dtype=pos.dtype)
            held[:, i] += messages
        elif how == "index_put_":
            held = held.mT.mT.clone()
            held.index_put_((torch.arange(len(pos))[:, None], i[None]), messages, accumulate=True)
        elif how == "masked assignment":
            near = (pos[:, :, 0] > 0)[..., None].expand_as(held)
            held[near] = messages[:, : pos.shape[1]][near]
        elif how == "out":
            torch.sum(messages.unflatten(1, (pos.shape[1], -1)), 2, out=held)
        elif how == "empty":
            held = torch.empty(*pos.shape[:2], 4, dtype=pos.dtype)
            for node in range(pos.shape[1]):
                held[:, node] = messages[:, i == node].sum(1)
        elif how == "list":
            held = torch.stack([torch.stack([m[i == node].sum(0) for node in range(5)]) for m in messages])
        return held.square().sum((1, 2)) + pos.sin().sum((1, 2))

    return run


class Summing(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.net, self.run = mlp(3, 8, last=4), run

    def forward(self, pos):
        return self.run(self, pos)


for _how in (
    "index_add_", "scatter_add_", "scatter_add", "scatter_reduce_", "scatter_reduce, mean", "scatter_reduce, prod",
    "assignment", "assignment of numbers", "index_put_", "masked assignment", "empty", "list",
):  # fmt: skip
    row(f"edges: {_how}", cloud)(lambda how=_how: Summing(_summed(how)))


def _sparse(kind):
    size = 5
    i, j = edges(size)
    weights = random(len(i), seed=5)
    matrix = torch.sparse_coo_tensor(torch.stack([i, j]), weights, (size, size)).coalesce()

    def run(self, pos):
        features = self.net(pos)
        if kind == "sparse.mm":
            mixed = torch.stack([torch.sparse.mm(matrix, one) for one in features])
        elif kind == "csr":
            mixed = torch.stack([matrix.to_sparse_csr() @ one for one in features])
        elif kind == "moving weights":
            found = []
            for one, point in zip(features, pos, strict=True):
                far = (point[i] - point[j]).square().sum(-1)
                found.append(torch.sparse.mm(torch.sparse_coo_tensor(torch.stack([i, j]), far, (size, size)), one))
            mixed = torch.stack(found)
        elif kind == "to_dense":
            found = []
            for one, point in zip(features, pos, strict=True):
                far = (point[i] - point[j]).square().sum(-1)
                found.append(torch.sparse_coo_tensor(torch.stack([i, j]), far, (size, size)).to_dense() @ one)
            mixed = torch.stack(found)
        elif kind == "sparse.sum":
            mixed = torch.stack([torch.sparse.mm(matrix, one) for one in features]) * weights.sum()
        else:
            lengths = torch.tensor([2, 3])
            mixed = torch.stack([torch.segment_reduce(one, kind, lengths=lengths, axis=0) for one in features])
        return mixed.square().sum((1, 2)) + pos.sin().sum((1, 2))

    return run


for _kind in ("sparse.mm", "csr", "moving weights", "to_dense"):
    row(f"sparse: {_kind}", cloud)(lambda kind=_kind: Summing(_sparse(kind)))
for _kind in ("sum", "mean", "max"):
    row(f"segment_reduce: {_kind}", cloud)(lambda kind=_kind: Summing(_sparse(kind)))


@row("graph: E(n) equivariant network", lambda: (cloud(), random(2, 5, 3, seed=4)),
     {"0": Points(3), "1": Vectors(3)}, {"0": Points(3), "1": Vectors(3)})  # fmt: skip
class EGNN(nn.Module):
    def __init__(self, width=8, layers=2, field=0.01):
        super().__init__()
        self.field = field
        self.edge = nn.ModuleList(mlp(2 * width + 1, width, last=width) for _ in range(layers))
        self.coordinate = nn.ModuleList(mlp(width, width) for _ in range(layers))
        self.node = nn.ModuleList(mlp(2 * width, width, last=width) for _ in range(layers))
        self.start = nn.Linear(1, width)
        self.width = width

    def forward(self, pos, velocity):
        i, j = edges(pos.shape[1])
        h = self.start(velocity.square().sum(-1, keepdim=True))
        for edge, coordinate, node in zip(self.edge, self.coordinate, self.node, strict=True):
            differences = pos[:, i] - pos[:, j]
            m = F.silu(edge(torch.cat([h[:, i], h[:, j], differences.square().sum(-1, keepdim=True)], -1)))
            step = torch.zeros_like(pos).index_add_(1, i, differences * coordinate(m))
            pos = pos + step
            velocity = velocity * 0.9 + step + self.field * FIELD.to(pos)
            summed = m.new_zeros(*pos.shape[:2], self.width).index_add_(1, i, m)
            h = h + node(torch.cat([h, summed], -1))
        return pos, velocity


@row("graph: edges by a cutoff", cloud)
class Cutoff(nn.Module):
    """The smooth envelope of a radius, edges found by ``nonzero``."""

    def __init__(self):
        super().__init__()
        self.net = mlp(4, 8)

    def forward(self, pos):
        found = []
        for one in pos:
            far = (one[:, None] - one).square().sum(-1)
            i, j = ((far < 4.0) & ~torch.eye(len(one), dtype=torch.bool)).nonzero(as_tuple=True)
            r = (one[i] - one[j]).norm(dim=-1, keepdim=True)
            basis = torch.sin(torch.arange(1, 5) * torch.pi * r / 2) / r
            envelope = 0.5 * (torch.cos(torch.pi * r / 2) + 1)
            found.append((self.net(basis) * envelope).sum() + one.sin().sum())
        return torch.stack(found)


@row("graph: nearest neighbours by topk (DGCNN)", cloud)
class EdgeConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
        self.head = nn.Linear(8, 1)

    def forward(self, pos):
        x = pos.mT
        inner = -2 * x.mT @ x
        square = x.square().sum(1, keepdim=True)
        index = (-square - inner - square.mT).topk(3, dim=-1).indices
        near = torch.gather(pos[:, None].expand(-1, pos.shape[1], -1, -1), 2, index[..., None].expand(-1, -1, -1, 3))
        both = torch.cat([near - pos[:, :, None], pos[:, :, None].expand_as(near)], -1).permute(0, 3, 1, 2)
        return self.head(self.net(both).max(-1)[0].max(-1)[0])


@row("points: PointNet with an input transform", cloud)
class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.align, self.lift, self.head = mlp(3, 8, last=8), mlp(3, 8, last=16), nn.Linear(16, 2)
        self.to_matrix = nn.Linear(8, 9)

    def forward(self, pos):
        matrix = self.to_matrix(self.align(pos).max(1).values).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.lift(torch.bmm(pos, matrix)).amax(1))


@row("points: canonical frame by eigenvectors", cloud, generators=("rotation_z", "stretch_x"))
def _():
    def run(pos):
        centred = pos - pos.mean(1, keepdim=True)
        values, frame = torch.linalg.eigh(centred.mT @ centred)
        sign = torch.sign((centred @ frame).pow(3).sum(1, keepdim=True))
        return (centred @ frame * sign).sin().sum((1, 2))[:, None] + values

    return run


@row("points: Kabsch by singular values", cloud, gives=Vectors(3), generators=("rotation_z", "stretch_x"))
def _():
    target = random(5, 3, seed=9)

    def run(pos):
        u, _, v = torch.linalg.svd(pos.mT @ target)
        mirror = torch.diag_embed(torch.stack([torch.ones(len(pos)), torch.ones(len(pos)), torch.det(u @ v)], -1))
        return target @ (u @ mirror.to(u) @ v).mT

    return run


@row("points: attention with a bias of distances", cloud, gives=Vectors(3))
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.head = (
            nn.Linear(3, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, pos):
        bias = -(pos[:, :, None] - pos[:, None]).square().sum(-1).repeat_interleave(2, 0)
        h = self.embed(pos)
        return self.head(self.attend(h, h, h, attn_mask=bias)[0])


@row("points: a transformer encoder", cloud, gives=Vectors(3))
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.embed, self.body, self.head = nn.Linear(3, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, pos):
        padding = torch.tensor([[False] * 5, [False] * 4 + [True]])
        return self.head(self.body(self.embed(pos), src_key_padding_mask=padding))


@row("molecule: angles and torsions", cloud)
def _():
    def run(pos):
        b = pos[:, 1:] - pos[:, :-1]
        n = torch.linalg.cross(b[:, :-1], b[:, 1:])
        y = (torch.linalg.cross(n[:, :-1], n[:, 1:]) * F.normalize(b[:, 1:-1], dim=-1)).sum(-1)
        torsion = torch.atan2(y, (n[:, :-1] * n[:, 1:]).sum(-1))
        bend = torch.acos(F.cosine_similarity(b[:, :-1], b[:, 1:], dim=-1))
        return torsion.cos().sum(1) + bend.square().sum(1) + pos.sin().sum((1, 2))

    return run


@row(
    "molecule: a periodic cell",
    lambda: (cloud(), torch.eye(3).double() * 3 + 0.1 * random(2, 3, 3, seed=6)),
    {"0": Points(3), "1": Vectors(3)},
)
def _():
    def run(pos, cell):
        parts = apart(pos).flatten(1, 2) @ torch.linalg.inv(cell)
        nearest = (parts - parts.round()) @ cell
        return torch.exp(-nearest.square().sum(-1)).sum(1) + nearest.sin().sum((1, 2))

    return run


@row("molecule: a masked scatter of per-kind energies", cloud)
class PerKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(3, 8, activation=nn.CELU) for _ in range(2))

    def forward(self, pos):
        kinds = torch.tensor([0, 1, 1, 0, 1]).expand(pos.shape[:2]).flatten()
        flat = pos.flatten(0, 1)
        energies = flat.new_zeros(len(flat))
        for kind, net in enumerate(self.nets):
            index = (kinds == kind).nonzero().flatten()
            energies.masked_scatter_(kinds == kind, net(flat.index_select(0, index)).flatten())
        return energies.view_as(kinds.view(pos.shape[:2])).sum(1)


@row("forces: per-kind energies written in place", cloud, gives=FORCES)
def _():
    return Forces(PerKind())


# ---- Draws -----------------------------------------------------------------------------------------------------------


@row("draws: farthest points from a random start", cloud)
def _():
    def run(pos):
        rows = torch.arange(len(pos))
        index = torch.randint(0, pos.shape[1], (len(pos),))
        distance, chosen = pos.new_full(pos.shape[:2], 1e10), []
        for _ in range(3):
            chosen.append(pos[rows, index])
            distance = torch.minimum(distance, (pos - chosen[-1][:, None]).square().sum(-1))
            index = distance.max(-1)[1]
        return torch.stack(chosen, 1).sin().sum(1)

    return run


@row("draws: a random subset and noise", cloud, gives=Vectors(3))
def _():
    def run(pos):
        kept = pos[:, torch.randperm(pos.shape[1])[:3]]
        return (kept + 0.1 * torch.randn_like(kept)).sin()

    return run


@row("draws: a sampled latent, reparametrised", cloud)
class Sampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, last=4)

    def forward(self, pos):
        mean, spread = self.net(pos).mean(1).chunk(2, -1)
        return torch.distributions.Normal(mean, spread.exp()).rsample() + mean


@row("draws: dropout that stays active", cloud)
class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8)

    def forward(self, pos):
        return self.net(F.dropout(pos, 0.3, training=True)).sum((1, 2))


@row("draws: forces of a network with dropout", cloud, gives=FORCES)
def _():
    net = mlp(3, 8, last=1)

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pos):
            return self.net(F.dropout(pos, 0.3, training=True)).sum((1, 2))

    return Forces(Energy())


# ---- Packed graphs and libraries -------------------------------------------------------------------------------------

PACKED = {"pos": Packed(Points(3), "batch")}
PACKED_FORCES = {"energy": Invariant(), "forces": Packed(Vectors(3), "batch")}


def packed():
    batch = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    i, j = ((batch[:, None] == batch) & ~torch.eye(7, dtype=torch.bool)).nonzero(as_tuple=True)
    return {
        "pos": random(7, 3, seed=7),
        "z": torch.tensor([6, 1, 8, 6, 1, 1, 7]),
        "batch": batch,
        "edge_index": torch.stack([i, j]),
    }


@row("packed: sums of messages", packed, PACKED, PACKED_FORCES)
class PackedGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.kinds, self.net = nn.Embedding(10, 3), mlp(9, 8)

    def forward(self, graphs):
        pos, (i, j) = graphs["pos"], graphs["edge_index"]
        kinds = self.kinds(graphs["z"])
        differences = pos[i] - pos[j]
        weights = self.net(torch.cat([kinds[i], kinds[j], differences], 1))
        energy = pos.new_zeros(2, 1)
        energy.index_add_(0, graphs["batch"][i], weights)
        return {"energy": energy, "forces": torch.zeros_like(pos).index_add(0, i, differences * weights)}


@row("packed: forces by autograd.grad", packed, PACKED, PACKED_FORCES)
class PackedForces(nn.Module):
    def __init__(self):
        super().__init__()
        self.of = PackedGraphs()

    def forward(self, graphs):
        graphs["pos"].requires_grad_(True)
        energy = self.of(graphs)["energy"] + graphs["pos"].new_zeros(2, 1).index_add_(
            0, graphs["batch"], (graphs["pos"] @ FIELD.to(graphs["pos"])).sin()[:, None]
        )
        grad = torch.autograd.grad([energy], [graphs["pos"]], [torch.ones_like(energy)], create_graph=self.training)
        return {"energy": energy, "forces": -grad[0]}


def pyg_batch():
    from torch_geometric.data import Batch, Data

    held = packed()
    graphs = []
    for graph in range(2):
        mine = held["batch"] == graph
        local = held["edge_index"][:, mine[held["edge_index"][0]]]
        graphs.append(Data(pos=held["pos"][mine], z=held["z"][mine], edge_index=local - local.min()))
    return Batch.from_data_list(graphs)


@row("torch_geometric: MessagePassing on a Batch", pyg_batch, PACKED, PACKED_FORCES, needs="torch_geometric")
def _():
    from torch_geometric.nn import MessagePassing, global_add_pool

    class Layer(MessagePassing):
        def __init__(self):
            super().__init__(aggr="add")
            self.net = mlp(9, 8)

        def forward(self, h, pos, index):
            return self.propagate(index, h=h, pos=pos)

        def message(self, h_i, h_j, pos_i, pos_j):
            differences = pos_j - pos_i
            return differences * self.net(torch.cat([h_i, h_j, differences], 1))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds, self.layer = nn.Embedding(10, 3), Layer()

        def forward(self, batch):
            moved = self.layer(self.kinds(batch.z), batch.pos, batch.edge_index)
            return {"energy": global_add_pool(moved, batch.batch).square().sum(1, keepdim=True), "forces": moved}

    return Network()


def _schnet(forces):
    from torch_geometric.nn import SchNet

    def graph(pos, batch):
        i, j = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero(as_tuple=True)
        return torch.stack([i, j]), (pos[i] - pos[j]).norm(dim=-1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = SchNet(8, 8, 2, 6, cutoff=3.0, interaction_graph=graph)

        def forward(self, batch):
            if not forces:
                return {"energy": self.net(batch.z, batch.pos, batch.batch)}
            batch.pos.requires_grad_(True)
            energy = self.net(batch.z, batch.pos, batch.batch)
            (gradient,) = torch.autograd.grad(energy.sum(), batch.pos, create_graph=self.training)
            return {"energy": energy, "forces": -gradient}

    return Network()


row("torch_geometric: SchNet", pyg_batch, PACKED, {"energy": Invariant()}, needs="torch_geometric",
    generators=("rotation_z", "scale"))(lambda: _schnet(False))  # fmt: skip
row("torch_geometric: SchNet with forces", pyg_batch, PACKED, PACKED_FORCES, needs="torch_geometric",
    generators=("rotation_z", "scale"))(lambda: _schnet(True))  # fmt: skip


def _pyg(name, make, run):
    @row(f"torch_geometric: {name}", pyg_batch, PACKED, needs="torch_geometric")
    def _():
        import torch_geometric.nn as library

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = make(library)

            def forward(self, batch):
                h = run(self.layer, batch)
                return library.global_mean_pool(h, batch.batch).sum(1, keepdim=True)

        return Network()


_pyg("GATv2Conv of positions", lambda lib: lib.GATv2Conv(3, 4, heads=2), lambda layer, b: layer(b.pos, b.edge_index))
_pyg("GINConv of positions", lambda lib: lib.GINConv(mlp(3, 8, last=4)), lambda layer, b: layer(b.pos, b.edge_index))
_pyg(
    "PointNetConv",
    lambda lib: lib.PointNetConv(mlp(3, 9, last=4), mlp(4, 8, last=4)),
    lambda layer, b: layer(None, b.pos, b.edge_index),
)
_pyg(
    "PointTransformerConv",
    lambda lib: lib.PointTransformerConv(3, 4),
    lambda layer, b: layer(b.pos.sin(), b.pos, b.edge_index),
)
_pyg("NNConv of differences", lambda lib: lib.NNConv(3, 4, mlp(3, 8, last=12), aggr="max"),
     lambda layer, b: layer(b.pos, b.edge_index, b.pos[b.edge_index[0]] - b.pos[b.edge_index[1]]))  # fmt: skip


def _tensor_field(kind):
    import e3nn
    from e3nn import o3
    from e3nn.nn import FullyConnectedNet, Gate

    torch.set_default_dtype(torch.float64)  # in which e3nn makes its constants; the test sets it back

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.harmonics = o3.Irreps.spherical_harmonics(2)
            self.kinds = nn.Embedding(10, 4)
            self.gate = Gate("4x0e", [F.silu], "2x0e", [torch.sigmoid], "2x1o")
            self.first = o3.FullyConnectedTensorProduct(
                "4x0e", self.harmonics, self.gate.irreps_in, shared_weights=False
            )
            self.second = o3.FullyConnectedTensorProduct(
                self.gate.irreps_out, self.harmonics, "1x0e + 1x1o", shared_weights=False
            )
            self.weights = nn.ModuleList(
                FullyConnectedNet([4, 8, layer.weight_numel], F.silu) for layer in (self.first, self.second)
            )

        def forward(self, graphs):
            pos, (i, j) = graphs["pos"], graphs["edge_index"]
            if kind == "forces":
                pos.requires_grad_(True)
            differences = pos[i] - pos[j]
            r = differences.norm(dim=1)
            lengths = e3nn.math.soft_one_hot_linspace(r, 0.0, 4.0, 4, basis="smooth_finite", cutoff=True) * 2
            angles = o3.spherical_harmonics(self.harmonics, differences, True, normalization="component")
            h = self.kinds(graphs["z"])
            for layer, weights, after in zip(
                (self.first, self.second), self.weights, (self.gate, lambda x: x), strict=True
            ):
                messages = layer(h[i], angles, weights(lengths))
                h = after(messages.new_zeros(len(pos), messages.shape[1]).index_add_(0, j, messages))
            energy = h.new_zeros(2, 1).index_add(0, graphs["batch"], h[:, :1])
            if kind != "forces":
                return {"energy": energy, "forces": h[:, 1:]}
            (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=self.training)
            return {"energy": energy, "forces": -gradient}

    return Network()


row("e3nn: tensor products, gates, harmonics", packed, PACKED,
    {"energy": Invariant(), "forces": Packed(Vectors(3), "batch")}, needs="e3nn", generators=("rotation", "scale"))(
    lambda: _tensor_field("vectors"))  # fmt: skip
row("e3nn: forces", packed, PACKED, PACKED_FORCES, needs="e3nn", generators=("rotation", "scale"))(
    lambda: _tensor_field("forces"))  # fmt: skip
