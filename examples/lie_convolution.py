"""For which group must a convolution be built, so that rotation does not matter, and what does each cost?

    python examples/lie_convolution.py

trains LieConv networks (Finzi, Stanton, Izmailov and Wilson 2020) on small digits, each turned by an angle of its own,
with convolutions over the translations T(2), the rotations SO(2), both together, SE(2), and rotations with scale,
R*×SO(2), and beside them an ordinary CNN. A network over a group sees an image as points with values. It can be turned
in two ways: the points move and keep their values, which is an exact action, or the image is resampled at the pixels it
had. `EquivarianceMonitor` measures both while the networks are trained, and how far SE(2), which lifts each point to a
few angles, is from the integral over all. It prints a table and what it says, writes one picture, and leaves a
TensorBoard run for each training.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.representations import Invariant, Points
from lie_metric.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from networks import (
    LieClassifier,
    Motions,
    PlainConvolutions,
    PlaneGroup,
    Rotations,
    ScaledRotations,
    Shifts,
    even_turns,
)
from trainings import (
    OneCycle,
    add_common,
    at_least,
    begin,
    fit,
    interval,
    listed,
    of_seeds,
    over_seeds,
    ratio,
    series,
    show,
    write,
)
from trainings import cell as mean_cell

SIDE, DIGIT = 16, 10
"""Pixels of a side, and of the digit within: its corners stay inside when it turns."""
STRIDE = 3
"""Convolutions are evaluated at every third pixel along both axes, which quarter turns take to one another."""
GENERATORS = ("translation_x", "rotation", "scale")
ROUNDING = 1e-9
"""Errors below it are of rounding, in float64."""
LIFTS = (1, 2, 3, 4, 6, 8, 12)
"""To how many angles SE(2) lifts a point, for the curve."""
WAYS = ("even", "random")
"""How these are spread over the circle."""
GROUPS: dict[str, Callable[[], PlaneGroup] | None] = {
    "CNN": None,
    "T(2)": Shifts,
    "SO(2)": Rotations,
    "R*×SO(2)": ScaledRotations,
    "SE(2)": Motions,
}
COLOURS = dict(zip(GROUPS, ("#777777", "#E69F00", "#0072B2", "#009E73", "#D55E00"), strict=True))
PAPER = {"T(2)": 1.32, "SO(2)": 1.27, "SE(2)": 1.13}
"""Errors on RotMNIST in percent, Finzi et al. (2020)."""


def lattice() -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of the disc.

    Returns:
        Which of SIDE × SIDE pixels they are, their places (n, 2) in half sides, and the numbers of the centres.
    """
    axis = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disc = x.square() + y.square() <= (SIDE / 2) ** 2
    # Of the offsets one is kept by i -> SIDE - 1 - i, which with the exchange of axes makes a quarter turn.
    first = next(k for k in range(STRIDE) if (2 * k - (SIDE - 1)) % STRIDE == 0)
    coarse = torch.zeros_like(disc)
    coarse[first::STRIDE, first::STRIDE] = True
    return disc, torch.stack([x[disc], y[disc]], dim=-1) / (SIDE / 2), coarse[disc].nonzero()[:, 0]


DISC, PLACES, CENTRES = lattice()


def digits(train: int, test: int, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's digits in random order, smoothly enlarged, each turned about its centre by an angle of its own.

    Args:
        train: How many to train on.
        test: How many not to train on.
        seed: Seed of order and angles.

    Returns:
        Both sets of images (1, SIDE, SIDE), float64, 0 outside of the disc, and labels.
    """
    bunch, source = load_digits(), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(bunch.target), generator=source)[: train + test]
    angles = 2 * math.pi * torch.rand(len(chosen), dtype=torch.float64, generator=source)
    small = torch.from_numpy(bunch.images)[chosen, None] / 16
    larger = nn.functional.interpolate(small, (DIGIT, DIGIT), mode="bicubic", align_corners=False)
    images = lm.transforms.rotate(nn.functional.pad(larger, [(SIDE - DIGIT) // 2] * 4), angles) * DISC
    labels = torch.from_numpy(bunch.target)[chosen]
    return TensorDataset(images[:train], labels[:train]), TensorDataset(images[train:], labels[train:])


def points(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The places of a batch's pixels, (B, n, 2), and their values, (B, n)."""
    images = batch[0]
    return PLACES.expand(len(images), -1, -1).contiguous(), images[:, 0, DISC]


class Classifier(OneCycle):
    """Trains a network of points or of images.

    Args:
        network: The network.
        learning_rate: Peak learning rate.
        settings: What tells the run from others.
    """

    def __init__(self, network: nn.Module, learning_rate: float, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(learning_rate, settings)
        self.network = network
        self.seconds = self.started = 0.0

    def forward(self, places: Tensor, values: Tensor, turns: Tensor | None = None) -> Tensor:
        """Scores of points with values, (B, 10)."""
        return self.network(places, values, turns)

    def of_images(self, images: Tensor) -> Tensor:
        """Scores of images (B, 1, SIDE, SIDE)."""
        if isinstance(self.network, LieClassifier):
            return self.network(PLACES[None].to(images), images[:, 0, DISC])
        return self.network(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The cross entropy."""
        loss = nn.functional.cross_entropy(self.of_images(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Logs how many digits, that are not trained on, are wrong."""
        wrong = (self.of_images(batch[0]).argmax(1) != batch[1]).double().mean()
        self.log("error", wrong, batch_size=len(batch[1]))

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Looks at the clock of the processor: that of training alone is compared."""
        self.started = time.process_time()

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Adds up."""
        self.seconds += time.process_time() - self.started


def build(name: str, lifts: int) -> nn.Module:
    """A fresh network of a name, float64."""
    group = GROUPS[name]
    return (PlainConvolutions() if group is None else LieClassifier(group(), CENTRES, lifts=lifts)).double()


def lifted(module: Classifier, *inputs: Tensor, way: str, count: int) -> Tensor:
    """Scores with other lifts than the network was trained with.

    Args:
        module: The module.
        inputs: Places and values.
        way: "even", the same evenly spread angles for all points, or "random", independent ones for each.
        count: How many angles.

    Returns:
        The scores.
    """
    turns = even_turns(count)
    if way == "random":
        source = torch.Generator().manual_seed(count)  # one drawing: two of them would differ without any turn
        turns = 2 * math.pi * torch.rand(len(PLACES), count, dtype=torch.float64, generator=source)
    return module(*inputs, turns)


ANY_TURN = lm.orbits.uniform("rotation", math.pi, 2, "any_turn")
"""Two turns of each image, by any angle."""
QUARTER_TURN = replace(lm.orbits.listed("rotation", [math.pi / 2])[0], name="quarter_turn")


def monitors(name: str, options: argparse.Namespace) -> list[lm.EquivarianceMonitor]:
    """What watches a training: the network of points, of images, and of other numbers of lifts.

    Args:
        name: One of ``GROUPS``.
        options: The command line.

    Returns:
        The callbacks.
    """
    shared: dict[str, Any] = {"measures": ("relative",), "on_error": "raise"}
    of_points = shared | {
        "inputs": points,
        # Values are named though they stay: samples can then be looked at one by one.
        "input_representation": {"0": Points(2), "1": Invariant()},
    }
    found = [
        lm.EquivarianceMonitor(
            GENERATORS,
            options.images,
            options.every,
            prefix="image",
            function="of_images",
            displacement=None,
            metrics={
                "turned": lm.FiniteEquivarianceError(ANY_TURN),
                "lattice": lm.LatticeEquivarianceError("rotate_90"),
            },
            **shared,
        )
    ]
    if GROUPS[name] is None:
        return found
    turned = {"turned": lm.FiniteEquivarianceError([ANY_TURN, QUARTER_TURN])}
    found.append(
        lm.EquivarianceMonitor(GENERATORS, options.clouds, options.every, prefix="points", metrics=turned, **of_points)
    )
    if name == "SE(2)":
        curve = {
            f"{way}_{count}": lm.FiniteEquivarianceError(ANY_TURN, function=partial(lifted, way=way, count=count))
            for way in WAYS
            for count in LIFTS
        }
        found.append(
            lm.EquivarianceMonitor(
                "rotation", options.clouds, options.epochs, prefix="lifts", metrics=curve, **of_points
            )
        )
    return found


@dataclass
class Result:
    """What is known of a trained network.

    Args:
        run: The monitor's curves.
        error: Which part of the digits that were not trained on is wrong, in percent.
        parameters: How many there are.
        seconds: CPU seconds of training in an epoch.
    """

    run: Run
    error: float
    parameters: int
    seconds: float

    def last(self, key: str, name: str) -> float:
        """The last value of a curve; NaN if there is none."""
        values = series(self.run, key, name)[1]
        return values[-1] if values else math.nan


def train(task: tuple[str, int], options: argparse.Namespace) -> Result:
    """Trains one network while the monitors watch.

    Args:
        task: One of ``GROUPS``, and the seed of the choice of digits and their angles, of initial weights, and of the
            order of batches; digits of a seed are the same for all networks.
        options: The command line.

    Returns:
        What is known of it.
    """
    name, seed = task
    seed_everything(seed, verbose=False)
    known, unknown = digits(options.train, options.test, seed)
    settings = {"network": name, "seed": seed, "epochs": options.epochs, "lifts": options.lifts}
    model = Classifier(build(name, options.lifts), options.learning_rate, settings)
    order = torch.Generator().manual_seed(seed)
    loaders = (
        DataLoader(known, options.batch_size, shuffle=True, generator=order),
        DataLoader(unknown, min(options.clouds, options.test)),
    )
    folder = options.out / "turned_digits" / f"{name.replace('*×', 'x')}-s{seed}"
    run = fit(model, loaders, folder, options.epochs, monitors(name, options), check_val_every_n_epoch=options.every)
    with torch.no_grad():
        images, labels = unknown.tensors
        wrong = (model.eval().of_images(images).argmax(1) != labels).double().mean().item()
    count = sum(p.numel() for p in model.parameters())
    return Result(run, 100 * wrong, count, model.seconds / options.epochs)


cell = partial(mean_cell, rounding=ROUNDING)
COLUMNS = {
    "points: translation_x": ("points", "translation_x"),
    "rotation": ("points", "rotation"),
    "scale": ("points", "scale"),
    "any turn": ("points_turned", "any_turn"),
    "quarter": ("points_turned", "quarter_turn"),
    "image: rotation": ("image", "rotation"),
    "floor": ("image_floor", "rotation"),
    "any turn ": ("image_turned", "any_turn"),
    "quarter ": ("image_lattice", "rotate_90"),
}
"""What of the monitors stands in the table: key and name."""


def table(results: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """Rows of text: costs, error, then what moves the scores."""
    rows = [["network", "parameters", "CPU s/epoch", "wrong, %", *COLUMNS]]
    for name, found in results.items():
        rows.append([name, str(found[0].parameters), f"{fmean(one.seconds for one in found):.2f}"])
        rows[-1].append(cell([one.error for one in found], form=".3g"))
        for key in COLUMNS.values():
            values = [one.last(*key) for one in found]
            rows[-1].append("–" if any(map(math.isnan, values)) else cell(values))
    return rows


def lift_table(found: Sequence[Result]) -> list[list[str]]:
    """Rows of text: the error of SE(2) under any turn by the number of lifts, before and after training."""
    rows = [["angles", *(f"{way}, {when}" for way in WAYS for when in ("untrained", "trained"))]]
    for count in LIFTS:
        rows.append([str(count)])
        for way in WAYS:
            curves = [series(one.run, f"lifts_{way}_{count}", "any_turn")[1] for one in found]
            rows[-1] += [cell([curve[end] for curve in curves]) for end in (0, -1)]
    return rows


def told(found: tuple[float, float, float], form: str = ".2g") -> str:
    """A value and its interval in words."""
    value, low, high = found
    return f"{value:{form}}" + (f" ({low:{form}} to {high:{form}})" if low == low else "")


def verdict(found: tuple[float, float, float], equal: float, more: str, less: str) -> str:
    """Words for an interval that lies above a number, below it, or neither."""
    return more if found[1] > equal else less if found[2] < equal else "not told apart"


def exact_throughout(results: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, float]]:
    """By network what never moved its scores as points, in no epoch of no seed, with the largest value."""
    exact: dict[str, dict[str, float]] = {}
    for name, found in results.items():
        for key, names in (("points", GENERATORS), ("points_turned", ("any_turn", "quarter_turn"))):
            for one in names:
                values = [value for result in found for value in series(result.run, key, one)[1]]
                if values and max(values) < ROUNDING:
                    exact.setdefault(name, {})[one] = max(values)
    return exact


def sentence(results: Mapping[str, Sequence[Result]]) -> str:
    """What the numbers show, in words that follow from them."""
    exact, parts = exact_throughout(results), []
    kept = [
        f"{name} ({', '.join(f'{g} ≤ {v:.0e}' if v else f'{g} 0' for g, v in found.items())})"
        for name, found in exact.items()
    ]
    parts.append(f"As points, exact before, during and after training: {listed(kept)}")

    def values(name: str, key: str, what: str, end: int = -1) -> list[float]:
        return [series(one.run, key, what)[1][end] for one in results[name]]

    still = [name for name in results if "any_turn" in exact.get(name, {})]
    if still:
        said = [f"{name} {told(interval(values(name, 'image_turned', 'any_turn')))}" for name in still]
        if "CNN" in results:
            of_cnn = [ratio(values(name, "image_turned", "any_turn"), values("CNN", "image_turned", "any_turn"))
                      for name in still]  # fmt: skip
            said = [f"{one}, of the CNN's {told(part)}" for one, part in zip(said, of_cnn, strict=True)]
        lattice = [name for name in results if max(values(name, "image_lattice", "rotate_90")) < ROUNDING]
        parts.append(
            f"That is no statement about images: resampled at the old pixels, an image turned by any angle moves the "
            f"scores by this part of what another image does: {'; '.join(said)}; by a right angle, which "
            f"resamples nothing, it is rounding for {listed(lattice)}"
        )
    learned = [name for name in results if name not in still]
    if learned:
        said = []
        for name in learned:
            key = "image_turned" if GROUPS[name] is None else "points_turned"
            pair = (values(name, key, "any_turn"), values(name, key, "any_turn", 0))
            if min(map(min, pair)) > 0:
                found = ratio(*pair)
                said.append(f"{name}{' (image)' if GROUPS[name] is None else ''} {told(found)}, "
                            f"{verdict(found, 1, 'more', 'less')}")  # fmt: skip
        parts.append(
            f"Of the error under any turn training made, as a ratio to the untrained network: {'; '.join(said)}"
        )
    if "SE(2)" in results:
        even, random = ({n: values("SE(2)", f"lifts_{way}_{n}", "any_turn") for n in LIFTS} for way in WAYS)
        first, most = LIFTS[0], LIFTS[-1]
        apart = ratio(random[most], even[most])
        parts.append(
            f"SE(2) under any turn, by evenly spread angles: {told(interval(even[first]))} with {first}, "
            f"{told(interval(even[most]))} with {most}; by random ones {told(interval(random[first]))} and "
            f"{told(interval(random[most]))}, with {most} {told(apart)} times as much "
            f"({verdict(apart, 1, 'more', 'less')})"
        )
    said = []
    for one, other in combinations([name for name in PAPER if name in results], 2):
        gap = interval([b.error - a.error for a, b in zip(results[one], results[other], strict=True)])
        paper = f"{PAPER[other] - PAPER[one]:+.2f} in the paper"
        agrees = verdict(gap, 0, "the other way round", "the same order")
        said.append(f"{other} - {one} {told(gap, '+.1f')} points ({paper}: {agrees})")
    if said:
        parts.append(f"Differences of digits that are wrong, paired by seed: {'; '.join(said)}")
    best = min(results, key=lambda name: fmean(one.error for one in results[name]))
    seeds = len(results[best])
    first = sum(min(results, key=lambda name: results[name][k].error) == best for k in range(seeds))
    parts.append(f"The fewest are wrong for {best} on the mean, and in {first} of {seeds} seeds")
    if "CNN" in results and len(results) > 1:
        said = [
            f"{name} {told(ratio([one.seconds for one in found], [one.seconds for one in results['CNN']]))}"
            for name, found in results.items()
            if name != "CNN"
        ]
        parts.append(f"An epoch of training costs, in those of the CNN: {listed(said)}")
    return ".\n".join(parts) + "."


def picture(results: Mapping[str, Sequence[Result]]) -> Any:
    """What any turn does, as points and as images, over epochs, and by the number of lifts.

    Args:
        results: By network those of all seeds.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    lowest, step = 1e-3, 10**-0.2
    # Zero has no logarithm: what is exact stands in a grey band, each network on a line of its own.
    levels = {name: lowest * step ** (k + 1) for k, name in enumerate(GROUPS)}
    bottom = lowest * step ** (len(GROUPS) + 1)
    for axis, key, what in zip(panels, ("points_turned", "image_turned"), ("points", "image"), strict=False):
        for name, found in results.items():
            curves = [series(one.run, key, "any_turn") for one in found]
            label = f"{name}: {fmean(one.error for one in found):.1f} % wrong"
            if curves[0][0]:
                epochs, values = curves[0][0], torch.tensor([each[1] for each in curves])
                values = torch.where(values < ROUNDING, levels[name], values.clamp(min=lowest))
                axis.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.25, linewidth=0)
                axis.plot(epochs, values.log().mean(0).exp(), color=COLOURS[name], label=label, linewidth=2)
        axis.set(yscale="log", xlabel="epoch", title=f"The {what} turned by any angle")
        axis.set_ylabel("finite error: 1 = another digit")
    panels[0].axhspan(bottom, lowest, color="0.92", linewidth=0, zorder=0)
    panels[0].set(ylim=(bottom, 3))
    panels[0].set_yticks([math.sqrt(lowest * bottom), 1e-3, 1e-2, 1e-1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    panels[1].set(ylim=(0.01, 3))
    panels[1].set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    panels[1].legend(fontsize=9, loc="lower right")
    for axis in panels[:2]:
        axis.minorticks_off()
    axis = panels[2]
    axis.set(xlabel="angles to which SE(2) lifts a point", title="SE(2) by its lifts: the points turned", yscale="log")
    for way, colour in zip(WAYS, (COLOURS["SE(2)"], "#CC79A7"), strict=True):
        for end, style in ((0, "--"), (-1, "-")):
            curves = [
                [series(one.run, f"lifts_{way}_{n}", "any_turn")[1][end] for n in LIFTS]
                for one in results.get("SE(2)", ())
            ]
            if curves:
                values = torch.tensor(curves).clamp(min=1e-12)
                axis.fill_between(LIFTS, values.amin(0), values.amax(0), color=colour, alpha=0.25, linewidth=0)
                label = f"{'evenly spread' if way == 'even' else 'random'}, {'trained' if end else 'untrained'}"
                axis.plot(LIFTS, values.log().mean(0).exp(), style, color=colour, label=label, linewidth=2)
    if "SE(2)" in results:
        axis.set_ylabel("finite error: 1 = another digit")
        axis.legend(fontsize=9, loc="lower left")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--networks", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="NETWORK", help=listed(GROUPS))
    add("--train", type=int, default=1257, help="digits to train on")
    add("--test", type=int, default=540, help="digits to count errors of")
    add("--lifts", type=int, default=4, help="angles to which SE(2) lifts a point")
    add("--learning-rate", type=float, default=2e-2)
    add("--images", type=int, default=64, help="digits that are measured as images")
    add("--clouds", type=int, default=10, help="digits that are measured as points")
    add("--every", type=int, default=5, help="validate and measure every n-th epoch")
    add_common(add, epochs=30, batch_size=50)
    options = parser.parse_args(argv)
    at_least(parser, options, train=2, test=2, lifts=1, images=2, clouds=2, every=1)
    most = len(load_digits().target)
    if options.train + options.test > most:
        parser.error(f"--train and --test must be {most} digits together at most, got {options.train + options.test}")
    if max(options.images, options.clouds) > options.test:
        parser.error(
            f"--images and --clouds must be of the {options.test} of --test, got {options.images} and {options.clouds}"
        )
    if options.epochs % options.every:
        parser.error(
            f"--every must divide --epochs, so that the last is measured, got {options.every}, {options.epochs}"
        )
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive, got {options.learning_rate}")
    if len(set(options.networks)) < len(options.networks):
        parser.error(f"--networks must name each network once, got {' '.join(options.networks)}")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """Trains, prints, and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        By network the results of all seeds.
    """
    options = parse(argv)
    folder, started = begin(options, "turned_digits")
    results = over_seeds(
        train,
        options.networks,
        options,
        lambda one: f"{one.error:.1f} % wrong, image under any turn {one.last('image_turned', 'any_turn'):.2g}",
    )
    rows = table(results)
    over = of_seeds(options.seeds)
    caption = (
        f"Wrong: of {options.test} turned digits that were not trained on. Translation, rotation, scale: relative Lie "
        f"derivatives of the scores, in their standard deviations per half side, radian, factor e. Any turn, quarter: "
        f"finite errors, 1 = as far away as another image. Points ({options.clouds} digits): the pixels' places move; "
        f"image ({options.images}): it is resampled at the old pixels, and by quarter turns these are permuted. "
        f"Floor: what two stencils disagree about, in units of image: rotation, at the last epoch that has it. {over}."
    )
    text = [show(rows), caption]
    if "SE(2)" in results:
        text += [
            show(lift_table(results["SE(2)"])),
            "Finite error of SE(2), as points, under any turn, with other lifts.",
        ]
    text.append(sentence(results))
    write(folder, rows, "\n\n".join(text), {"lie_convolution.png": picture(results)}, started)
    return results


if __name__ == "__main__":
    main()
