"""Does a network conserve what its symmetry promises? Six springs in the plane, and networks that learn them.

    python examples/conserve_momentum.py

makes systems of six bodies with random masses and stiffnesses (as Finzi, Stanton, Izmailov and Wilson 2020 do), and
trains Hamiltonians and a neural ODE on short chunks of their trajectories. `EquivarianceMonitor` watches how far
the learned energy is from invariance to translations and rotations, and, by `ConservationError`, how fast momentum,
spin and energy change along the learned flow. At the end the networks are rolled out from states of systems that they
have not seen, and the drift that was predicted stands beside the one that is measured. It prints a table and what it
says, writes one picture, and leaves a TensorBoard run for each training.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdiffeq import odeint

import lie_metric as lm
from lie_metric.representations import Covectors, DirectSum, Points, Tensors, Vectors
from lie_metric.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from networks import (
    CentredPotential,
    ConvolutionalPotential,
    Hamiltonian,
    PairwisePotential,
    PlainPotential,
    TurningPotential,
    VectorField,
)
from trainings import Rates, add_common, at_least, begin, fit, last, listed, of_seeds, over_seeds, series, show, write
from trainings import cell as mean_cell

BODIES = 6
STEP = 0.02
"""Time between two states of a trajectory; the fastest of the springs take some ten steps for an oscillation."""
CONSTANT = Tensors(2, 0)
STATES = DirectSum((Points(2), Covectors(2), CONSTANT, CONSTANT))
"""How a state (q, p, mass, stiffness) moves."""
RATES = DirectSum((Vectors(2), Covectors(2), CONSTANT, CONSTANT))
"""How its rate of change does: a velocity is no place, and translations leave it."""
GENERATORS = ("translation_x", "translation_y", "rotation")
PARTNER = {"px": "translation_x", "py": "translation_y", "spin": "rotation"}
"""What by Noether's theorem conserves a quantity."""
HORIZONS = (0.02, 0.1, 0.5)
"""Times at which drifts are compared, besides the end of the rollout."""
RUNAWAY = 3.0
"""How many times as far from the origin as the true ones states of a rollout may be before it is said to run away."""
ROUNDING = 1e-9
"""Errors below it are of rounding, in float64: nothing is left to be correlated."""
MODELS: dict[str, Callable[[int], nn.Module] | None] = {
    "MLP": PlainPotential,
    "centred MLP": CentredPotential,
    "LieConv T(2)": ConvolutionalPotential,
    "LieConv SO(2)": TurningPotential,
    "pairwise": PairwisePotential,
    "neural ODE": None,
}
DEFAULT = tuple(name for name in MODELS if name != "LieConv SO(2)")
"""What is trained where nothing is asked for; convolutions over turned offsets cost more than any of these."""
COLOURS = dict(zip(MODELS, ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#777777"), strict=True))
MARKS = {"px": "o", "py": "s", "spin": "^", "energy": "x"}


def momentum(states: Tensor, axis: int) -> Tensor:
    """A component of the momentum, (B,)."""
    return states[..., 2 + axis].sum(-1)


def spin(states: Tensor) -> Tensor:
    """The angular momentum about the origin, (B,)."""
    return (states[..., 0] * states[..., 3] - states[..., 1] * states[..., 2]).sum(-1)


def energy(states: Tensor) -> Tensor:
    """The true energy Σ p²/2m + Σ_{i<j} k_i k_j |q_i - q_j|²/2, (B,)."""
    places, momenta, masses, stiffness = states.split((2, 2, 1, 1), dim=-1)
    kinetic = (momenta.square() / (2 * masses)).sum((-1, -2))
    apart = (places[..., :, None, :] - places[..., None, :, :]).square().sum(-1)
    return kinetic + (stiffness * stiffness.mT * apart).sum((-1, -2)) / 4


QUANTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "px": partial(momentum, axis=0),
    "py": partial(momentum, axis=1),
    "spin": spin,
    "energy": energy,
}


def true_rates(states: Tensor) -> Tensor:
    """How fast states of the springs change."""
    places, momenta, masses, stiffness = states.split((2, 2, 1, 1), dim=-1)
    pull = stiffness * (stiffness * places).sum(-2, keepdim=True) - stiffness * stiffness.sum(-2, keepdim=True) * places
    return torch.cat([momenta / masses, pull, 0 * masses, 0 * stiffness], dim=-1)


def systems(count: int, seed: int) -> Tensor:
    """Systems at time 0: masses from 0.1 to 3.1, stiffnesses from 0 to 5, Gaussian places and momenta.

    Args:
        count: How many.
        seed: Seed.

    Returns:
        States (count, 6, 6), float64: (x, y, px, py, mass, stiffness) of each body.
    """
    source = torch.Generator().manual_seed(seed)
    places, momenta = torch.randn(2, count, BODIES, 2, dtype=torch.float64, generator=source)
    constants = torch.rand(count, BODIES, 2, dtype=torch.float64, generator=source)
    return torch.cat([0.4 * places, 0.6 * momenta, 0.1 + 3 * constants[..., :1], 5 * constants[..., 1:]], dim=-1)


def trajectories(states: Tensor, steps: int, step: float = STEP) -> Tensor:
    """Where systems go. The springs are linear, so that a matrix exponential takes a step of any length exactly.

    Args:
        states: (B, n, 6).
        steps: How many steps.
        step: Time between two states.

    Returns:
        (B, steps + 1, n, 6), with the states themselves first.
    """
    masses, stiffness = states[..., 4], states[..., 5]
    pull = stiffness[:, :, None] * stiffness[:, None] - torch.diag_embed(stiffness * stiffness.sum(1, keepdim=True))
    none = torch.zeros_like(pull)
    generator = torch.cat([torch.cat([none, torch.diag_embed(1 / masses)], -1), torch.cat([pull, none], -1)], -2)
    once = torch.linalg.matrix_exp(step * generator)
    moving = [torch.cat([states[..., :2], states[..., 2:4]], dim=1)]  # (B, 2 n, 2): both axes by the same matrix
    for _ in range(steps):
        moving.append(once @ moving[-1])
    places, momenta = torch.stack(moving, dim=1).chunk(2, dim=2)
    constants = states[:, None, :, 4:].expand(*places.shape[:-1], 2)
    return torch.cat([places, momenta, constants], dim=-1)


def chunks(states: Tensor, each: int, steps: int, horizon: float, seed: int) -> Tensor:
    """Short pieces of trajectories, at random times of them.

    Args:
        states: Systems at time 0, (B, n, 6).
        each: How many pieces of each system.
        steps: Steps of each.
        horizon: Length of the trajectories.
        seed: Seed.

    Returns:
        (B · each, steps + 1, n, 6).
    """
    source = torch.Generator().manual_seed(seed)
    length = max(round(horizon / STEP), steps)
    whole = trajectories(states, length)
    start = torch.randint(length - steps + 1, (len(states), each, 1), generator=source)
    rows = torch.arange(len(states))[:, None, None]
    return whole[rows, start + torch.arange(steps + 1)].flatten(0, 1)


def rollout(model: Callable[[Tensor], Tensor], states: Tensor, times: Tensor, **options: Any) -> Tensor:
    """The states at given times along a model's flow, by torchdiffeq: (T, B, n, 6)."""
    return odeint(lambda _, z: model(z), states, times, **options)


def rollouts(model: Callable[[Tensor], Tensor], states: Tensor, times: Tensor) -> Tensor:
    """The states at given times, with adaptive steps: (T, B, n, 6); NaN of a system that cannot be followed."""
    most = {"max_num_steps": 20}  # of each interval: one or two are enough where nothing runs away
    try:
        return rollout(model, states, times, method="dopri5", rtol=1e-6, atol=1e-8, options=most)
    except AssertionError:  # torchdiffeq's word for a step that becomes too small, or too many of them
        if len(states) == 1:
            return states.new_full((len(times), *states.shape), math.nan)
        halves = states.split((len(states) + 1) // 2)  # the others have the same step, and are not to be lost with it
        return torch.cat([rollouts(model, half, times) for half in halves], dim=1)


class Learner(Rates):
    """Trains rates of change, so that short rollouts follow the data."""

    def loss(self, pieces: Tensor) -> Tensor:
        """Mean squared error of rollouts by RK4; 1 = as if nothing moved."""
        times = STEP * torch.arange(pieces.shape[1], dtype=pieces.dtype, device=pieces.device)
        found = rollout(self, pieces[:, 0], times, method="rk4")[1:].transpose(0, 1)
        return ((found - pieces[:, 1:])[..., :4] / self.scale).square().mean()


def spread_of_changes(pieces: Tensor) -> Tensor:
    """Root mean square changes of x, y, px and py from the first state of chunks to each later one."""
    change = (pieces[:, 1:] - pieces[:, :1])[..., :4].square().mean((0, 1, 2)).sqrt()
    return change.reshape(2, 2).mean(1).repeat_interleave(2)  # one for both axes: neither is singled out


def build(name: str, pieces: Tensor) -> nn.Module:
    """Fresh dynamics of a name, in units that the training data sets.

    Args:
        name: One of ``MODELS``.
        pieces: The training data.

    Returns:
        The network, float64.
    """
    potential = MODELS[name]
    if potential is None:
        velocity = (pieces[..., 2:4] / pieces[..., 4:5]).square().mean().sqrt().item()
        force = ((pieces[:, 1] - pieces[:, 0])[..., 2:4] / STEP).square().mean().sqrt().item()
        return VectorField(BODIES, (velocity, force)).double()
    kinetic = (pieces[..., 2:4].square() / (2 * pieces[..., 4:5])).sum((-1, -2))
    return Hamiltonian(potential(BODIES), kinetic.std().item()).double()


@dataclass
class Result:
    """What is known of a trained network.

    Args:
        run: The monitor's curves.
        drift: By quantity the root mean square change along rollouts that do not run away, in standard deviations of
            the quantity over the states that are measured, at each of the times.
        times: These.
        rates_error: Norm of the error of rates of change, of their own norm.
        rollout_error: Relative error of rollouts, a geometric mean over times and systems.
        runaways: Part of the rollouts that run away.
        noether: The largest difference between an asymmetry of H and the change of its partner, of the former; NaN
            without H.
        equivariance: Final relative errors of H, or of the field, by generator.
        conservation: Final conservation errors by quantity.
    """

    run: Run
    drift: dict[str, list[float]]
    times: list[float]
    rates_error: float
    rollout_error: float
    runaways: float
    noether: float
    equivariance: dict[str, float]
    conservation: dict[str, float]


def noether(model: Learner, states: Tensor) -> float:
    """How far dJ/dt along the flow is from -L_X H, of the larger of the two; NaN where both are rounding."""
    asymmetry = lm.lie_derivative(model, states, GENERATORS, function="hamiltonian", input_representation=STATES)
    along = lm.functional.conservation_error(model, states, QUANTITIES)
    found = []
    for name, generator in PARTNER.items():
        one = (asymmetry[generator].detach().square().mean().sqrt() / QUANTITIES[name](states).std()).item()
        if one > ROUNDING:
            found.append(abs(along[name].item() - one) / one)
    return max(found, default=math.nan)


def judged(model: Learner, run: Run, states: Tensor, horizon: float) -> Result:
    """Rolls a trained network out, and gathers what is known of it.

    Args:
        model: The network.
        run: Its curves.
        states: Those that the monitor measured: rollouts begin there, so that nothing but time is between both drifts.
        horizon: How long.

    Returns:
        The result.
    """
    steps = round(horizon / STEP)
    times = STEP * torch.arange(steps + 1, dtype=torch.float64)
    true = trajectories(states, steps).transpose(0, 1)
    with torch.no_grad():
        found = rollouts(model, states, times)
        wrong = (model(states) - true_rates(states)).norm() / true_rates(states).norm()
        gap, sizes, true_sizes = (part[1:, ..., :4].flatten(2).norm(dim=-1) for part in (found - true, found, true))
        relative = (gap / (sizes + true_sizes)).nan_to_num(1.0)  # as of one that is infinitely far away
        # One that leaves the data for places where the network was never told anything would outweigh all others.
        bounded = sizes.amax(0) < RUNAWAY * true_sizes.amax(0)
        kept = found[:, bounded]
    rows = [min(round(one / STEP), steps) for one in (*(h for h in HORIZONS if h < horizon), horizon)]
    drift = {
        name: [((q(kept[row]) - q(kept[0])).square().mean().sqrt() / q(states).std()).item() for row in rows]
        for name, q in QUANTITIES.items()
    }
    finals = (last(run, "equivariance", GENERATORS), last(run, "equivariance_conservation", tuple(QUANTITIES)))
    exact = noether(model, states) if isinstance(model.dynamics, Hamiltonian) else math.nan
    accuracy = relative.clamp(min=1e-300).log().mean().exp().item()
    lost = 1 - bounded.double().mean().item()
    return Result(run, drift, [STEP * row for row in rows], wrong.item(), accuracy, lost, exact, *finals)


def train(task: tuple[str, int], options: argparse.Namespace) -> Result:
    """Trains one network under the monitor, and rolls it out.

    Args:
        task: One of ``MODELS``, and the seed of initial weights and of the order of batches; systems are the same for
            all.
        options: The command line.

    Returns:
        What is known of it.
    """
    name, seed = task
    seed_everything(seed, verbose=False)
    pieces = chunks(systems(options.systems, 0), options.chunks, options.steps, options.horizon, 2)
    unseen = chunks(systems(options.test_systems, 1), 1, options.steps, options.horizon, 3)
    settings = {"model": name, "seed": seed, "epochs": options.epochs}
    model = Learner(build(name, pieces), spread_of_changes(pieces), options.learning_rate, settings)
    loaders = (
        DataLoader(
            TensorDataset(pieces), options.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)
        ),
        DataLoader(TensorDataset(unseen), options.batch_size),
    )
    energetic = isinstance(model.dynamics, Hamiltonian)
    monitor = lm.EquivarianceMonitor(
        GENERATORS,
        num_images=len(unseen),
        measures=("relative",),
        images=lambda batch: batch[0][:, 0],
        function="hamiltonian" if energetic else None,
        input_representation=STATES,
        output_representation=None if energetic else RATES,
        metrics={"conservation": lm.ConservationError(QUANTITIES, function="forward")},
        on_error="raise",
    )
    folder = options.out / "springs" / f"{name.replace(' ', '_')}-s{seed}"
    run = fit(model, loaders, folder, options.epochs, [monitor], gradient_clip_val=1.0)
    return judged(model.eval(), run, unseen[:, 0], options.horizon)


cell = partial(mean_cell, rounding=ROUNDING)


def table(results: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """Rows of text: errors of H, of conservation, drifts, and errors of the dynamics."""
    horizon = next(iter(results.values()))[0].times[-1]
    rows = [
        [
            "model",
            "H: translation_x",
            "H: rotation",
            *(f"d/dt {name}" for name in QUANTITIES if name != "py"),
            *(f"drift of {name} in {horizon:g} s" for name in QUANTITIES if name != "py"),
            "error of rates",
            "of rollouts",
            "run away",
        ]
    ]
    for name, found in results.items():
        rows.append([f"{name}*" if MODELS[name] is None else name])
        rows[-1] += [cell([one.equivariance[g] for one in found]) for g in ("translation_x", "rotation")]
        rows[-1] += [cell([one.conservation[q] for one in found]) for q in QUANTITIES if q != "py"]
        rows[-1] += [cell([one.drift[q][-1] for one in found]) for q in QUANTITIES if q != "py"]
        rows[-1] += [cell([one.rates_error for one in found]), cell([one.rollout_error for one in found])]
        rows[-1].append(f"{100 * fmean(one.runaways for one in found):.2g} %")
    return rows


def fitted(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Correlation and least squares slope of the logarithms; NaN for fewer than three pairs."""
    if len(pairs) < 3:
        return math.nan, math.nan
    x, y = torch.tensor(pairs, dtype=torch.float64).log().T
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).item(), (x @ y / (x @ x)).item()


def predictions(
    results: Mapping[str, Sequence[Result]], at: int, quantities: Sequence[str] = tuple(PARTNER)
) -> list[tuple[float, float]]:
    """Pairs of predicted and measured drift at one of the times, of all trainings, where it is more than rounding."""
    return [
        (one.conservation[name] * one.times[at], one.drift[name][at])
        for found in results.values()
        for one in found
        for name in quantities
        if one.conservation[name] > ROUNDING and 0 < one.drift[name][at] < math.inf
    ]


def prediction_table(results: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """Rows of text: at each time how predicted and measured drifts go together."""
    rows = [["after", "pairs", "correlation", "slope", "measured / predicted", "range", "of energy"]]
    for at, when in enumerate(next(iter(results.values()))[0].times):
        pairs = predictions(results, at)
        correlation, slope = fitted(pairs)
        ratios = sorted(y / x for x, y in pairs) or [math.nan]
        of_energy = [y / x for x, y in predictions(results, at, ("energy",))] or [math.nan]
        rows.append([f"{when:g} s", str(len(pairs)), f"{correlation:.3f}", f"{slope:.2f}", f"{median(ratios):.2g}"])
        rows[-1] += [f"{ratios[0]:.2g} to {ratios[-1]:.2g}", f"{median(of_energy):.2g}"]
    return rows


def exact_throughout(results: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, float]]:
    """By model the generators whose error was rounding in every epoch of every seed, with its largest value."""
    largest = {
        name: {g: max(v for one in found for v in series(one.run, "equivariance", g)[1]) for g in GENERATORS}
        for name, found in results.items()
    }
    return {name: {g: v for g, v in values.items() if v < ROUNDING} for name, values in largest.items()}


def sentence(results: Mapping[str, Sequence[Result]]) -> str:
    """What the numbers show, in words that follow from them."""
    exact = exact_throughout(results)
    energies = [name for name in results if MODELS[name] is not None]
    parts = []
    kept = [
        f"{name} ({', '.join(f'{g} ≤ {v:.0e}' if v else f'{g} 0' for g, v in exact[name].items())})"
        for name in energies
        if exact[name]
    ]
    free = [name for name in energies if not exact[name]]
    parts.append(
        f"Exact before, during and after training: the energy of {listed(kept)}; of no generator: {listed(free)}"
    )
    broken = []
    for name in energies:
        for quantity, generator in PARTNER.items():
            rate = max(one.conservation[quantity] for one in results[name])
            if (generator in exact[name]) != (rate < ROUNDING):
                broken.append(f"{name}, {quantity}")
    worst = max((one.noether for found in results.values() for one in found if one.noether == one.noether), default=0)
    parts.append(
        f"The quantities that these symmetries promise, and no others, are constant along the learned flow: "
        f"{'in every case' if not broken else 'not for ' + '; '.join(broken)}; where a symmetry is broken, dJ/dt and "
        f"the Lie derivative of H agree to {worst:.0e} of their size"
    )
    still = [
        one.drift[q][-1] for found in results.values() for one in found for q in PARTNER
        if one.conservation[q] < ROUNDING and math.isfinite(one.drift[q][-1])
    ]  # fmt: skip
    if still:
        parts.append(
            f"Of {len(still)} momenta that do not change along the flow the largest drift of a rollout is "
            f"{max(still):.0e} standard deviations, which is the integrator's; the median is {median(still):.0e}"
        )
    at = [predictions(results, k) for k in (0, -1)]
    (r0, s0), (r1, s1) = (fitted(pairs) for pairs in at)
    times = next(iter(results.values()))[0].times
    if r0 == r0:
        ratios = [median(y / x for x, y in pairs) for pairs in at]
        parts.append(
            f"Where something drifts, the rate that is logged predicts the drift after {times[0]:g} s (correlation of "
            f"logarithms {r0:.3f}, slope {s0:.2f}, measured/predicted {ratios[0]:.2f}); with that "
            f"after {times[-1]:g} s it has a correlation of {r1:.3f} and a slope of {s1:.2f}, and what drifted is "
            f"{ratios[1]:.2g} of what a constant rate would give"
        )
    if "neural ODE" in results:
        found = results["neural ODE"]
        rates = [fmean(one.conservation[q] for one in found) for q in ("px", "spin", "energy")]
        parts.append(
            "The neural ODE has no energy: its px, spin and energy change by {:.2g}, {:.2g} and {:.2g} standard "
            "deviations a second".format(*rates)
        )
    seeds = len(next(iter(results.values())))
    best = min(results, key=lambda name: fmean(one.rates_error for one in results[name]))
    first = sum(min(results, key=lambda name: results[name][k].rates_error) == best for k in range(seeds))
    parts.append(
        f"The error of rates of change on unseen systems is smallest for {best} on the mean, and in {first} of {seeds} "
        "seeds"
    )
    return ".\n".join(parts) + "."


def picture(results: Mapping[str, Sequence[Result]]) -> Any:
    """Curves of two symmetries of H over epochs, and drifts against their predictions.

    Args:
        results: By model those of all seeds.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    lowest = 1e-3
    # Zero has no logarithm: what is exact stands in a grey band, each network on a line of its own.
    levels = {name: lowest * 10 ** (-0.15 * (k + 1)) for k, name in enumerate(results)}
    bottom = lowest * 10 ** (-0.15 * (len(results) + 1))
    for axis, generator, unit in zip(panels, ("translation_x", "rotation"), ("unit of length", "radian"), strict=False):
        for name, found in results.items():
            epochs = series(found[0].run, "equivariance", generator)[0]
            values = torch.tensor([series(one.run, "equivariance", generator)[1] for one in found])
            values = torch.where(values < ROUNDING, levels[name], values.clamp(min=lowest))
            axis.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.25, linewidth=0)
            style = "--" if MODELS[name] is None else "-"
            axis.plot(epochs, values.log().mean(0).exp(), style, color=COLOURS[name], label=name, linewidth=2)
        axis.axhspan(bottom, lowest, color="0.92", linewidth=0, zorder=0)
        axis.set(yscale="log", ylim=(bottom, 5), xlabel="epoch", title=f"{generator} of H (dashed: of the field)")
        axis.set_yticks([lowest * math.sqrt(bottom / lowest), 1e-3, 1e-2, 1e-1, 1], ["0", "0.001", "0.01", "0.1", "1"])
        axis.minorticks_off()
        axis.set_ylabel(f"relative error / {unit}")
    panels[0].legend(fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.34))
    axis, times = panels[2], next(iter(results.values()))[0].times
    for name, found in results.items():
        for quantity, mark in MARKS.items():
            for at, size in ((0, 3), (-1, 6)):
                pairs = predictions({name: found}, at, (quantity,))
                if pairs:
                    axis.plot(*zip(*pairs, strict=True), mark, color=COLOURS[name], markersize=size, alpha=0.8)
    ends = [value for at in (0, -1) for pair in predictions(results, at, tuple(QUANTITIES)) for value in pair]
    low, high = min(ends, default=1.0) / 3, 3 * max(ends, default=1.0)
    axis.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    handles = [axis.plot([], [], mark, color="0.3", label=quantity)[0] for quantity, mark in MARKS.items()]
    axis.legend(handles=handles, fontsize=9, loc="lower right")
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), ylabel="measured drift / std")
    axis.set(xlabel="predicted: rate × time / std", title=f"Drift after {times[0]:g} s (small) and {times[-1]:g} s")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=list(DEFAULT), choices=list(MODELS), metavar="MODEL", help=listed(list(MODELS)))
    add("--systems", type=int, default=400, help="systems to train on")
    add("--test-systems", type=int, default=100, help="systems to measure and to roll out, a state of each")
    add("--chunks", type=int, default=8, help="chunks of each training system")
    add("--steps", type=int, default=2, help=f"steps of {STEP} s in a chunk")
    add("--learning-rate", type=float, default=5e-3)
    add("--horizon", type=float, default=5.0, help="length of trajectories and rollouts in seconds")
    add_common(add, epochs=8, batch_size=100)
    options = parser.parse_args(argv)
    at_least(parser, options, systems=2, test_systems=2, chunks=1, steps=1)
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive, got {options.learning_rate}")
    if not STEP <= options.horizon < math.inf or options.horizon < options.steps * STEP - 1e-9:
        parser.error(
            f"--horizon must be finite and hold a chunk of {options.steps} steps of {STEP} s, got {options.horizon}"
        )
    if len(set(options.models)) < len(options.models):
        parser.error(f"--models must name each network once, got {' '.join(options.models)}")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """Trains, rolls out, prints, and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        By model the results of all seeds.
    """
    options = parse(argv)
    folder, started = begin(options, "springs")
    results = over_seeds(
        train,
        options.models,
        options,
        lambda one: (
            f"error of rates {one.rates_error:.3f}, drift of px {one.drift['px'][-1]:.1e}, spin "
            f"{one.drift['spin'][-1]:.1e}"
        ),
    )
    rows, along = table(results), prediction_table(results)
    over = of_seeds(options.seeds)
    caption = (
        f"H: relative Lie derivative of the learned energy, in its standard deviations per unit of t (*: of the field, "
        f"there is no H); d/dt: conservation errors, in standard deviations of the quantity per second; energy is the "
        f"true one. {options.test_systems} states, one of each unseen system, {over}.\nDrift: root mean square, in the "
        f"same standard deviations; dopri5 adds its own, some 1e-5 to spin. Errors: of rates, norm of the error over "
        f"norm; of rollouts, |z - z'| / (|z| + |z'|), geometric mean over {options.horizon:g} s. Rollouts that get "
        f"{RUNAWAY:g} times as far from the origin as the true ones run away, and are left out of the drifts."
    )
    explained = (
        "Predicted drift is the logged rate times the time; pairs are of every network, seed and momentum (px, py, "
        "spin) above rounding, correlation and slope of logarithms. Of energy the median of measured / predicted."
    )
    text = "\n\n".join([show(rows), caption, show(along), explained, sentence(results)])
    write(folder, rows, text, {"conserve_momentum.png": picture(results)}, started)
    return results


if __name__ == "__main__":
    main()
