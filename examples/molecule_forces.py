"""What does it cost to build a symmetry in, to show it, or to ask for it? Energies and forces of small molecules.

    python examples/molecule_forces.py

displaces the atoms of small organic molecules at random (those of ASE's G2 set, in the orientations that it has them
in), has tblite compute energies and forces (GFN2-xTB), and trains eight networks on some of the molecules. Two see
distances alone, so that rotations are built in. Six are told directions too, which is all the difference; of these two
are left to themselves, two see every molecule turned at random, and two have Lie derivatives in their loss
(`lie_metric.equivariance_penalty`). Of each kind one has forces that are gradients of its energy, and one reads them
off directly. `EquivarianceMonitor` watches how far energies and forces of unseen molecules are from turning with them.
It prints a table and what it says, writes one picture, and leaves a TensorBoard run for each training.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lie_metric as lm
from lie_metric.representations import Invariant, Masked, Points, Vectors
from lie_metric.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from networks import AtomNetwork, GradientForces, PairForces
from trainings import (
    LEVEL,
    OneCycle,
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

Molecules = Mapping[str, Tensor]

ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8}
ATOMS = 9
"""The largest molecules."""
PLACES = {"pos": Masked(Points(3), "mask")}
"""What moves of a batch; atomic numbers, energies and forces in it do not."""
OUTPUTS = {"energy": Invariant(), "forces": Masked(Vectors(3), "mask")}
ROTATIONS = ("rotation_x", "rotation_y", "rotation_z")
TRANSLATIONS = ("translation_x", "translation_y", "translation_z")
FAR = [
    lm.orbits.uniform("rotation", math.pi / math.sqrt(3), 2, "turn", dimension=3),
    *lm.orbits.matrices({"mirror": -torch.eye(3)}),
]
MOVES = ("turn", "mirror")
"""Turns about any axis by any angle up to a half, and the inversion, which no rotation is."""
ENERGY_WEIGHT = 0.1
"""Of the energy's error in the loss: it is one number of a molecule, forces are 3 n."""
ROUNDING = 1e-9
"""Errors below it are of rounding, in float64."""


Forces = Callable[[AtomNetwork, float], nn.Module]


class Setting(NamedTuple):
    """How a network is made and trained.

    Attributes:
        forces: Where its forces are from.
        directions: Whether it sees them.
        turned: Whether training molecules are turned at random.
        penalised: Whether Lie derivatives are in the loss.
    """

    forces: Forces
    directions: bool = True
    turned: bool = False
    penalised: bool = False


MODELS = {
    "invariant": Setting(GradientForces, directions=False),
    "free": Setting(GradientForces),
    "free + turns": Setting(GradientForces, turned=True),
    "free + penalty": Setting(GradientForces, penalised=True),
    "equivariant direct": Setting(PairForces, directions=False),
    "free direct": Setting(PairForces),
    "free direct + turns": Setting(PairForces, turned=True),
    "free direct + penalty": Setting(PairForces, penalised=True),
}
COLOURS = dict(zip(MODELS, 2 * ("#D55E00", "#0072B2", "#56B4E9", "#009E73"), strict=True))
BUILT_IN: dict[Forces, str] = {GradientForces: "invariant", PairForces: "equivariant direct"}
FREE: dict[Forces, str] = {GradientForces: "free", PairForces: "free direct"}
"""Of each kind of forces the network with nothing done about its symmetry."""


def molecules() -> dict[str, Any]:
    """Those of ASE's G2 set that are neither radicals nor large, and of hydrogen, carbon, nitrogen and oxygen alone."""
    from ase.collections import g2

    found = {name: g2[name] for name in sorted(g2.names)}
    return {
        name: one
        for name, one in found.items()
        if set(one.get_chemical_symbols()) <= set(ELEMENTS) and 3 <= len(one) <= ATOMS
        # Open shells need more than tight binding gives.
        if one.numbers.sum() % 2 == 0 and not one.get_initial_magnetic_moments().any()
    }


def computed(numbers: Any, places: Any) -> tuple[float, Any]:
    """Energy in eV and forces in eV/angstrom by GFN2-xTB."""
    from ase.units import Bohr, Hartree
    from tblite.interface import Calculator

    calculator = Calculator("GFN2-xTB", numbers, places / Bohr)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.01)  # forces are those of a converged density alone: 4e-5 eV of torque without it
    found = calculator.singlepoint()
    return found.get("energy") * Hartree, -found.get("gradient") * Hartree / Bohr


def configurations(names: Sequence[str], each: int, displacement: float, seed: int) -> dict[str, Tensor]:
    """Molecules with their atoms displaced at random, about the mean of their places.

    Args:
        names: Some of :func:`molecules`.
        each: How many of each.
        displacement: Standard deviation along each axis, in angstrom.
        seed: Seed.

    Returns:
        ``pos`` and ``forces`` (B, N, 3), ``energy`` (B,), ``numbers`` and ``mask`` (B, N); zeros where no atom is.
    """
    known, source = molecules(), np.random.default_rng(seed)
    count = len(names) * each
    found = {
        "pos": torch.zeros(count, ATOMS, 3, dtype=torch.float64),
        "numbers": torch.zeros(count, ATOMS, dtype=torch.long),
        "mask": torch.zeros(count, ATOMS, dtype=torch.bool),
        "energy": torch.zeros(count, dtype=torch.float64),
        "forces": torch.zeros(count, ATOMS, 3, dtype=torch.float64),
    }
    for row, name in enumerate(name for name in names for _ in range(each)):
        numbers, rest = known[name].numbers, known[name].positions
        places = rest + displacement * source.standard_normal(rest.shape)
        places = places - places.mean(0)
        energy, forces = computed(numbers, places)
        atoms = len(numbers)
        found["pos"][row, :atoms], found["forces"][row, :atoms] = torch.tensor(places), torch.tensor(forces)
        found["numbers"][row, :atoms], found["mask"][row, :atoms] = torch.tensor(numbers), True
        found["energy"][row] = energy
    return found


def counts(batch: Molecules) -> Tensor:
    """How many atoms of each element there are, (B, elements)."""
    return torch.stack([(batch["numbers"] == number).sum(1) for number in ELEMENTS.values()], dim=1).double()


@lru_cache
def data(
    each: int, test_each: int, held_out: int, displacement: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Configurations to train on, and those of molecules that are held out.

    Energies are less a sum over atoms of a number for each element, fitted to the training data: composition would be
    nearly all of them, and a relative error of nothing but composition looks small.

    Args:
        each: Configurations of each training molecule.
        test_each: Of each that is held out.
        held_out: How many molecules are.
        displacement: As in :func:`configurations`.
        seed: Which are held out, and how all are displaced.

    Returns:
        Both.
    """
    names = list(molecules())
    order = np.random.default_rng(seed).permutation(len(names))
    unseen, seen = ([names[k] for k in sorted(part)] for part in (order[:held_out], order[held_out:]))
    known = configurations(seen, each, displacement, 2 * seed)
    test = configurations(unseen, test_each, displacement, 2 * seed + 1)
    # Of linearly dependent counts the least numbers: two molecules have no energies of four elements.
    of_atoms = torch.linalg.lstsq(counts(known), known["energy"][:, None], driver="gelsd").solution[:, 0]
    for part in (known, test):
        part["energy"] = part["energy"] - counts(part) @ of_atoms
    return known, test


class Rows(Dataset):
    """Samples of a batch, one by one.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Molecules) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["pos"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: tensor[row] for name, tensor in self.batch.items()}


def random_rotations(count: int, source: torch.Generator | None = None) -> Tensor:
    """Rotations that are uniform over SO(3), (count, 3, 3): of unit quaternions, which are uniform on their sphere."""
    quaternions = torch.randn(count, 4, dtype=torch.float64, generator=source)
    a, b, c, d = (quaternions / quaternions.norm(dim=1, keepdim=True)).T
    rows = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def turned(batch: Molecules, source: torch.Generator | None = None) -> dict[str, Tensor]:
    """Every molecule turned at random, and its forces with it."""
    rotations = random_rotations(len(batch["pos"]), source).to(batch["pos"])
    return {**batch, **{name: batch[name] @ rotations.mT for name in ("pos", "forces")}}


def random_rotation_generator() -> lm.Generator:
    """Rotation about an axis that is uniform over all: the mean of its squared errors is that of three axes."""
    x, y, z = nn.functional.normalize(torch.randn(3), dim=0).tolist()
    return lm.Generator("rotation", ((0, -z, y, 0), (z, 0, -x, 0), (-y, x, 0, 0)))


class Learner(OneCycle):
    """Trains energies and forces.

    Args:
        network: From molecules to both.
        scales: Standard deviation of energies and root mean square of forces in the training data.
        learning_rate: Peak learning rate.
        turning: Whether molecules are turned at random.
        penalty: Weight of the squared relative Lie derivative in the loss.
        penalised: Of how many molecules of a batch, and of none if there is no weight.
        settings: What tells the run from others.
    """

    def __init__(
        self,
        network: nn.Module,
        scales: tuple[float, float],
        learning_rate: float,
        turning: bool = False,
        penalty: float = 0.0,
        penalised: int = 8,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(learning_rate, settings)
        self.network, self.scales = network, scales
        self.turning, self.penalty, self.penalised = turning, penalty, penalised
        self.seconds = 0.0

    def forward(self, batch: Molecules) -> dict[str, Tensor]:
        """Energies (B,) and forces (B, N, 3)."""
        return self.network(batch)

    def energy(self, batch: Molecules) -> Tensor:
        """Energies (B,) alone."""
        return self.network.energy(batch)

    def loss(self, batch: Molecules) -> Tensor:
        """Mean squared errors in units of the data's spread; 1 + ENERGY_WEIGHT = as if nothing were known."""
        found = self(batch)
        energy, force = self.scales
        wrong = ((found["forces"] - batch["forces"])[batch["mask"]] / force).square().mean()
        return wrong + ENERGY_WEIGHT * ((found["energy"] - batch["energy"]) / energy).square().mean()

    def training_step(self, batch: Molecules, batch_idx: int) -> Tensor:
        """The loss, of turned molecules and with a penalty where that is asked for."""
        loss = self.loss(turned(batch) if self.turning else batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["pos"]))
        if self.penalty and len(batch["pos"]) > 1:  # a spread takes two
            some = {name: tensor[: self.penalised] for name, tensor in batch.items()}
            # Double backward needs least time for one generator, and one at random stands for all.
            loss = loss + self.penalty * lm.equivariance_penalty(
                self,
                some,
                random_rotation_generator(),
                input_representation=PLACES,
                output_representation=OUTPUTS,
                method="double_backward",
            )
        return loss

    def on_train_batch_start(self, batch: Molecules, batch_idx: int) -> None:
        """Looks at the clock: what a step costs, without what watches it."""
        self.seconds -= time.process_time()

    def on_train_batch_end(self, outputs: Any, batch: Molecules, batch_idx: int) -> None:
        """Looks again."""
        self.seconds += time.process_time()

    def validation_step(self, batch: Molecules, batch_idx: int) -> None:
        """Logs the mean length of the error of forces on molecules that are not trained on."""
        wrong = (self(batch)["forces"] - batch["forces"])[batch["mask"]].norm(dim=-1).mean()
        self.log("val_force_error", wrong, batch_size=len(batch["pos"]))


@dataclass
class Result:
    """What is known of a trained network.

    Args:
        run: The monitor's curves.
        energy_error: Mean absolute error of energies of unseen molecules, in eV.
        force_error: Mean length of the error of forces, in eV/angstrom.
        turned_energy_error: The former of the same molecules turned at random.
        turned_force_error: The latter.
        net_force: Root mean square over molecules of the sum of forces, in eV/angstrom.
        net_torque: That of the sum of torques about the mean of places, in eV/rad.
        curl: How far the Jacobian of forces is from symmetric, see :func:`curl`.
        noether: Largest difference between the Lie derivative of the energy and the torque against it, of the former's
            largest value; NaN where forces are no gradient or the energy is invariant.
        seconds: CPU seconds of training steps.
        nothing: Both errors, of energies and of forces, if all were zero.
    """

    run: Run
    energy_error: float
    force_error: float
    turned_energy_error: float
    turned_force_error: float
    net_force: float
    net_torque: float
    curl: float
    noether: float
    seconds: float
    nothing: tuple[float, float]


def rms(values: Sequence[float]) -> float:
    """The root mean square."""
    return math.sqrt(fmean(value * value for value in values))


def error(one: Result, part: str, at: int = -1) -> float:
    """Relative error of energy or forces under rotation, root mean square over three axes, at a measured epoch."""
    return rms([series(one.run, f"equivariance_{part}", name)[1][at] for name in ROTATIONS])


def size(one: Result, part: str) -> float:
    """Final root mean square Lie derivative over three axes: eV/rad, or eV/angstrom/rad of a component of a force."""
    return math.sqrt(fmean(last(one.run, f"equivariance_{part}_lee", ROTATIONS).values()))


def torques(batch: Molecules, forces: Tensor) -> Tensor:
    """Σ r × F of each molecule, (B, 3)."""
    return torch.linalg.cross(batch["pos"], forces).sum(1)


def curl(model: Callable[[Molecules], Mapping[str, Tensor]], batch: Molecules) -> float:
    r"""How far the Jacobian J of forces is from symmetric, as that of a gradient is (Bigi, Langer & Ceriotti 2024).

    .. math:: \lambda = \| (J - J^T) / 2 \|_F / \|J\|_F

    0 for a gradient, √½ if J and its transpose have nothing to do with each other, 1 for a pure curl. Both norms are
    means over molecules of u · J v with random u and v, whose square has the mean ‖J‖².

    Args:
        model: From molecules to forces.
        batch: The molecules.

    Returns:
        A number.
    """
    source, there = torch.Generator().manual_seed(0), batch["mask"][..., None]
    u, v = (torch.randn(batch["pos"].shape, dtype=torch.float64, generator=source) * there for _ in range(2))

    def forces(pos: Tensor) -> Tensor:
        return model({**batch, "pos": pos})["forces"]

    along = [torch.func.jvp(forces, (batch["pos"],), (one,))[1].detach() for one in (u, v)]
    a, b = ((one * change).sum((1, 2)) for one, change in zip((u, v), reversed(along), strict=True))
    return ((a - b).square().sum() / (2 * (a.square() + b.square()).sum())).sqrt().item()


def errors(model: Callable[[Molecules], Mapping[str, Tensor]], batch: Molecules) -> tuple[float, float]:
    """Mean absolute error of energies, mean length of that of forces."""
    found = model(batch)
    energy = (found["energy"] - batch["energy"]).abs().mean()
    return energy.item(), (found["forces"] - batch["forces"])[batch["mask"]].norm(dim=-1).mean().item()


def judged(model: Learner, run: Run, batch: Molecules) -> Result:
    """Gathers what is known of a trained network.

    Args:
        model: The network.
        run: Its curves.
        batch: Molecules that it was not trained on.

    Returns:
        The result.
    """
    again = {name: torch.cat([tensor] * 4) for name, tensor in batch.items()}
    with torch.no_grad():
        plain, other = errors(model, batch), errors(model, turned(again, torch.Generator().manual_seed(0)))
        forces = model(batch)["forces"]
        nothing = errors(lambda batch: {name: torch.zeros_like(batch[name]) for name in OUTPUTS}, batch)
    torque = torques(batch, forces)
    noether = math.nan
    if isinstance(model.network, GradientForces):
        changes = lm.lie_derivative(
            model, batch, ROTATIONS, output=lambda found: found["energy"], input_representation=PLACES,
            output_representation=Invariant(),
        )  # fmt: skip
        change = torch.stack([changes[name].detach() for name in ROTATIONS], dim=1)
        if change.abs().max() > ROUNDING:
            noether = ((torque + change).abs().max() / change.abs().max()).item()
    net = (one.square().sum(-1).mean().sqrt().item() for one in (forces.sum(1), torque))
    return Result(run, *plain, *other, *net, curl(model, batch), noether, model.seconds, nothing)


def measured_every(epochs: int) -> int:
    """Epochs between measurements: some six in all, and the last is one."""
    return next(step for step in range(max(1, epochs // 6), epochs + 1) if epochs % step == 0)


def train(task: tuple[str, int], options: argparse.Namespace) -> Result:
    """Trains one network under the monitor.

    Args:
        task: A name of ``MODELS``, and the seed: of initial weights, of the order of batches, and of which molecules
            are held out, alike for all networks.
        options: The command line.

    Returns:
        What is known of it.
    """
    name, seed = task
    setting = MODELS[name]
    known, unseen = data(
        options.configurations, options.test_configurations, options.test_molecules, options.displacement, seed
    )
    scales = (known["energy"].std().item(), known["forces"][known["mask"]].square().mean().sqrt().item())
    seed_everything(seed, verbose=False)
    network = setting.forces(AtomNetwork(setting.directions), scales[1]).double()
    model = Learner(
        network,
        scales,
        options.learning_rate,
        setting.turned,
        options.penalty * setting.penalised,
        settings={"model": name, "seed": seed, "epochs": options.epochs},
    )
    loaders = (
        DataLoader(Rows(known), options.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)),
        DataLoader(Rows(unseen), len(unseen["pos"])),
    )
    energies = lm.FiniteEquivarianceError(FAR, function="energy", output_representation=OUTPUTS["energy"])
    forces = lm.FiniteEquivarianceError(
        FAR, output=lambda found: found["forces"], output_representation=OUTPUTS["forces"]
    )
    monitor = lm.EquivarianceMonitor(
        (*TRANSLATIONS, *ROTATIONS),
        num_images=len(unseen["pos"]),
        every_n_epochs=measured_every(options.epochs),
        input_representation=PLACES,
        output_representation=OUTPUTS,
        metrics={"energy_moved": energies, "forces_moved": forces},
        on_error="raise",
    )
    folder = options.out / "molecules" / f"{name.replace(' + ', ' ').replace(' ', '_')}-s{seed}"
    run = fit(model, loaders, folder, options.epochs, [monitor], gradient_clip_val=5.0)
    return judged(model.eval(), run, unseen)


cell = partial(mean_cell, rounding=ROUNDING)


def table(results: Mapping[str, Sequence[Result]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of text: accuracy and cost; asymmetries."""
    accuracy = [["network", "energy / eV", "turned", "force / (eV/Å)", "turned", "training / CPU s"]]
    symmetry = [["network", "E / rad", "eV / rad", "F / rad", "eV/Å / rad", "E turned", "F turned", "E mirrored"]]
    symmetry[0] += ["F mirrored", "net force / (eV/Å)", "torque / eV", "curl"]
    for name, found in results.items():
        columns = [
            [one.energy_error, one.turned_energy_error, one.force_error, one.turned_force_error] for one in found
        ]
        accuracy.append([name, *(cell(values) for values in zip(*columns, strict=True))])
        accuracy[-1].append(cell([one.seconds for one in found]))
        columns = [
            [
                *(measure(one, part) for part in OUTPUTS for measure in (error, size)),
                *(last(one.run, f"equivariance_{part}_moved", (orbit,))[orbit] for orbit in MOVES for part in OUTPUTS),
                *(one.net_force, one.net_torque, one.curl),
            ]
            for one in found
        ]
        symmetry.append([name, *(cell(values) for values in zip(*columns, strict=True))])
    return accuracy, symmetry


def told(found: tuple[float, float, float]) -> str:
    """A ratio with its interval, if there is one."""
    forms = [
        f"{value:.2g}" if value < 0.0995 else f"{value:.2f}" if value < 9.95 else f"{value:.0f}" for value in found
    ]
    return f"{forms[0]} ({forms[1]} to {forms[2]})" if found[1] == found[1] else forms[0]


RATIOS: dict[str, tuple[Callable[[Result], float], dict[Forces, str]]] = {
    "rotation of E, / left alone": (partial(error, part="energy"), FREE),
    "of F": (partial(error, part="forces"), FREE),
    "training time": (lambda one: one.seconds, FREE),
    "error of forces, / built in": (lambda one: one.force_error, BUILT_IN),
    "of energies": (lambda one: one.energy_error, BUILT_IN),
}
"""What is compared with what, seed by seed."""


def ratios(results: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """For each of ``RATIOS`` those networks that have something to be compared with, with their ratio to it.

    Args:
        results: By model those of all seeds.

    Returns:
        Ratios with the ends of their intervals.
    """
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for key, (measure, bases) in RATIOS.items():
        found[key] = {}
        for name, ours in results.items():
            base = bases[MODELS[name].forces]
            # That of a built-in symmetry is none of the error that is left alone: it has no logarithm.
            if name != base and base in results and MODELS[name].directions:
                found[key][name] = ratio([measure(one) for one in ours], [measure(one) for one in results[base]])
    found["turned / as they are"] = {
        name: ratio([one.turned_force_error for one in ours], [one.force_error for one in ours])
        for name, ours in results.items()
        if MODELS[name].directions
    }
    return found


def ratio_table(results: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """Rows of text: of each network whose symmetry is not built in all its ratios."""
    columns = ratios(results)
    rows = [["network", *columns]]
    for name in results:
        if MODELS[name].directions:
            rows.append([name, *(told(column[name]) if name in column else "" for column in columns.values())])
    return rows


def exact(results: Mapping[str, Sequence[Result]], generators: Sequence[str]) -> dict[str, float]:
    """The networks whose energy and forces have errors of rounding alone, in every epoch of every seed; the largest."""
    largest = {
        name: max(
            value
            for one in found
            for part in OUTPUTS
            for generator in generators
            for value in series(one.run, f"equivariance_{part}", generator)[1]
        )
        for name, found in results.items()
    }
    return {name: value for name, value in largest.items() if value < ROUNDING}


def sorted_out(column: Mapping[str, tuple[float, float, float]]) -> str:
    """The names of a column by what their intervals say: an order only where they exclude equality."""
    less = [name for name, (_, _, high) in column.items() if high < 1]
    more = [name for name, (_, low, _) in column.items() if low > 1]
    rest = [name for name in column if name not in (*less, *more)]
    words = {"less for": less, "more for": more, "not told apart for": rest}
    return "; ".join(f"{word} {listed(names)}" for word, names in words.items() if names)


def sentence(results: Mapping[str, Sequence[Result]]) -> str:
    """What the numbers show, in words that follow from them."""
    parts = []
    for words, generators in (("translation", TRANSLATIONS), ("rotation", ROTATIONS)):
        kept = exact(results, generators)
        bound = max(kept.values(), default=0)
        amount = f" (at most {bound:.0e})" if bound else ""
        who = "all" if len(kept) == len(results) else listed(list(kept))
        parts.append(f"By {words} energies and forces are exact before, during and after training for {who}{amount}")
    names = {"energy": "energies", "forces": "forces"}
    for name in FREE.values():
        if name in results:
            grown = []
            for part, plural in names.items():
                found = ratio(
                    [error(one, part) for one in results[name]], [error(one, part, 0) for one in results[name]]
                )
                words = "grows" if found[1] > 1 else "falls" if found[2] < 1 else "is not told to change"
                grown.append(f"the rotation error of {plural} {words}, to {told(found)} of what it was")
            parts.append(f"As {name} is trained, {', '.join(grown)}")
    columns = ratios(results)
    opening = {
        "error of forces, / built in": "Against the network with the symmetry built in, the error of forces on "
        "unseen molecules is",
        "of energies": "That of energies is",
        "turned / as they are": "When the same molecules are turned, the error of forces is",
    }
    energies, turning, times = (columns[key] for key in list(RATIOS)[:3])
    for name in energies:
        both = (energies[name], turning[name])
        less, more = all(high < 1 for _, _, high in both), all(low > 1 for _, low, _ in both)
        parts.append(
            f"{name} is left with {'less' if less else 'more' if more else 'not clearly less'} rotation error than "
            f"{FREE[MODELS[name].forces]}: {told(both[0])} of that of energies, {told(both[1])} of forces, for "
            f"{told(times[name])} times the CPU time of training"
        )
    parts += [f"{words} {sorted_out(columns[key])}" for key, words in opening.items() if columns[key]]
    zero = {
        name: ratio([one.force_error for one in found], [one.nothing[1] for one in found])
        for name, found in results.items()
    }
    parts.append(f"Against forces of zero that error is {sorted_out(zero)}")
    for forces in FREE:
        pair = [name for name in results if MODELS[name].forces is forces and name in columns["of F"]]
        shown, asked = ([n for n in pair if getattr(MODELS[n], what)] for what in ("turned", "penalised"))
        if shown and asked:
            found = {
                plural: ratio(
                    [error(one, part) for one in results[asked[0]]], [error(one, part) for one in results[shown[0]]]
                )
                for part, plural in names.items()
            }
            parts.append(
                f"Of the rotation error of {shown[0]}, {asked[0]} has "
                + ", ".join(f"{told(one)} of {plural}" for plural, one in found.items())
            )
    noether = [one.noether for found in results.values() for one in found if one.noether == one.noether]
    if noether:
        parts.append(
            "Where forces are gradients, the torque on a molecule is the Lie derivative of its energy against the "
            f"rotation, to {max(noether):.0e} of its size"
        )
    direct = [name for name in results if MODELS[name].forces is PairForces]
    if direct:
        rotates = [name for name in direct if name in exact(results, ROTATIONS)]
        amounts = [
            f"{name} {fmean(one.net_torque for one in results[name]):.2g} eV and "
            f"{fmean(one.curl for one in results[name]):.2g}"
            + (" (though exact by rotation)" if name in rotates else "")
            for name in direct
        ]
        parts.append(f"Forces that are no gradients leave a torque on molecules and a curl: {', '.join(amounts)}")
    return ".\n".join(parts) + "."


def picture(results: Mapping[str, Sequence[Result]]) -> Any:
    """Rotation errors of energies and forces over epochs, and what they cost in accuracy.

    Args:
        results: By model those of all seeds.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    lowest, step = 1e-3, 0.3
    # Zero has no logarithm: what is exact stands in a grey band, each network on a line of its own.
    zero = {BUILT_IN[GradientForces]: lowest * 10**-step, BUILT_IN[PairForces]: lowest * 10 ** (-2 * step)}
    bottom = lowest * 10 ** (-3 * step)

    def drawn(name: str, values: Tensor) -> Tensor:
        return torch.where(values < ROUNDING, zero.get(name, lowest), values.clamp(min=lowest))

    for axis, part in zip(panels, OUTPUTS, strict=False):
        for name, found in results.items():
            epochs = series(found[0].run, f"equivariance_{part}", ROTATIONS[0])[0]
            values = drawn(name, torch.tensor([[error(one, part, k) for k in range(len(epochs))] for one in found]))
            style = "--" if MODELS[name].forces is PairForces else "-"
            axis.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.15, linewidth=0)
            axis.plot(epochs, values.log().mean(0).exp(), style, color=COLOURS[name], label=name, linewidth=2)
        axis.axhspan(bottom, lowest, color="0.92", linewidth=0, zorder=0)
        axis.set(yscale="log", ylim=(bottom, 2), xlabel="epoch", ylabel="relative error / radian")
        axis.set_yticks([lowest * 10 ** (-1.5 * step), 1e-3, 1e-2, 1e-1, 1], ["0", "0.001", "0.01", "0.1", "1"])
        axis.minorticks_off()
        axis.set_title({"energy": "Rotation error of energies", "forces": "Rotation error of forces"}[part])
    axis = panels[2]
    for name, found in results.items():
        across = drawn(name, torch.tensor([error(one, "forces") for one in found]))
        mark = "s" if MODELS[name].forces is PairForces else "o"
        axis.plot(across, [one.force_error for one in found], mark, color=COLOURS[name], markersize=7, alpha=0.8)
    axis.axvspan(bottom, lowest, color="0.92", linewidth=0, zorder=0)
    axis.set(xscale="log", xlim=(bottom, 2), xlabel="final rotation error of forces / radian")
    axis.set_xticks([lowest * 10 ** (-1.5 * step), 1e-2, 1e-1, 1], ["0", "0.01", "0.1", "1"])
    axis.minorticks_off()
    axis.set(ylabel="error of forces / (eV/Å)", title="Unseen molecules (squares: direct)")
    axis.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL", help="; ".join(MODELS))
    add("--configurations", type=int, default=16, help="of each molecule to train on")
    add("--test-molecules", type=int, default=10, help="molecules to hold out, others for each seed")
    add("--test-configurations", type=int, default=5, help="of each that is held out")
    add("--displacement", type=float, default=0.07, help="of atoms, standard deviation along each axis in angstrom")
    add("--penalty", type=float, default=1.0, help="weight of the mean squared relative Lie derivative in the loss")
    add("--learning-rate", type=float, default=5e-3)
    add_common(add, epochs=30, batch_size=32)
    options = parser.parse_args(argv)
    at_least(parser, options, configurations=1, test_molecules=2, test_configurations=1, batch_size=2)
    for name in ("displacement", "penalty", "learning_rate"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(options, name)}")
    if len(set(options.models)) < len(options.models):
        parser.error(f"--models must name each network once, got {'; '.join(options.models)}")
    for name in ("ase", "tblite"):
        if importlib.util.find_spec(name) is None:
            parser.error(f"{name} must be installed, for molecules and their forces: pip install ase tblite")
    count = len(molecules())
    if options.test_molecules > count // 2:
        parser.error(f"--test-molecules must be at most half of the {count} there are, got {options.test_molecules}")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """Trains, prints, and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        By model the results of all seeds.
    """
    options = parse(argv)
    folder, started = begin(options, "molecules")
    results = over_seeds(
        train,
        options.models,
        options,
        lambda one: (
            f"error of forces {one.force_error:.2f} eV/Å, by rotation {error(one, 'energy'):.1e} of energies, "
            f"{error(one, 'forces'):.1e} of forces"
        ),
    )
    accuracy, symmetry = table(results)
    over = of_seeds(options.seeds)
    nothing = zip(*(one.nothing for one in next(iter(results.values()))), strict=True)
    energy, force = (fmean(values) for values in nothing)
    first = (
        f"Mean absolute error of energies (less a linear fit to composition), mean length of the error of forces, on\n"
        f"{options.test_molecules} molecules that were not trained on, {options.test_configurations} configurations of "
        f"each, as the data set orients them and turned\nat random; {over}. Each seed holds others out. If both "
        f"were zero, errors would be {energy:.2g} eV\nand {force:.2g} eV/Å. Training time is without what watches it."
    )
    second = (
        "E, F: relative error of energies and forces by rotation, in their own spread per radian, and its size, of a\n"
        "component (root mean square over three axes). Turned, mirrored: what turning at random and inversion do, 1 =\n"
        "as another molecule. Sum of forces, and of torques, of a molecule (root mean square). Curl: 0 for gradients,\n"
        "1 for nothing else. Of the true forces all are 0."
    )
    third = (
        f"Ratios seed by seed, geometric means with {100 * LEVEL:g} % intervals over {options.seeds} seeds: of the "
        "error that is left alone,\nof the network with the symmetry built in, and of turned molecules to the same as "
        "they are."
        if options.seeds > 1
        else "Ratios of one seed: nothing is told apart."
    )
    blocks = (show(accuracy), first, show(symmetry), second, show(ratio_table(results)), third, sentence(results))
    text = "\n\n".join(blocks)
    rows = [one + other[1:] for one, other in zip(accuracy, symmetry, strict=True)]
    write(folder, rows, text, {"molecule_forces.png": picture(results)}, started)
    return results


if __name__ == "__main__":
    main()
