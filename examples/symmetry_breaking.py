"""When does giving up a symmetry help, and does the network then stay broken? One network on clouds of points.

    python examples/symmetry_breaking.py

makes clouds of points of six solids, upright or turned at random, and trains one convolutional network on them (after
Vadgama et al. 2025) with what its kernels and points are told changed: distances or differences or positions of two
points, coordinates as numbers or as vectors, a reference frame, a grid of orientations, random turns of the data.
`EquivarianceMonitor` watches how far each is from invariance to rotations and translations while it trains, and how
far those with a grid are from the finite rotations that permute it. A second task is to tell lengths, of which one
needs the frame: there the symmetry that the network breaks stands beside the one that the task breaks. It prints two
tables and what they say, writes one picture, and leaves a TensorBoard run for each training.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.representations import Invariant, Points, Vectors
from lie_metric.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from networks import GRIDS, CloudNetwork, design_strength, permutes
from trainings import (
    LEVEL,
    OneCycle,
    add_common,
    at_least,
    begin,
    cell,
    fit,
    interval,
    listed,
    of_seeds,
    over_seeds,
    series,
    show,
    write,
)

SOLIDS = ("ellipsoid", "box", "octahedron", "cylinder", "cone", "torus")
LENGTHS = ("longest", "height")
GENERATORS = ("translation_x", "rotation")
ROTATIONS = ("rotation_x", "rotation_y", "rotation_z")
ROUNDING = 1e-9
"""Errors below it are of rounding: networks are trained in single precision, and measured in double."""
NOISE = 0.04
FEW = 6
"""Which part of the shapes is left where there are few."""
VALIDATED = 5
"""Batches of unseen solids on which a loss is logged while training, and of which some are measured."""


def turn(axis: Sequence[float], angle: float) -> Tensor:
    """The rotation about an axis, right-handed."""
    x, y, z = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0).tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(angle * cross)


TURNS = {
    "third": torch.eye(3, dtype=torch.float64).roll(1, 0),  # about (1, 1, 1)
    "quarter": turn((0, 0, 1), math.pi / 2),
    "fifth": turn(GRIDS["icosahedron"][0].tolist(), 2 * math.pi / 5),
}
"""Finite rotations: the first permutes all grids, the second those of the cube, the last those of the icosahedron."""


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Args:
        network: What the network is told, arguments of ``CloudNetwork``.
        turned: Whether shapes are turned at random, anew in each epoch.
        few: Whether there are few shapes.
        task: "solids" or "lengths".
    """

    network: Mapping[str, Any] = field(default_factory=dict)
    turned: bool = False
    few: bool = False
    task: str = "solids"


DIFFERENCES = {"pairs": "differences"}
MAIN = {
    "distances": Variant(),
    "distances + xyz": Variant({"features": "scalars"}),
    "distances + frame": Variant({"features": "frame"}),
    "differences": Variant(DIFFERENCES),
    "positions": Variant({"pairs": "positions"}),
    "turned: distances + xyz": Variant({"features": "scalars"}, turned=True),
    "turned: differences": Variant(DIFFERENCES, turned=True),
    "icosahedron": Variant({"grid": "icosahedron"}),
    "icosahedron + xyz": Variant({"grid": "icosahedron", "features": "vectors"}),
}
SCARCE = {
    "few: distances": Variant(few=True),
    "few: differences": Variant(DIFFERENCES, few=True),
    "few: turned: differences": Variant(DIFFERENCES, turned=True, few=True),
}
ORIENTED = {name: Variant({"grid": name}) for name in GRIDS}
TOLD = {
    f"lengths: {name}": Variant(MAIN[name].network, turned=True, task="lengths")
    for name in ("distances", "distances + frame", "differences")
}
VARIANTS = {**MAIN, **SCARCE, **ORIENTED, **TOLD}
COLOURS = dict(
    zip(
        MAIN,
        ("#000000", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#E69F00", "#0072B2", "#009E73", "#D55E00"),
        strict=True,
    )
)


def solids(count: int, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Upright solids: points on their surfaces, stretched a little along the axes, with noise.

    Args:
        count: How many.
        points: Points of each.
        seed: Seed.

    Returns:
        Clouds (count, points, 3), float64, and numbers of ``SOLIDS`` (count,), one after the other.
    """
    source = torch.Generator().manual_seed(seed)

    def uniform(width: int) -> Tensor:
        return torch.rand(count, points, width, dtype=torch.float64, generator=source)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=source)

    direction, cube = normal(count, points, 3), 2 * uniform(3) - 1
    around, along = 2 * math.pi * uniform(1), 2 * math.pi * uniform(1)
    circle, height, radius = torch.cat([around.cos(), around.sin()], -1), cube[..., 2:], uniform(1).sqrt()
    face = (3 * uniform(1)).long() == torch.arange(3)
    side = uniform(1) < 2 / 3
    kinds = (
        direction / direction.norm(dim=-1, keepdim=True),
        0.8 * torch.where(face, cube.sign(), cube),
        1.3 * direction / direction.abs().sum(-1, keepdim=True),
        torch.cat(
            [0.85 * torch.where(side, circle, radius * circle), 0.9 * torch.where(side, height, height.sign())], -1
        ),
        torch.cat([circle * radius, 1.6 * (1 - radius) - 0.5], -1),
        torch.cat([circle * (0.85 + 0.35 * along.cos()), 0.5 * along.sin()], -1),
    )
    labels = torch.arange(count) % len(SOLIDS)
    clouds = torch.stack(kinds)[labels, torch.arange(count)]
    stretch = torch.exp(0.12 * normal(count, 1, 3)) * torch.tensor([0.9, 0.9, 1.2], dtype=torch.float64)
    return clouds * stretch + NOISE * normal(count, points, 3), labels


def turned(clouds: Tensor, source: torch.Generator | None = None) -> Tensor:
    """Each cloud turned at random, uniformly over all rotations."""
    drawn = torch.randn(len(clouds), 3, 3, dtype=clouds.dtype, generator=source)
    rotations, triangular = torch.linalg.qr(drawn)
    # QR leaves signs that are not uniform (Mezzadri 2007), and mirror images.
    rotations = rotations * triangular.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return clouds @ (rotations * torch.linalg.det(rotations)[:, None, None]).mT


def lengths(clouds: Tensor) -> dict[str, Tensor]:
    """Standard deviations of clouds (B, N, 3) along their own longest axis and along z, (B, 1) each."""
    centred = clouds - clouds.mean(1, keepdim=True)
    spread = centred.mT @ centred / clouds.shape[1]
    return {"longest": torch.linalg.eigvalsh(spread)[:, -1:].sqrt(), "height": spread[:, 2, 2:].sqrt()}


class Learner(OneCycle):
    """Trains a network to tell solids, or lengths.

    Args:
        network: From clouds to scores (B, 6), or to two lengths in standard deviations of those of the data.
        variant: What is trained.
        learning_rate: Peak learning rate.
        clouds: The training data, for the mean and the spread of lengths.
        settings: What tells the run from others.
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        network: nn.Module,
        variant: Variant,
        learning_rate: float,
        clouds: Tensor,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(learning_rate, settings)
        self.network = network
        self.variant = variant
        true = torch.cat(list(lengths(clouds).values()), dim=1)
        self.register_buffer("centre", true.mean(0))
        self.register_buffer("spread", true.std(0))

    def forward(self, clouds: Tensor, *frame: Tensor) -> Tensor | dict[str, Tensor]:
        """Scores, or lengths by name in standard deviations."""
        return self.named(self.network(clouds, *frame))

    def named(self, outputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Outputs of the network, of lengths by name."""
        return outputs if self.variant.task == "solids" else dict(zip(LENGTHS, outputs.split(1, dim=1), strict=True))

    def exactly(self, clouds: Tensor, *frame: Tensor) -> Tensor | dict[str, Tensor]:
        """The same in double precision, of the weights as they are: what is exact shows as 1e-16."""
        state = {
            name: value.double() if value.is_floating_point() else value
            for name, value in self.network.state_dict().items()
        }
        return self.named(torch.func.functional_call(self.network, state, (clouds, *frame)))

    def loss(self, clouds: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, or the mean squared error of lengths: 1 = as if all were alike."""
        outputs = self.network(clouds.float())
        if self.variant.task == "solids":
            return nn.functional.cross_entropy(outputs, labels)
        true = (torch.cat(list(lengths(clouds).values()), dim=1) - self.centre) / self.spread
        return nn.functional.mse_loss(outputs, true.float())

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss, of clouds that are turned anew where they are to be."""
        clouds, labels = batch
        loss = self.loss(turned(clouds) if self.variant.turned else clouds, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Logs the loss on clouds that are not trained on."""
        self.log("val_loss", self.loss(*batch))


def build(variant: Variant) -> CloudNetwork:
    """A fresh network."""
    arguments = dict(variant.network)
    if "grid" in arguments:
        arguments["grid"] = GRIDS[arguments["grid"]]
    return CloudNetwork(len(SOLIDS if variant.task == "solids" else LENGTHS), **arguments)


def with_frame(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clouds, and the axes for each: two things that turn together."""
    return batch[0], torch.eye(3, dtype=batch[0].dtype, device=batch[0].device).expand(len(batch[0]), -1, -1)


def monitors(variant: Variant, measured: int) -> list[lm.EquivarianceMonitor]:
    """What watches a training.

    Args:
        variant: What is trained.
        measured: How many clouds to measure.

    Returns:
        The monitor of the network, and where there is one that of the network with its frame, or of the true lengths.
    """
    shared = {"num_images": measured, "measures": ("relative",), "on_error": "raise"}
    solid = variant.task == "solids"
    kinds = Invariant() if solid else dict.fromkeys(LENGTHS, Invariant())
    orbits = [*lm.orbits.matrices(TURNS), lm.orbits.permutations(samples=1)]
    found = [
        lm.EquivarianceMonitor(
            GENERATORS,
            function="exactly",
            input_representation=Points(3),
            output_representation=kinds,
            metrics={"turn": lm.FiniteEquivarianceError(orbits)} if solid else {},
            **shared,
        )
    ]
    if solid and variant.network.get("features") == "frame":
        together = {"0": Points(3), "1": Vectors(3)}
        found.append(
            lm.EquivarianceMonitor(
                GENERATORS,
                function="exactly",
                inputs=with_frame,
                input_representation=together,
                output_representation=kinds,
                prefix="together",
                **shared,
            )
        )
    if not solid:
        found.append(
            lm.EquivarianceMonitor(
                GENERATORS,
                function=lambda _, clouds: lengths(clouds),
                input_representation=Points(3),
                output_representation=kinds,
                prefix="truth",
                **shared,
            )
        )
    return found


@dataclass
class Result:
    """What is known of a trained network.

    Args:
        run: The monitors' curves.
        scores: Accuracies on upright and on turned solids that it has not seen, or by name of a length the part of its
            variance that is told.
    """

    run: Run
    scores: dict[str, float]

    def curve(self, generator: str, key: str = "equivariance") -> list[float]:
        """Relative errors from the untrained network on; of rotations the root mean square over three axes."""
        names = ROTATIONS if generator == "rotation" else (generator,)
        curves = torch.tensor([series(self.run, key, name)[1] for name in names])
        return curves.square().mean(0).sqrt().tolist()


def train(task: tuple[str, int], options: argparse.Namespace) -> Result:
    """Trains one network with curves of its own.

    Args:
        task: Name of ``VARIANTS``, and the seed of training shapes, of initial weights and of the order of batches;
            shapes to be measured are the same for all.
        options: The command line.

    Returns:
        What is known of it.
    """
    name, seed = task
    variant = VARIANTS[name]
    seed_everything(seed, verbose=False)
    clouds, labels = solids(options.shapes // FEW if variant.few else options.shapes, options.points, 100 + seed)
    unseen, kinds = solids(options.test_shapes, options.points, 0)
    away = turned(unseen, torch.Generator().manual_seed(0))
    times = FEW if variant.few else 1  # few shapes are seen as often again: the number of steps is the same
    seen = TensorDataset(clouds.repeat(times, 1, 1), labels.repeat(times))
    watched = TensorDataset(unseen if variant.task == "solids" else away, kinds)
    settings = {"network": name, "seed": seed, "epochs": options.epochs}
    model = Learner(build(variant), variant, options.learning_rate, clouds, settings)
    loaders = (
        DataLoader(seen, options.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)),
        DataLoader(watched, options.batch_size),
    )
    folder = options.out / "solids" / f"{name.replace(':', '').replace(' ', '_')}-s{seed}"
    run = fit(
        model,
        loaders,
        folder,
        options.epochs,
        monitors(variant, options.measured),
        limit_val_batches=VALIDATED,
        # Three times or more, and always at the end.
        check_val_every_n_epoch=max(n for n in range(1, max(options.epochs // 3, 1) + 1) if options.epochs % n == 0),
    )
    return Result(run, judged(model.eval(), unseen, away, kinds))


@torch.no_grad()
def judged(model: Learner, upright: Tensor, away: Tensor, kinds: Tensor) -> dict[str, float]:
    """How good a trained network is: accuracies on upright and turned clouds, or parts of variance of lengths.

    Args:
        model: The network.
        upright: Clouds.
        away: The same, turned.
        kinds: Their numbers.

    Returns:
        By name the scores.
    """

    def outputs(clouds: Tensor) -> Tensor:
        return torch.cat([model.network(part.float()) for part in clouds.split(50)])

    if model.variant.task == "solids":
        both = {"upright": upright, "turned": away}
        return {name: (outputs(one).argmax(1) == kinds).double().mean().item() for name, one in both.items()}
    true = (torch.cat(list(lengths(away).values()), dim=1) - model.centre) / model.spread
    left = (outputs(away) - true).square().mean(0) / true.var(0, unbiased=False)
    return dict(zip(LENGTHS, (1 - left).tolist(), strict=True))


small, accuracy = partial(cell, rounding=ROUNDING), partial(cell, form=".3f")
Results = Mapping[str, Sequence[Result]]


def table(results: Results) -> list[list[str]]:
    """Rows of text: of networks that tell solids accuracies and errors."""
    rows = [["network", "upright", "turned", "rotation, untrained", "rotation", "translation_x"]]
    rows[0] += [f"{name} of a turn" for name in TURNS]
    for name, found in results.items():
        if VARIANTS[name].task != "solids":
            continue
        rows.append([name, *(accuracy([one.scores[where] for one in found]) for where in ("upright", "turned"))])
        turns = [one.curve("rotation") for one in found]
        rows[-1] += [small([curve[0] for curve in turns]), small([curve[-1] for curve in turns])]
        rows[-1].append(small([one.curve("translation_x")[-1] for one in found]))
        rows[-1] += [small([one.curve(name, "equivariance_turn")[-1] for one in found]) for name in TURNS]
        if VARIANTS[name].network.get("features") == "frame":
            turns = [one.curve("rotation", "together") for one in found]
            rows.append(["  moved with its frame", "", "", small([c[0] for c in turns]), small([c[-1] for c in turns])])
            rows[-1] += [small([one.curve("translation_x", "together")[-1] for one in found]), *("" for _ in TURNS)]
    return rows


def lengths_table(results: Results) -> list[list[str]]:
    """Rows of text: of networks that tell lengths what they tell, and how far that turns."""
    rows = [["lengths by", *(f"{name} told" for name in LENGTHS), *(f"rotation of {name}" for name in LENGTHS)]]
    for name, found in told(results).items():
        rows.append([name, *(accuracy([one.scores[length] for one in found]) for length in LENGTHS)])
        rows[-1] += [small(final(found, key=f"equivariance_{length}")) for length in LENGTHS]
    true = next(iter(told(results).values()))
    return [*rows, ["the truth", "1", "1", *(small(final(true, key=f"truth_{length}")[:1]) for length in LENGTHS)]]


def told(results: Results) -> dict[str, Sequence[Result]]:
    """Those that tell lengths, under the name of what they are told of pairs and points."""
    return {name.partition(": ")[2]: found for name, found in results.items() if VARIANTS[name].task == "lengths"}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its interval by Student's t; of one seed there is none."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """That of some values."""
        mean, low, high = interval(values)
        return cls(mean, -math.inf, math.inf) if math.isnan(low) else cls(mean, low, high)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is on one side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + (f" ({self.low:+.3f} to {self.high:+.3f})" if self.low > -math.inf else "")

    @property
    def factor(self) -> str:
        """Of logarithms: the factor that they are of."""
        found = f"{math.exp(self.mean):.2g}"
        return f"{found} ({math.exp(self.low):.2g} to {math.exp(self.high):.2g})" if self.low > -math.inf else found


def apart(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Differences of what belongs to the same seeds."""
    return Interval.of([x - y for x, y in zip(a, b, strict=True)])


def ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Logarithms of ratios of what belongs to the same seeds."""
    return apart([math.log(x) for x in a], [math.log(x) for x in b])


def largest(found: Sequence[Result], generator: str, key: str = "equivariance") -> float:
    """The largest error of all epochs and seeds."""
    return max(max(one.curve(generator, key)) for one in found)


def final(found: Sequence[Result], generator: str = "rotation", key: str = "equivariance", at: int = -1) -> list[float]:
    """The errors at the end, or at another time, by seed."""
    return [one.curve(generator, key)[at] for one in found]


def tiny(value: float) -> str:
    """A number of which the order of magnitude is enough."""
    return f"{value:.0e}" if value else "0"


def sentence(results: Results) -> str:
    """What the numbers show, in words that follow from them."""
    solid = {name: found for name, found in results.items() if VARIANTS[name].task == "solids"}
    parts = exactness(solid) + breaking(solid) + learning(solid) + scarcity(solid) + orientations(solid)
    seeds = len(next(iter(results.values())))
    head = (
        f"Differences and ratios are paired by seed, with {100 * LEVEL:g} % intervals over {seeds} seeds, of one each."
    )
    return "\n".join([head, *parts, *broken_tasks(results)])


def exactness(solid: Results) -> list[str]:
    """Which symmetries hold to rounding."""
    parts = []
    for generator in ("translation_x", "rotation"):
        kept = {name: largest(found, generator) for name, found in solid.items()}
        exact = [name for name, value in kept.items() if value < ROUNDING]
        most = max((kept[name] for name in exact), default=0.0)
        parts.append(f"Exact under {generator} in every epoch of every seed (at most {tiny(most)}): {listed(exact)}.")
    framed = solid.get("distances + frame")
    if framed:
        together = largest(framed, "rotation", "together")
        fate = "not lost but moved into the frame" if together < ROUNDING else "lost"
        parts.append(
            f"With a frame the rotation error is {fmean(final(framed)):.2g}; where the frame turns too it is at most "
            f"{tiny(together)}: the symmetry is {fate}."
        )
    return parts


def compared(found: Results, names: Sequence[str], score: str, base: str) -> tuple[str, dict[int, list[str]]]:
    """Scores of networks less those of another, in words, and by sign who is better, worse, or neither."""
    signs: dict[int, list[str]] = {1: [], 0: [], -1: []}
    words = []
    for name in names:
        gap = apart(*([one.scores[score] for one in found[which]] for which in (name, base)))
        signs[gap.sign].append(name)
        words.append(f"{name} {gap}")
    return ", ".join(words), signs


def decided(claim: str, signs: Mapping[int, Sequence[str]], wanted: int) -> str:
    """Whether a claim of the paper is seen, by network."""
    return (
        f"That {claim} is confirmed for {listed(signs[wanted])}; contradicted for {listed(signs[-wanted])}; not "
        f"decided for {listed(signs[0])}."
    )


def breaking(solid: Results) -> list[str]:
    """Whether giving up a symmetry helps."""
    parts = []
    free = [name for name in list(MAIN)[1:] if name in solid and not MAIN[name].turned]
    free = [name for name in free if "grid" not in MAIN[name].network]
    for where, claim, wanted in (
        ("upright", "giving up invariance to rotations helps where data are upright", 1),
        ("turned", "the invariant network is better where upright data were seen and turned ones are met", -1),
    ):
        if "distances" in solid and free:
            words, signs = compared(solid, free, where, "distances")
            parts.append(
                f"Accuracy on {where} solids, less that of distances: {words}. {decided(claim, signs, wanted)}"
            )
    if {"icosahedron", "icosahedron + xyz"} <= solid.keys():
        words, signs = compared(solid, ["icosahedron + xyz"], "upright", "icosahedron")
        other, _ = compared(solid, ["icosahedron + xyz"], "turned", "icosahedron")
        parts.append(
            "Coordinates as vectors give up translations alone. Accuracy on upright solids, less that without them: "
            f"{words}; on turned ones {other}. {decided('they help', signs, 1)}"
        )
    if {"icosahedron", "distances"} <= solid.keys():
        words, signs = compared(solid, ["icosahedron"], "turned", "distances")
        parts.append(
            f"A grid of orientations, on turned solids less distances: {words}. "
            f"{decided('orientations tell more than distances', signs, 1)}"
        )
    return parts


def learning(solid: Results) -> list[str]:
    """What training does to broken symmetries."""
    parts, words = [], []
    signs: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for name, found in solid.items():
        if name in MAIN and largest(found, "rotation") > ROUNDING:
            change = ratio(final(found), final(found, at=0))
            signs[change.sign].append(name)
            words.append(f"{name} {change.factor}")
    if words:
        parts.append(
            f"Training multiplied the rotation error by: {', '.join(words)}. It grew for {listed(signs[1])}; fell for "
            f"{listed(signs[-1])}; not decided for {listed(signs[0])}."
        )
    for name, plain in ((name, name.partition(": ")[2]) for name in solid if name in MAIN and MAIN[name].turned):
        if plain not in solid:
            continue
        lowest = min(min(one.curve("rotation")[1:]) for one in solid[name])
        left = ratio(final(solid[name]), final(solid[plain]))
        text = (
            f"Trained on random turns, {plain} keeps {left.factor} of its rotation error, and in no epoch less than an "
            f"error of {lowest:.2g}: it {'stays broken' if lowest > ROUNDING else 'is mended'}"
        )
        if "distances" in solid:
            gap, _ = compared(solid, [name], "turned", "distances")
            text += f". Its accuracy on turned solids, less that of distances: {gap.removeprefix(name).strip()}"
        parts.append(f"{text}.")
    return parts


def scarcity(solid: Results) -> list[str]:
    """Whether symmetry is worth more where there is less data."""
    parts = []
    for other, where in (("differences", "upright"), ("turned: differences", "turned")):
        if not {few + name for few in ("", "few: ") for name in ("distances", other)} <= solid.keys():
            continue
        full, few = (
            [
                a.scores[where] - b.scores[where]
                for a, b in zip(solid[f"{few}distances"], solid[few + other], strict=True)
            ]
            for few in ("", "few: ")
        )
        change = apart(few, full)
        parts.append(
            f"With 1/{FEW} of the shapes the lead of distances over {other} on {where} solids goes from "
            f"{Interval.of(full)} to {Interval.of(few)}, by {change}: that symmetry is worth more with less data is "
            f"{('contradicted', 'not decided', 'confirmed')[change.sign + 1]}."
        )
    return parts


def own_turns(found: Sequence[Result], grid: Tensor, own: bool = True) -> list[float]:
    """Errors of all epochs and seeds under the turns that permute a grid, or under the others."""
    kinds = [kind for kind, rotation in TURNS.items() if permutes(rotation, grid) == own]
    return [value for one in found for kind in kinds for value in one.curve(kind, "equivariance_turn")]


def orientations(solid: Results) -> list[str]:
    """How errors of grids go with their number of directions and with the degree that their means are exact for."""
    grids = [name for name in GRIDS if name in solid]
    if len(grids) < 2:
        return []
    parts = []
    for at, when in ((0, "untrained"), (-1, "trained")):
        means = ", ".join(f"{len(GRIDS[name])} {fmean(final(solid[name], at=at)):.2g}" for name in grids)
        parts.append(f"Rotation error by number of directions, {when}: {means}.")
        for kind, same in (("of the same strength", True), ("of a higher strength", False)):
            steps = {
                f"{len(GRIDS[a])} to {len(GRIDS[b])}": ratio(final(solid[b], at=at), final(solid[a], at=at))
                for a, b in pairwise(grids)
                if (design_strength(GRIDS[a]) == design_strength(GRIDS[b])) == same
            }
            fell = [step for step, change in steps.items() if change.sign < 0]
            words = ", ".join(f"{step} {change.factor}" for step, change in steps.items())
            if steps:
                parts[-1] += f" With more {kind} it is multiplied by: {words}; it falls for {listed(fell)}."
    own = [value for name in grids for value in own_turns(solid[name], GRIDS[name])]
    others = [value for name in grids for value in own_turns(solid[name], GRIDS[name], own=False)]
    parts.append(
        f"Turns that permute the grid change scores by at most {tiny(max(own))} in every epoch of every seed, others "
        f"by at least {min(others):.1g}."
    )
    gaps = {name: apart(*([one.scores[at] for one in solid[name]] for at in ("upright", "turned"))) for name in grids}
    words = ", ".join(f"{len(GRIDS[name])} {gap}" for name, gap in gaps.items())
    framed = [str(len(GRIDS[name])) for name, gap in gaps.items() if gap.sign > 0]
    parts.append(
        f"Accuracy on upright solids less that on turned ones: {words}. Trained on upright solids, networks with "
        f"{listed(framed)} directions have learned to use the grid as a frame."
    )
    changes = {name: ratio(final(solid[name]), final(solid[name], at=0)) for name in grids}
    words = ", ".join(f"{len(GRIDS[name])} {change.factor}" for name, change in changes.items())
    grown = [str(len(GRIDS[name])) for name, change in changes.items() if change.sign > 0]
    parts.append(f"Training multiplied these errors by: {words}; they grew for {listed(grown)}.")
    return parts


def broken_tasks(results: Results) -> list[str]:
    """Whether networks break the symmetry that the task breaks."""
    parts = []
    found = told(results)
    for name, each in found.items():
        height, longest, truth = (
            final(each, key=key) for key in ("equivariance_height", "equivariance_longest", "truth_height")
        )
        text = f"Lengths by {name}: the error of height is "
        text += f"{ratio(height, truth).factor} of that of the truth" if min(height) > ROUNDING else tiny(max(height))
        parts.append(f"{text}, {truth[0]:.2g}; that of longest, which should be 0, {fmean(longest):.2g}.")
    others = [name for name in found if name != "distances"]
    if "distances" in found and others:
        for length in LENGTHS:
            words, signs = compared(found, others, length, "distances")
            parts.append(
                f"What is told of {length}, less that by distances: {words}. "
                f"{decided('giving up the symmetry helps', signs, 1)}"
            )
    return parts


def picture(results: Results) -> Any:
    """Rotation errors over epochs, accuracies on upright and turned solids, and errors of grids.

    Args:
        results: By name those of all seeds.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    lowest = 3e-3
    shown = {name: found for name, found in results.items() if name in MAIN}
    # Zero has no logarithm: what is exact stands in a grey band, each network on a line of its own.
    bottom = lowest / 4
    levels = iter(torch.logspace(math.log10(lowest), math.log10(bottom), 5).tolist()[1:-1])
    for name, found in shown.items():
        epochs = series(found[0].run, "equivariance", ROTATIONS[0])[0]
        style = "--" if MAIN[name].turned else "-"
        exact = largest(found, "rotation") < ROUNDING
        values = torch.tensor([one.curve("rotation") for one in found])
        values = torch.full_like(values, next(levels)) if exact else values.clamp(min=lowest)
        left.plot(epochs, values.log().mean(0).exp(), style, color=COLOURS[name], linewidth=2, label=name)
        left.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.12, linewidth=0)
        x, y = ([one.scores[where] for one in found] for where in ("upright", "turned"))
        errors = [stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0 for each in (x, y)]
        face = "white" if MAIN[name].turned else COLOURS[name]
        middle.errorbar(fmean(x), fmean(y), errors[1], errors[0], "o", c=COLOURS[name], mfc=face, ms=9, mew=2)
    left.set(title="Rotation error of the scores", xlabel="epoch", ylabel="relative error / radian")
    middle.set(
        title="Accuracy (open: trained on turned)",
        xlabel="on upright solids",
        ylabel="on turned solids",
    )
    middle.set(xlim=(0.1, 0.9), ylim=(0.1, 0.9))
    middle.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    middle.axvspan(0, 1 / 6, color="0.92", linewidth=0, zorder=0)
    middle.axhspan(0, 1 / 6, color="0.92", linewidth=0, zorder=0)
    grids = [name for name in GRIDS if name in results]
    counts = [len(GRIDS[name]) for name in grids]
    beside = {"tetrahedron": (-11, 2), "octahedron": (-3, -14), "cube": (5, 0), "dodecahedron": (-19, 6)}
    for name, count in zip(grids, counts, strict=True):
        if name not in MAIN:
            place = [fmean(one.scores[where] for one in results[name]) for where in ("upright", "turned")]
            middle.plot(*place, "o", color=COLOURS["icosahedron"], markersize=5)
            text = {"textcoords": "offset points", "fontsize": 10, "color": COLOURS["icosahedron"]}
            middle.annotate(str(count), place, beside.get(name, (5, 3)), **text)
    for at, style, colour, label in ((0, "o--", "#56B4E9", "untrained"), (-1, "o-", "#0072B2", "trained")):
        if grids:
            values = torch.tensor([final(results[name], at=at) for name in grids]).clamp(min=lowest)
            right.plot(counts, values.log().mean(1).exp(), style, color=colour, label=f"any rotation, {label}")
            right.fill_between(counts, values.amin(1), values.amax(1), color=colour, alpha=0.2, linewidth=0)
    if grids:
        own = [max(own_turns(results[name], GRIDS[name])) for name in grids]
        own = [math.sqrt(lowest * bottom) if value < ROUNDING else max(value, lowest) for value in own]
        right.plot(counts, own, "s", color="#D55E00", label="turns that permute the grid")
        right.set_xticks(
            counts, [f"{n}\nt={design_strength(GRIDS[name])}" for n, name in zip(counts, grids, strict=True)]
        )
        right.legend(fontsize=9)
    right.set(title="Grids of orientations", xlabel="directions (t: degree their means are exact for)")
    ticks = [math.sqrt(lowest * bottom), 0.01, 0.1, 1]
    for axis in (left, right):
        axis.axhspan(bottom, lowest, color="0.92", linewidth=0, zorder=0)
        axis.set(yscale="log", ylim=(bottom, 5))
        axis.set_yticks(ticks, ["0", "0.01", "0.1", "1"])
        axis.minorticks_off()
    if shown:
        figure.legend(*left.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=5)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    words = {"choices": list(VARIANTS), "metavar": "NETWORK", "help": "; ".join(VARIANTS)}
    add("--networks", nargs="+", default=list(VARIANTS), **words)
    add("--shapes", type=int, default=360, help="solids to train on")
    add("--test-shapes", type=int, default=600, help="solids to test on")
    add("--measured", type=int, default=24, help="of these, how many the monitor measures")
    add("--points", type=int, default=32, help="points of each")
    add("--learning-rate", type=float, default=1e-2)
    add_common(add, epochs=15, batch_size=24)
    options = parser.parse_args(argv)
    at_least(parser, options, shapes=FEW * len(SOLIDS), test_shapes=len(SOLIDS), measured=2, points=4)
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive, got {options.learning_rate}")
    for count in (options.shapes, options.shapes // FEW * FEW):
        if count % options.batch_size == 1 or options.batch_size == 1:
            parser.error(
                "--batch-size must leave no solid alone, whom norms over clouds cannot do with, got "
                f"{options.batch_size} for {count} solids"
            )
    most = min(options.test_shapes, VALIDATED * options.batch_size)
    if options.measured > most:
        parser.error(
            f"--measured must be at most --test-shapes and {VALIDATED} batches, {most}, got {options.measured}"
        )
    if len(set(options.networks)) < len(options.networks):
        parser.error(f"--networks must name each network once, got {' '.join(options.networks)}")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """Trains, compares, prints, and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        By name the results of all seeds.
    """
    options = parse(argv)
    folder, started = begin(options, "solids")
    results = over_seeds(
        train,
        options.networks,
        options,
        lambda one: ", ".join(f"{name} {value:.3f}" for name, value in one.scores.items()),
    )
    over = of_seeds(options.seeds)
    caption = (
        f"Upright, turned: accuracy on {options.test_shapes} solids. Rotation (root mean square over three axes) and "
        f"translation_x: relative errors on {options.measured} upright solids, in standard deviations of the scores "
        "per radian and per unit of length (solids are some two across).\nParts of a turn: what that rotation does to "
        f"the scores, 0 = nothing, 1 = as much as another solid. {over.capitalize()}; what is below {ROUNDING:g} is "
        "rounding, in double precision."
    )
    rows = table(results)
    text = [show(rows), caption]
    if told(results):
        text += [
            show(lengths_table(results)),
            "Told: part of the variance, on turned solids. Rotation: relative errors; the true height has one too.",
        ]
    text = "\n\n".join([*text, sentence(results)])
    write(folder, rows, text, {"symmetry_breaking.png": picture(results)}, started)
    return results


if __name__ == "__main__":
    main()
