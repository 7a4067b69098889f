"""Is a symmetry that gravity breaks learned at its true size, and the one that is left as zero? Pendulum chains.

    python examples/pendulum_constraints.py

simulates chains of bobs on rods, in a plane and in space, and trains on short pieces of their trajectories what Finzi,
Wang and Wilson (2020) compare: a Hamiltonian of Cartesian coordinates whose flow is projected onto explicit constraints
(CHNN), a Hamiltonian of angles (HNN), and neural ODEs; in space also a CHNN whose potential sees heights alone.
`EquivarianceMonitor` watches how much rotations and translations change the learned energy, beside the true value at
the same states; `ConservationError` how fast spin and energy change along the learned flow; and a second monitor, whose
generator is the learned flow itself, how fast the rods change their lengths. At the end networks are rolled out from
systems that they have not seen. It prints a table for each system and what they say, writes one picture, and leaves a
TensorBoard run for each training.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdiffeq import odeint

import lie_metric as lm
from lie_metric.representations import Covectors, DirectSum, Flow, Invariant, Points, Vectors
from lie_metric.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from networks import (
    AngularField,
    AngularHamiltonian,
    ConstrainedHamiltonian,
    FreeField,
    HeightPotential,
    InAngles,
    PlacePotential,
    Rods,
)
from trainings import (
    Rates,
    add_common,
    at_least,
    begin,
    fit,
    last,
    listed,
    of_seeds,
    over_seeds,
    ratio,
    series,
    show,
    write,
)
from trainings import cell as mean_cell

STEP = 0.05
"""Time between two states; the unit of time is that of a rod of length 1 under gravity 1, as in the paper."""
DIMENSIONS = {"plane": 2, "space": 3}
WHERE = {"plane": "in the plane", "space": "in space"}
GENERATORS = {
    "plane": ("rotation", "translation_x", "translation_y"),
    "space": ("rotation_z", "rotation_x", "translation_x", "translation_z"),
}
TURNS = {"plane": ("rotation",), "space": ("rotation_z", "rotation_x")}
"""Those that keep the rods' lengths: along others the flow does not know the energy."""
SHIFTS = {system: tuple(g for g in names if g not in TURNS[system]) for system, names in GENERATORS.items()}
VERTICAL = {"plane": "rotation", "space": "rotation_z"}
"""What by Noether's theorem conserves the spin, or changes it."""
QUANTITIES = ("spin", "energy")
ROUNDING = 1e-9
"""Errors below it are of rounding, in float64."""
PAPER = {2: {"CHNN": 1.2e-4, "HNN in angles": 1.9e-3, "neural ODE": 6.5e-2}, 5: {"CHNN": 1.1e-3, "HNN in angles": 0.34,
         "neural ODE": 0.44}}  # fmt: skip
"""Relative errors of rollouts in the plane by number of bobs, from the paper's tables."""
MODELS: dict[str, tuple[str, ...]] = {
    "CHNN": ("plane", "space"),
    "CHNN of heights": ("space",),
    "HNN in angles": ("plane",),
    "neural ODE": ("plane", "space"),
}
"""Models, and where each is trained: angles are no coordinates of all of space, and what heights alone promise is seen
there."""
COLOURS = dict(zip(MODELS, ("#0072B2", "#56B4E9", "#D55E00", "#777777"), strict=True))


def masses(bobs: int) -> list[float]:
    """The bobs' masses, from 1.5 at the top to 0.5 at the end."""
    return torch.linspace(1.5, 0.5, bobs).tolist()


class Weight(nn.Module):
    """The true potential Σ m g z with g = 1.

    Args:
        masses: Of the bobs.
    """

    masses: Tensor

    def __init__(self, masses: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("masses", torch.tensor(masses, dtype=torch.float64))

    def forward(self, places: Tensor) -> Tensor:
        """Energies (B,) of places (B, n, d)."""
        return (self.masses * places[..., -1]).sum(-1)


def truth(bobs: int) -> ConstrainedHamiltonian:
    """The true dynamics, in any dimension: the same equations with the true potential and masses."""
    exact = ConstrainedHamiltonian(Weight(masses(bobs)), [1.0] * bobs, masses(bobs))
    return exact.double().requires_grad_(False)


def spin(states: Tensor) -> Tensor:
    """The angular momentum about the pivot, of which in space the vertical component, (B,)."""
    places, momenta = states.chunk(2, dim=-1)
    return (places[..., 0] * momenta[..., 1] - places[..., 1] * momenta[..., 0]).sum(-1)


def starts(system: str, bobs: int, count: int, seed: int) -> Tensor:
    """Chains at time 0: angles from straight down, and velocities across the rods, are Gaussian.

    Args:
        system: ``"plane"`` or ``"space"``.
        bobs: n.
        count: How many.
        seed: Seed.

    Returns:
        States (count, n, 2 d), float64, that fulfil all constraints.
    """
    source = torch.Generator().manual_seed(seed)
    d = DIMENSIONS[system]
    draw = partial(torch.randn, dtype=torch.float64, generator=source)
    angle, level, speeds = draw(count, bobs, 1), draw(count, bobs, d - 1), draw(count, bobs, d)
    level = level / level.norm(dim=-1, keepdim=True)
    rods = torch.cat([angle.sin() * level, -angle.cos()], dim=-1)
    across = speeds - (speeds * rods).sum(-1, keepdim=True) * rods
    heavy = torch.tensor(masses(bobs), dtype=torch.float64)[:, None]
    return torch.cat([rods.cumsum(1), heavy * 0.7 * across.cumsum(1)], dim=-1)


def fulfilled(states: Tensor) -> Tensor:
    """The states with rods of length 1 and velocities across them: what an integrator adds, some 1e-8, is taken off.

    Momenta in angles and Cartesian ones say the same only where constraints hold to the last digit.
    """
    places, momenta = states.chunk(2, dim=-1)
    heavy = torch.tensor(masses(states.shape[-2]), dtype=states.dtype)[:, None]
    rods, speeds = Rods.along(places), Rods.along(momenta / heavy)
    rods = rods / rods.norm(dim=-1, keepdim=True)
    speeds = speeds - (speeds * rods).sum(-1, keepdim=True) * rods
    return torch.cat([rods.cumsum(-2), heavy * speeds.cumsum(-2)], dim=-1)


def rollout(model: Callable[[Tensor], Tensor], states: Tensor, times: Tensor, **options: Any) -> Tensor:
    """The states at given times along a flow, by torchdiffeq, (T, B, ...)."""
    return odeint(lambda _, z: model(z), states, times, **options)


def true_rollout(states: Tensor, times: Tensor) -> Tensor:
    """The states at given times along the true flow, (T, B, n, 2 d)."""
    with torch.no_grad():
        return fulfilled(rollout(truth(states.shape[-2]), states, times, method="dopri5", rtol=1e-9, atol=1e-10))


@functools.lru_cache(maxsize=8)
def trajectories(system: str, bobs: int, count: int, horizon: float, seed: int) -> Tensor:
    """Where chains go, (T, count, n, 2 d); a process that trains several networks makes them once."""
    times = STEP * torch.arange(round(horizon / STEP) + 1, dtype=torch.float64)
    return true_rollout(starts(system, bobs, count, seed), times)


def chunks(path: Tensor, each: int, steps: int, seed: int) -> Tensor:
    """Short pieces of trajectories, at random times of them.

    Args:
        path: Trajectories (T, B, n, 2 d).
        each: How many pieces of each.
        steps: Steps of each.
        seed: Seed.

    Returns:
        (B · each, steps + 1, n, 2 d).
    """
    source = torch.Generator().manual_seed(seed)
    begin = torch.randint(len(path) - steps, (path.shape[1], each, 1), generator=source)
    rows = torch.arange(path.shape[1])[:, None, None]
    return path[begin + torch.arange(steps + 1), rows].flatten(0, 1)


class Learner(Rates):
    """Trains rates of change in Cartesian coordinates, so that short rollouts follow the data."""

    def __init__(
        self, dynamics: nn.Module, scale: Tensor, learning_rate: float, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(dynamics, scale, learning_rate, settings)
        self.rods = Rods([1.0] * len(scale))

    @property
    def energetic(self) -> bool:
        """Whether there is a learned energy."""
        inner = self.dynamics.inner if isinstance(self.dynamics, InAngles) else self.dynamics
        return hasattr(inner, "hamiltonian")

    def stretch(self, states: Tensor) -> Tensor:
        """How far rods are from their lengths, (B, n)."""
        return self.rods.stretch(states)

    def roll(self, states: Tensor, times: Tensor, **options: Any) -> Tensor:
        """Rollouts in the coordinates of the network, as Cartesian states (T, B, n, 2 d)."""
        if isinstance(self.dynamics, InAngles):
            angles = rollout(self.dynamics.inner, self.dynamics.enter(states), times, **options)
            return self.dynamics.leave(angles)
        return rollout(self.dynamics, states, times, **options)

    def loss(self, pieces: Tensor) -> Tensor:
        """Mean squared error of rollouts by RK4, in Cartesian coordinates; 1 = as if nothing moved."""
        times = STEP * torch.arange(pieces.shape[1], dtype=pieces.dtype, device=pieces.device)
        found = self.roll(pieces[:, 0], times, method="rk4")[1:].transpose(0, 1)
        return ((found - pieces[:, 1:]) / self.scale).square().mean()


def spread_of_changes(pieces: Tensor) -> Tensor:
    """Root mean square changes from the first state of chunks to later ones, (n, 2 d), alike for all axes of a bob."""
    change = (pieces[:, 1:] - pieces[:, :1]).square().mean((0, 1))
    halves = change.unflatten(-1, (2, -1)).mean(-1, keepdim=True)
    return halves.expand(-1, -1, change.shape[-1] // 2).flatten(-2).sqrt()


def build(system: str, model: str, bobs: int) -> nn.Module:
    """Fresh dynamics of a name, float64."""
    d, lengths = DIMENSIONS[system], [1.0] * bobs
    if model.startswith("CHNN"):
        potential = HeightPotential if model.endswith("heights") else PlacePotential
        return ConstrainedHamiltonian(potential(bobs, d), lengths).double()
    if system == "plane":
        inner = AngularHamiltonian(bobs) if model.startswith("HNN") else AngularField(bobs)
        return InAngles(inner, lengths, masses(bobs)).double()
    return FreeField(bobs, d).double()


def moving(system: str) -> tuple[DirectSum, DirectSum]:
    """How states (q, p) move, and how their rates of change do: translations leave these."""
    d = DIMENSIONS[system]
    return DirectSum((Points(d), Covectors(d))), DirectSum((Vectors(d), Covectors(d)))


def tangents(system: str, bobs: int) -> Flow:
    """Translations as far as the rods allow them: projected as the true dynamics is."""
    exact, d = truth(bobs), DIMENSIONS[system]

    def allowed(states: Tensor, axis: int) -> Tensor:
        rates = torch.zeros_like(states)
        rates[..., axis] = 1
        return exact.rods.project(states, rates, exact.inverse)

    return Flow({name: partial(allowed, axis="xyz".index(name[-1])) for name in SHIFTS[system]}, dimension=d)


def monitors(model: Learner, system: str, bobs: int, count: int) -> list[lm.EquivarianceMonitor]:
    """The callbacks: of energy or field under motions of space, and of the rods' lengths along the learned flow.

    Args:
        model: What is trained.
        system: Where.
        bobs: n.
        count: How many states are measured.

    Returns:
        Two monitors.
    """
    states, rates = moving(system)
    quantities: dict[str, Callable[[Tensor], Tensor]] = {"spin": spin, "energy": truth(bobs).hamiltonian}
    metrics: dict[str, Any] = {}
    if model.energetic:
        quantities["own energy"] = model.hamiltonian
        metrics["tangent"] = lm.LocalEquivarianceError(SHIFTS[system], input_representation=tangents(system, bobs))
    metrics["conservation"] = lm.ConservationError(quantities, function="forward")
    first = partial(lm.EquivarianceMonitor, num_images=count, images=lambda batch: batch[0][:, 0], on_error="raise")
    # The generator is the flow itself, and has the weights of the moment: what does not change along it is zero.
    flow = Flow({"flow": lambda z: model(z).detach()})
    return [
        first(
            GENERATORS[system],
            measures=("relative",),
            function="hamiltonian" if model.energetic else None,
            input_representation=states,
            output_representation=None if model.energetic else rates,
            metrics=metrics,
        ),
        first(
            flow.generators,
            measures=("lee",),
            function="stretch",
            input_representation=flow,
            output_representation=Invariant(),
            prefix="rods",
        ),
    ]


@dataclass
class Result:
    """What is known of a trained network.

    Args:
        run: The monitors' curves.
        errors: Relative errors of rollouts at each of the times, geometric means over systems.
        times: These.
        rates_error: Norm of the error of rates of change, of their own norm.
        apart: By generator the root mean square difference of the Lie derivatives of learned and true energy, in
            standard deviations of the true one; empty without an energy.
        noether: The difference between the asymmetry of H about the vertical and the change of spin along the flow, of
            the former; NaN without H, or where both are rounding.
        masses: What the bobs' masses are learned to be; empty where none are.
        equivariance: Final relative errors of H, or of the field, by generator.
        tangent: Those of H under translations as far as the rods allow them.
        conservation: Final conservation errors by quantity.
        rods: Root mean square rate at which φ of the rods changes along the learned flow.
    """

    run: Run
    errors: list[float]
    times: list[float]
    rates_error: float
    apart: dict[str, float]
    noether: float
    masses: list[float]
    equivariance: dict[str, float]
    tangent: dict[str, float]
    conservation: dict[str, float]
    rods: float

    @property
    def rollout_error(self) -> float:
        """The geometric mean over time, as in the paper."""
        return math.exp(fmean(math.log(max(one, 1e-300)) for one in self.errors))


def derivatives(system: str, energy: Callable[[Tensor], Tensor], states: Tensor) -> dict[str, Tensor]:
    """The Lie derivatives of an energy by generator, (B,)."""
    found = lm.lie_derivative(energy, states, GENERATORS[system], input_representation=moving(system)[0])
    return {name: one.detach() for name, one in found.items()}


def true_values(system: str, states: Tensor) -> dict[str, dict[str, float]]:
    """What the monitors would read of the true system at these states.

    Args:
        system: Where.
        states: (B, n, 2 d).

    Returns:
        By generator the relative errors of ``"energy"`` and ``"field"``, and of the energy along ``"tangent"``
        translations, and by quantity ``"conservation"``.
    """
    bobs = states.shape[-2]
    exact, (inside, outside) = truth(bobs), moving(system)

    def numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: one.item() for name, one in found.items()}

    relative = partial(lm.functional.relative, images=states, generators=GENERATORS[system])
    return {
        "energy": numbers(relative(exact.hamiltonian, input_representation=inside)),
        "field": numbers(relative(exact, input_representation=inside, output_representation=outside)),
        "tangent": numbers(
            lm.functional.relative(
                exact.hamiltonian, states, SHIFTS[system], input_representation=tangents(system, bobs)
            )
        ),
        "conservation": numbers(
            lm.functional.conservation_error(exact, states, {"spin": spin, "energy": exact.hamiltonian})
        ),
    }


def noether(model: Learner, system: str, states: Tensor) -> float:
    """How far d(spin)/dt is from -L_X H state by state, of the size of the latter; NaN if that is rounding."""
    asymmetry = derivatives(system, model.hamiltonian, states)[VERTICAL[system]]
    flow = Flow({"flow": lambda z: model(z).detach()})
    along = lm.lie_derivative(spin, states, flow.generators, input_representation=flow)["flow"].detach()
    size = asymmetry.square().mean().sqrt().item()
    return (along + asymmetry).square().mean().sqrt().item() / size if size > ROUNDING else math.nan


def judged(model: Learner, run: Run, system: str, states: Tensor, horizon: float) -> Result:
    """Rolls a trained network out, and gathers what is known of it.

    Args:
        model: The network.
        run: Its curves.
        system: Where.
        states: Those that the monitors measured: rollouts begin there.
        horizon: How long.

    Returns:
        The result.
    """
    bobs = states.shape[-2]
    exact = truth(bobs)
    times = STEP * torch.arange(round(horizon / STEP) + 1, dtype=torch.float64)
    true = true_rollout(states, times)
    with torch.no_grad():
        try:
            most = {"max_num_steps": 500}  # of each interval: a few are enough where nothing runs away
            found = model.roll(states, times, method="dopri5", rtol=1e-7, atol=1e-9, options=most)
        except AssertionError:  # torchdiffeq's word for a step that becomes too small, or too many of them
            found = torch.full_like(true, math.nan)
        rates = exact(states)
        wrong = ((model(states) - rates).norm() / rates.norm()).item()
        gap, sizes, true_sizes = (part[1:].flatten(2).norm(dim=-1) for part in (found - true, found, true))
        errors = (gap / (sizes + true_sizes)).clamp(min=1e-300).log().mean(1).exp()
    apart, exactness = {}, math.nan
    if model.energetic:
        pair = [derivatives(system, energy, states) for energy in (model.hamiltonian, exact.hamiltonian)]
        size = exact.hamiltonian(states).std()
        apart = {name: ((one - pair[1][name]).square().mean().sqrt() / size).item() for name, one in pair[0].items()}
        exactness = noether(model, system, states)
    inner = model.dynamics
    learned = (1 / inner.inverse)[:, 0].tolist() if isinstance(inner, ConstrainedHamiltonian) else []
    own = ("own energy",) if model.energetic else ()
    return Result(
        run,
        errors.tolist(),
        times[1:].tolist(),
        wrong,
        apart,
        exactness,
        learned,
        last(run, "equivariance", GENERATORS[system]),
        last(run, "equivariance_tangent", SHIFTS[system]) if model.energetic else {},
        last(run, "equivariance_conservation", (*QUANTITIES, *own)),
        math.sqrt(last(run, "rods_lee", ("flow",))["flow"]),
    )


def pieces(system: str, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The chunks to train on, and one of each unseen system."""
    path, other = (
        trajectories(system, options.bobs, count, options.horizon, seed)
        for count, seed in ((options.systems, 0), (options.test_systems, 1))
    )
    return chunks(path, options.chunks, options.steps, 2), chunks(other, 1, options.steps, 3)


def train(task: tuple[str, int], options: argparse.Namespace) -> Result:
    """Trains one network under the monitors, and rolls it out.

    Args:
        task: ``"SYSTEM: MODEL"``, and the seed of initial weights and of the order of batches; systems are the same for
            all.
        options: The command line.

    Returns:
        What is known of it.
    """
    name, seed = task
    system, kind = name.split(": ")
    known, unseen = pieces(system, options)
    seed_everything(seed, verbose=False)
    settings = {"system": system, "model": kind, "seed": seed, "epochs": options.epochs, "bobs": options.bobs}
    model = Learner(build(system, kind, options.bobs), spread_of_changes(known), options.learning_rate, settings)
    order = torch.Generator().manual_seed(seed)
    loaders = (
        DataLoader(TensorDataset(known), options.batch_size, shuffle=True, generator=order),
        DataLoader(TensorDataset(unseen), options.batch_size),
    )
    folder = options.out / "pendulum" / f"{system}_{kind.replace(' ', '_')}-s{seed}"
    watching = monitors(model, system, options.bobs, len(unseen))
    run = fit(model, loaders, folder, options.epochs, watching, gradient_clip_val=1.0)
    return judged(model.eval(), run, system, unseen[:, 0], options.horizon)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--where", nargs="+", default=list(DIMENSIONS), choices=list(DIMENSIONS), help="in a plane, or in space")
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL", help=listed(list(MODELS)))
    add("--bobs", type=int, default=2, help="bobs of a chain; the paper has 2 and 5 in a plane")
    add("--systems", type=int, default=400, help="systems to train on")
    add("--test-systems", type=int, default=100, help="systems to measure and to roll out, a state of each")
    add("--chunks", type=int, default=8, help="chunks of each training system")
    add("--steps", type=int, default=2, help=f"steps of {STEP} in a chunk")
    add("--learning-rate", type=float, default=1e-2)
    add("--horizon", type=float, default=3.0, help="length of trajectories and rollouts")
    add_common(add, epochs=30, batch_size=200)
    options = parser.parse_args(argv)
    at_least(parser, options, bobs=1, systems=2, test_systems=2, chunks=1, steps=1)
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive, got {options.learning_rate}")
    if not STEP <= options.horizon < math.inf or options.horizon < options.steps * STEP - 1e-9:
        parser.error(
            f"--horizon must be finite and hold a chunk of {options.steps} steps of {STEP}, got {options.horizon}"
        )
    for name, chosen in (("--models", options.models), ("--where", options.where)):
        if len(set(chosen)) < len(chosen):
            parser.error(f"{name} must name each once, got {' '.join(chosen)}")
    for system in options.where:
        if not any(system in MODELS[model] for model in options.models):
            parser.error(f"--models must have one for chains {WHERE[system]}, got {listed(options.models)}")
    return options


def cell(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, to the digit of the error: sizes are compared with true ones."""
    if len(values) < 2 or not all(map(math.isfinite, values)) or fmean(values) < ROUNDING:
        return mean_cell(values, rounding=ROUNDING, form=".0e" if 0 < values[0] < ROUNDING else ".3g")
    error = stdev(values) / math.sqrt(len(values))
    digits = max(-math.floor(math.log10(error)), 0) if error else 3
    return f"{fmean(values):.{digits}f} ± {error:.1g}"


def cells(found: Sequence[Result], value: Callable[[Result], float | None]) -> str:
    """Such a cell of what there is; a dash where there is nothing."""
    known = [one for one in map(value, found) if one is not None]
    return cell(known) if known else "-"


def table(
    system: str, results: Mapping[str, Sequence[Result]], true: Mapping[str, Mapping[str, float]]
) -> list[list[str]]:
    """Rows of text for a system: the true values, and of each network asymmetries, conservation and errors.

    Args:
        system: Where.
        results: By model those of all seeds.
        true: Of :func:`true_values`.

    Returns:
        The rows, with the names of columns first.
    """
    names, shifts = (*TURNS[system], *SHIFTS[system]), SHIFTS[system]
    rows = [[WHERE[system], *names, *(f"allowed {name[-1]}" for name in shifts), "d/dt spin", "d/dt energy"]]
    rows[0] += ["d/dt rods", "error of rates", "of rollouts"]
    kinds = dict.fromkeys("energy" if found[0].tangent else "field" for found in results.values())
    for kind in kinds:
        numbers: list[float | None] = [true[kind][name] for name in names]
        numbers += [true["tangent"][name] if kind == "energy" else None for name in shifts]
        numbers += [true["conservation"][name] for name in QUANTITIES]
        words = ["-" if one is None else "0" if one < ROUNDING else f"{one:.3g}" for one in numbers]
        rows.append(["truth" if kind == "energy" else "truth*", *words, "0", "0", "0"])
    for name, found in results.items():
        rows.append([name if found[0].tangent else f"{name}*"])
        rows[-1] += [cells(found, lambda one, g=g: one.equivariance[g]) for g in names]
        rows[-1] += [cells(found, lambda one, g=g: one.tangent.get(g)) for g in shifts]
        rows[-1] += [cells(found, lambda one, q=q: one.conservation[q]) for q in QUANTITIES]
        rows[-1].append(cells(found, lambda one: one.rods))
        rows[-1] += [cells(found, lambda one: one.rates_error), cells(found, lambda one: one.rollout_error)]
    return rows


def judged_ratio(
    found: tuple[float, float, float], less: str, alike: str, more: str, form: str = ".3g"
) -> tuple[str, str]:
    """A ratio with its interval, and which of three words this allows.

    Args:
        found: Of :func:`ratio`.
        less: The word for one below 1.
        alike: For an interval that holds 1.
        more: For one above.
        form: Digits.

    Returns:
        Numbers and word; of one seed the interval is left out, and no word is allowed, as where there is no ratio.
    """
    mean, low, high = found
    if math.isnan(mean):
        return "diverged", "undefined"
    if math.isnan(low):
        return f"{mean:{form}}", "one seed does not tell"
    return f"{mean:{form}} ({low:{form}} to {high:{form}})", less if high < 1 else more if low > 1 else alike


def against_truth(values: Sequence[float], size: float, form: str = ".4f") -> str:
    """Learned sizes as a ratio to the true one, in words."""
    numbers, word = judged_ratio(
        ratio(values, [size] * len(values)), "too small", "not told from the truth", "too large", form
    )
    return f"{numbers}, {word}"


def curve(one: Result, generator: str) -> list[float]:
    """The relative errors of a generator over epochs, of which the first is the untrained network's."""
    return series(one.run, "equivariance", generator)[1]


Findings = Mapping[str, Mapping[str, Sequence[Result]]]
"""By system and model the results of all seeds."""
Truths = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By system those of :func:`true_values`."""


def sentence(results: Findings, true: Truths, bobs: int) -> str:
    """What the numbers show, in words that follow from them.

    Args:
        results: By system and model those of all seeds.
        true: By system those of :func:`true_values`.
        bobs: n.

    Returns:
        Lines of text.
    """
    parts = []
    for system, networks in results.items():
        energies = {name: found for name, found in networks.items() if found[0].tangent}
        if energies:
            for generator in TURNS[system]:
                size = true[system]["energy"][generator]
                parts.append(
                    _broken(system, generator, energies, size)
                    if size > ROUNDING
                    else _left(system, generator, energies)
                )
            parts.append(_shifts(system, energies, true[system]))
    parts += _exact(results)
    for system, networks in results.items():
        parts += _order(system, networks, bobs)
    return "\n".join(f"{part}." for part in parts)


def _broken(system: str, generator: str, energies: Mapping[str, Sequence[Result]], size: float) -> str:
    """About a symmetry that gravity breaks: how large it is learned, and how right state by state."""
    words = []
    for name, found in energies.items():
        apart = fmean(one.apart[generator] for one in found) / size
        of = against_truth([one.equivariance[generator] for one in found], size)
        words.append(f"{name} {of}, state by state {100 * apart:.2g} % off")
    return (
        f"Gravity breaks {generator} {WHERE[system]}: L H is {size:.3g} standard deviations of H per radian. Learned, "
        f"as a ratio to that: {'; '.join(words)}"
    )


def _left(system: str, generator: str, energies: Mapping[str, Sequence[Result]]) -> str:
    """About a symmetry that gravity leaves: which are exact, and how far the others have come."""
    words = []
    for name, found in energies.items():
        curves = [curve(one, generator) for one in found]
        largest = max(map(max, curves))
        if largest < ROUNDING:
            words.append(f"{name} at most {largest:.0e} in every epoch of every seed, as it is built")
            continue
        final = [one[-1] for one in curves]
        fresh, word = judged_ratio(ratio(final, [one[0] for one in curves]), "less", "not told from it", "more", ".2g")
        peak, _ = judged_ratio(ratio(final, [max(one) for one in curves]), "", "", "", ".2g")
        words.append(
            f"{name} {cell(final)}, which is {fresh} of the untrained network's ({word}), and {peak} of the "
            "largest in training"
        )
    return f"Gravity leaves {generator} {WHERE[system]}: there L H is 0. Learned: {'; '.join(words)}"


def _shifts(system: str, energies: Mapping[str, Sequence[Result]], true: Mapping[str, Mapping[str, float]]) -> str:
    """About translations: as far as the rods allow them, and beyond, where no trajectory tells the energy."""
    words = []
    for name, found in energies.items():
        allowed, whole = [], []
        for generator in SHIFTS[system]:
            along = against_truth([one.tangent[generator] for one in found], true["tangent"][generator])
            allowed.append(f"{generator} {along}")
            size, values = true["energy"][generator], [one.equivariance[generator] for one in found]
            told = against_truth(values, size) if size > ROUNDING else f"{cell(values)} where 0 is true"
            whole.append(f"{generator} {told}")
        words.append(f"{name}: allowed {', '.join(allowed)}; whole {', '.join(whole)}")
    return (
        f"Translations stretch rods, and the flow is the same for energies that differ off the constraints. What the "
        f"rods allow of translations {WHERE[system]}, and the whole, as ratios to the truth: {'. '.join(words)}"
    )


def _exact(results: Findings) -> list[str]:
    """About what holds to rounding, and where it does not."""
    every = [(f"{name} {WHERE[system]}", one) for system, networks in results.items()
             for name, found in networks.items() for one in found]  # fmt: skip
    parts = []
    own = [one.conservation["own energy"] for _, one in every if one.tangent]
    if own:
        worst = [one.noether for _, one in every if not math.isnan(one.noether)]
        told = (
            f"; d(spin)/dt is -L H about the vertical, state by state, to {max(worst):.0e} of its size" if worst else ""
        )
        parts.append(
            f"Learned energies change along their own flow by at most {max(own):.0e} of their standard deviation{told}"
        )
    kept = [one.rods for _, one in every if one.rods < ROUNDING]
    lost = {
        name: [other.rods for label, other in every if label == name] for name, one in every if one.rods >= ROUNDING
    }
    if kept:
        parts.append(
            f"Half the squared lengths of rods change by at most {max(kept):.0e} a unit of time in {len(kept)} of "
            f"{len(every)} trainings"
        )
    if lost:
        parts.append("They change in " + ", ".join(f"{name} by {cell(found)}" for name, found in lost.items()))
    for name in dict.fromkeys(name for name, one in every if one.masses):
        learned = [one.masses for label, one in every if label == name]
        off = max(abs(got / right - 1) for one in learned for got, right in zip(one, masses(len(one)), strict=True))
        parts.append(f"Masses of {name} are wrong by at most {100 * off:.2g} % in any seed")
    return parts


def _order(system: str, networks: Mapping[str, Sequence[Result]], bobs: int) -> list[str]:
    """About rollouts: ratios of their errors, beside the paper's."""
    if len(networks) < 2:
        return []
    paper = PAPER.get(bobs, {}) if system == "plane" else {}
    words, verdicts = [], {"confirmed": [], "contradicted": [], "not told": []}
    names = list(networks)
    for k, name in enumerate(names):
        for other in names[k + 1 :]:
            of = ratio(*([one.rollout_error for one in networks[which]] for which in (other, name)))
            numbers, word = judged_ratio(of, "less", "not told apart", "more", ".2g")
            words.append(f"{other} to {name} {numbers}, {word}")
            if name in paper and other in paper:
                words[-1] += f"; {paper[other] / paper[name]:.2g} in the paper"
                verdicts["confirmed" if word == "more" else "contradicted" if word == "less" else "not told"].append(
                    f"{name} before {other}"
                )
    parts = [f"Errors of rollouts {WHERE[system]}, as ratios: {'. '.join(words)}"]
    if paper:
        parts.append("Of the paper's order " + "; ".join(f"{key}: {listed(value)}" for key, value in verdicts.items()))
    return parts


def picture(results: Findings, true: Truths) -> Any:
    """Curves of what gravity breaks and leaves over epochs, and errors of rollouts over time.

    Args:
        results: By system and model those of all seeds.
        true: By system those of :func:`true_values`.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    broken, left, rolled = figure.subplots(1, 3)
    first, final = next(iter(results)), list(results)[-1]
    _draw_sizes(broken, first, results[first], true[first]["energy"])
    _draw_vertical(left, final, results[final])
    styles = dict(zip(results, ("-", "--"), strict=False))
    for system, networks in results.items():
        for name, found in networks.items():
            values = torch.tensor([one.errors for one in found])
            times, colour = found[0].times, COLOURS[name]
            rolled.fill_between(times, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)
            rolled.plot(times, values.log().mean(0).exp(), styles[system], color=colour, linewidth=2)
    shown = [name for name in MODELS if any(name in networks for networks in results.values())]
    handles = [rolled.plot([], [], color=COLOURS[name], linewidth=2, label=name)[0] for name in shown]
    handles += [rolled.plot([], [], line, color="0.3", label=WHERE[where])[0] for where, line in styles.items()]
    rolled.legend(handles=handles, fontsize=9, loc="lower right")
    rolled.set(yscale="log", xlabel="time", ylabel="relative error of states", title="Rollouts of unseen systems")
    return figure


def _draw_sizes(axis: Any, system: str, networks: Mapping[str, Sequence[Result]], size: Mapping[str, float]) -> None:
    """Relative errors of H over epochs, by generator, beside the true values."""
    styles = dict(zip((*TURNS[system], *SHIFTS[system]), ("-", "--", ":", "-."), strict=False))
    handles = {}
    for name, found in networks.items():
        if found[0].tangent:
            handles[name] = axis.plot([], [], color=COLOURS[name], linewidth=2)[0]
            for generator, style in styles.items():
                _band(axis, found, generator, COLOURS[name], style)
    for generator, style in styles.items():
        axis.axhline(size[generator], color="black", linewidth=1, linestyle=style)
        handles[generator] = axis.plot([], [], style, color="0.3")[0]
    handles["truth (thin)"] = axis.plot([], [], color="black", linewidth=1)[0]
    axis.legend(handles.values(), handles.keys(), fontsize=9, loc="upper right", ncols=2)
    highest = 1.45 * max(size.values())
    axis.set(
        xlabel="epoch",
        ylabel="relative error of H",
        title=f"{WHERE[system].capitalize()}: size of asymmetries",
        ylim=(-0.05, highest),
    )


def _draw_vertical(axis: Any, system: str, networks: Mapping[str, Sequence[Result]]) -> None:
    """Relative errors about the vertical over epochs; those of zero in a grey band."""
    lowest = 1e-4
    bottom = lowest / 3
    for name, found in networks.items():
        _band(axis, found, VERTICAL[system], COLOURS[name], "-" if found[0].tangent else "--", lowest, name)
    axis.axhspan(bottom, lowest, color="0.92", linewidth=0, zorder=0)
    axis.set(yscale="log", ylim=(bottom, 3), xlabel="epoch", ylabel="relative error / radian")
    axis.set_title(f"{WHERE[system].capitalize()}: {VERTICAL[system]} (dashed: of the field)")
    axis.set_yticks([lowest / math.sqrt(3), 1e-4, 1e-3, 1e-2, 1e-1, 1], ["0", "0.0001", "0.001", "0.01", "0.1", "1"])
    axis.minorticks_off()
    axis.legend(fontsize=9, loc="center right")


def _band(
    axis: Any,
    found: Sequence[Result],
    generator: str,
    colour: str,
    style: str,
    lowest: float = 0.0,
    label: str | None = None,
) -> None:
    """A curve over epochs with its range over seeds; given a lowest value, for a logarithmic axis, zeros below it."""
    epochs = series(found[0].run, "equivariance", generator)[0]
    values = torch.tensor([curve(one, generator) for one in found])
    if lowest:  # zero has no logarithm: what is exact stands in the grey band
        values = torch.where(values < ROUNDING, lowest / math.sqrt(3), values.clamp(min=lowest))
    middle = values.log().mean(0).exp() if lowest else values.mean(0)
    axis.fill_between(epochs, values.amin(0), values.amax(0), color=colour, alpha=0.25, linewidth=0)
    axis.plot(epochs, middle, style, color=colour, linewidth=2, label=label)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, list[Result]]]:
    """Trains, rolls out, prints, and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        By system and model the results of all seeds.
    """
    options = parse(argv)
    folder, started = begin(options, "pendulum")
    chosen = [(where, name) for where in options.where for name in options.models if where in MODELS[name]]
    flat = over_seeds(
        train,
        [f"{where}: {name}" for where, name in chosen],
        options,
        lambda one: f"error of rates {one.rates_error:.2e}, of rollouts {one.rollout_error:.2e}",
    )
    results: dict[str, dict[str, list[Result]]] = {where: {} for where in options.where}
    for where, name in chosen:
        results[where][name] = flat[f"{where}: {name}"]
    true = {where: true_values(where, pieces(where, options)[1][:, 0]) for where in results}
    tables = {where: table(where, found, true[where]) for where, found in results.items()}
    over = of_seeds(options.seeds)
    caption = (
        f"{options.bobs} bobs. Rotations and translations: relative Lie derivative of the learned energy, in its "
        "standard deviations per radian or unit of length (*: of the field, there is no energy); allowed: of "
        "translations, as far as the constraints allow them.\nd/dt: of spin and the true energy, in standard "
        "deviations a unit of time; of rods, root mean square of half the squared lengths.\nErrors: of rates, norm of "
        "the error over norm; of rollouts, |z - z'| / (|z| + |z'|), geometric mean over "
        f"{options.horizon:g} units of time. {options.test_systems} states, one of each unseen system, {over}."
    )
    text = "\n\n".join([*map(show, tables.values()), caption, sentence(results, true, options.bobs)])
    rows = [row for found in tables.values() for row in found]
    write(folder, rows, text, {"pendulum_constraints.png": picture(results, true)}, started)
    return results


if __name__ == "__main__":
    main()
