"""Which augmentation makes a network respond less to which transform? Equivariance curves of five regimes.

    python examples/compare_augmentations.py

trains a small convolutional network and a small vision transformer on handwritten digits without augmentation and with
random translations, rotations, scalings, and all three, with three seeds each and `EquivarianceMonitor`, two runs at a
time. It prints tables and what they say, seed by seed, writes one picture, and leaves a TensorBoard run for each.

    python examples/compare_augmentations.py --regimes none perspective
    python examples/compare_augmentations.py --regimes none colour --data cifar10

measure the transforms of two further regimes too, changes of perspective, and of the colours of images that have them.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import lie_metric as lm
from lie_metric.compare import around, over_trainings
from lie_metric.figures import Curve, comparison, unit_of
from lie_metric.functional.sums import Replicates
from lie_metric.runs import Run, read

sys.path.insert(0, str(Path(__file__).parent))
from trainings import LEVEL, OneCycle, add_common, at_least, finished, fit, prepare, show, write

GENERATORS = ("translation_x", "translation_y", "rotation", "scale")
REGIMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "translation": ("translation_x", "translation_y"),
    "rotation": ("rotation",),
    "scale": ("scale",),
    "all": GENERATORS,
    # On demand, with their transforms measured.
    "perspective": ("perspective_x", "perspective_y"),
    "colour": ("brightness", "contrast", "chroma", "hue"),
}
DEFAULT = tuple(REGIMES)[:5]
# Largest parameter drawn: 2.4 of 32 pixels, 23 degrees, a factor of 1.22; a horizon four half sides away, which moves
# pixels by 2.4 in the root mean square; a tenth of the range of values, factors of 1.35, 17 degrees of hue.
STRENGTH = {"translation_x": 0.15, "translation_y": 0.15, "rotation": 0.4, "scale": 0.2}
STRENGTH |= {"perspective_x": 0.25, "perspective_y": 0.25}
STRENGTH |= {"brightness": 0.1, "contrast": 0.3, "chroma": 0.3, "hue": 0.3}
# What images of three channels are normalised by, for the generators of colour.
PHOTOGRAPH = lm.representations.Photograph((0.5,) * 3, (0.25,) * 3)
SIZE = 32
FAMILIES = ("equivariance", "equivariance_finite", "equivariance_lee", "equivariance_floor")
# What TensorBoard shows: two errors of each generator. The rest is in the monitor's own file, and in the table.
CHARTS = {
    "equivariance_finite": "finite error at 2 px",
    "equivariance": "relative error",
}
KINDS = {"rotation": ("rotation",), "translation": ("translation_x", "translation_y")}
Task = tuple[str, str, int]
"""Model, regime, seed."""


class Augmentation:
    """Random transforms of a batch, one parameter for each image, from a random state of its own.

    Args:
        generators: Names of the generators to draw from.
        seed: Seed.
        backend: ``"lie_metric"`` or ``"torchvision"``.
    """

    def __init__(self, generators: Sequence[str], seed: int, backend: str = "lie_metric") -> None:
        self.generators = tuple(generators)
        self.backend = backend
        self.source = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> dict[str, Tensor]:
        """Parameters uniform in ± strength, 0 for what the regime does not move: {generator: (count,)}."""
        names = dict.fromkeys((*GENERATORS, *self.generators))
        drawn = {name: torch.rand(count, generator=self.source) * 2 - 1 for name in names}
        return {name: drawn[name] * STRENGTH[name] * (name in self.generators) for name in names}

    def __call__(self, images: Tensor) -> Tensor:
        """The transformed batch, (N, C, H, W)."""
        t = self.draw(len(images))
        if self.backend == "torchvision":
            return self._torchvision(images, t)
        for name in self.generators:
            stencil, step = lm.Resampling("bilinear", "border"), t[name].to(images.device)
            if name in REGIMES["colour"]:
                images = PHOTOGRAPH.act(images, lm.generators(name)[0], step, stencil)
            else:
                images = lm.transforms.apply(images, name, step, stencil)
        return images

    def _torchvision(self, images: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import affine, perspective

        half = min(images.shape[-2:]) / 2
        if self.generators and set(self.generators) <= set(REGIMES["perspective"]):
            height, width = images.shape[-2:]
            corners = torch.tensor([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])
            frame = lm.representations.Points(2, half, (width / 2, height / 2))  # from the edge of the first pixel
            ends = corners.expand(len(images), 4, 2)
            for name in self.generators:
                ends = frame.act(ends, lm.generators(name)[0], t[name], lm.Resampling())
            kind = InterpolationMode.BILINEAR
            return torch.stack(
                [
                    perspective(image, corners.tolist(), end.tolist(), kind, [float(v) for v in image.amin((1, 2))])
                    for image, end in zip(images, ends, strict=True)
                ]
            )
        return torch.stack(
            [
                affine(
                    image,
                    angle=math.degrees(float(t["rotation"][i])),
                    translate=[-half * float(t["translation_x"][i]), -half * float(t["translation_y"][i])],
                    scale=math.exp(float(t["scale"][i])),
                    shear=[0.0, 0.0],
                    interpolation=InterpolationMode.BILINEAR,
                    fill=[float(value) for value in image.amin((1, 2))],
                )
                for i, image in enumerate(images)
            ]
        )


class Classifier(OneCycle):
    """A classifier with cross entropy and AdamW on a cosine schedule.

    Args:
        model: From images to class scores.
        augmentation: Applied to training images.
        learning_rate: Peak learning rate.
        settings: What tells the run from others; TensorBoard's HPARAMS and `lie_metric.read_runs` group by it.
    """

    def __init__(
        self,
        model: nn.Module,
        augmentation: Augmentation,
        learning_rate: float = 2e-3,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(learning_rate, settings)
        self.model = model
        self.augmentation = augmentation

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (N, C)."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy on the augmented batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(self.augmentation(images)), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy on images as they are."""
        images, labels = batch
        scores = self(images)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean())

    def optimizer_of(self, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.01)


class Board(TensorBoardLogger):
    """TensorBoard with few tags: accuracy, losses, and of each generator two errors with the limits of their bands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written: set[tuple[str, int | None]] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps what the charts show, and one standard error to either side of it.

        What HPARAMS compares is declared with values, which would be points of the curves for a second time.
        """
        kept = {}
        for key, value in metrics.items():
            family, _, generator = key.partition("/")
            if family in CHARTS:
                kept[key] = value
                if (error := metrics.get(f"{family}_se/{generator}")) is not None:
                    kept |= limits(key, value, error)
            elif not family.startswith("equivariance"):
                kept[key] = value
        kept = {key: value for key, value in kept.items() if (key, step) not in self.written}
        self.written |= {(key, step) for key in kept}
        super().log_metrics(kept, step)


class Charts(Callback):
    """What TensorBoard's tabs Custom Scalars and HPARAMS show of a run.

    Args:
        models: Names of all models of the job.
        seeds: How many there are of each.
        generators: Names of what is measured.
    """

    def __init__(self, models: Sequence[str], seeds: int, generators: Sequence[str] = GENERATORS) -> None:
        self.models, self.seeds, self.generators = models, seeds, generators

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the layout; the monitor, which stands before, has written its own, and the last one counts."""
        trainer.loggers[0].experiment.add_custom_scalars(layout(self.models, self.seeds, self.generators))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Declares accuracy and finite errors as what HPARAMS compares, at the step of the last validation."""
        keys = ["val_accuracy", *(f"equivariance_finite/{generator}" for generator in moving(self.generators))]
        final = {key: float(trainer.callback_metrics[key]) for key in keys if key in trainer.callback_metrics}
        trainer.loggers[0].log_hyperparams(dict(pl_module.hparams), final, step=max(trainer.global_step - 1, 0))


def limits(key: str, value: float, error: float) -> dict[str, float]:
    """The ends of a band under tags of one group, which TensorBoard's other tabs show closed."""
    return {f"limits/{key}/lower": value - error, f"limits/{key}/upper": value + error}


def measured(regimes: Sequence[str]) -> tuple[str, ...]:
    """What is measured: four generators, and those of the regimes that are chosen."""
    return tuple(dict.fromkeys((*GENERATORS, *(name for regime in regimes for name in REGIMES[regime]))))


def moving(generators: Sequence[str]) -> list[str]:
    """Those that move pixels, of which there are finite errors at two pixels, and floors."""
    return [name for name in generators if name not in REGIMES["colour"]]


def layout(
    models: Sequence[str], seeds: int, generators: Sequence[str] = GENERATORS
) -> dict[str, dict[str, list[Any]]]:
    """Margin charts (value, lower, upper), one for each generator: means over seeds by model, then single runs."""

    def margin(key: str) -> list[Any]:
        return ["Margin", [key, *limits(key, 0.0, 0.0)]]

    what = f"mean of {seeds} seeds ± standard error" if seeds > 1 else "one seed ± standard error over images"
    means = {
        f"{model}: finite error at 2 px over epochs, {what}": {g: margin(f"{model}/{g}") for g in moving(generators)}
        for model in models
    }
    single = {
        f"Single runs over steps ± standard error over images: {title}": {
            g: margin(f"{key}/{g}") for g in (generators if key == "equivariance" else moving(generators))
        }
        for key, title in CHARTS.items()
    }
    return means | single


def digits() -> tuple[Dataset, Dataset, int, int]:
    """scikit-learn's 1797 handwritten digits, 8 pixels enlarged to 24 in a frame of 32, a fifth of them for validation.

    Returns:
        Training set, validation set, channels, classes.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=24, mode="bicubic", align_corners=False)
    images = nn.functional.pad(images, (4, 4, 4, 4))
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    train, val = train_test_split(torch.arange(len(images)), test_size=0.2, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val]), 1, 10


def torchvision_data(name: str, root: Path) -> tuple[Dataset, Dataset, int, int]:
    """MNIST, CIFAR-10, or a folder with `train/` and `val/` of one folder for each class, at 32 pixels.

    Args:
        name: ``"mnist"``, ``"cifar10"`` or ``"folder:PATH"``.
        root: Where downloads go.

    Returns:
        Training set, validation set, channels, classes.

    Raises:
        SystemExit: If the data cannot be had.
    """
    from torchvision import datasets
    from torchvision.transforms import v2

    as_tensor = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(SIZE, antialias=True),
            v2.CenterCrop(SIZE),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.25]),
        ]
    )
    try:
        if name.startswith("folder:"):
            path = Path(name.removeprefix("folder:"))
            train = datasets.ImageFolder(path / "train", as_tensor)
            val = datasets.ImageFolder(path / "val", as_tensor)
            if train.classes != val.classes:
                raise SystemExit(f"{path}/train and {path}/val must hold the same classes.")
            return train, val, 3, len(train.classes)
        kind, channels = {"mnist": (datasets.MNIST, 1), "cifar10": (datasets.CIFAR10, 3)}[name]
        sets = [kind(root, train=train, transform=as_tensor, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"--data {name} cannot be had: {error}. Without a network, use --data digits.") from error
    return sets[0], sets[1], channels, 10


def small_cnn(channels: int, classes: int) -> nn.Module:
    """Four convolutions with batch norm, two of them striding, and a global mean."""

    def block(inside: int, outside: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))

    blocks = [block(channels, 16, 1), block(16, 32, 2), block(32, 32, 1), block(32, 64, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def build(name: str, channels: int, classes: int) -> nn.Module:
    """A model by name: ``"cnn"``, ``"vit"`` (four blocks on patches of 8 pixels), or any timm name.

    Args:
        name: The name.
        channels: Channels of the images.
        classes: Number of classes.

    Returns:
        The model with random weights.
    """
    if name == "cnn":
        return small_cnn(channels, classes)
    import timm
    from timm.models import VisionTransformer

    if name == "vit":
        return VisionTransformer(
            img_size=SIZE, patch_size=8, in_chans=channels, num_classes=classes, embed_dim=64, depth=4, num_heads=4,
            mlp_ratio=2,
        )  # fmt: skip
    try:
        return timm.create_model(name, in_chans=channels, num_classes=classes, img_size=SIZE)
    except TypeError:
        return timm.create_model(name, in_chans=channels, num_classes=classes)


@functools.cache
def data_of(name: str, root: Path) -> tuple[Dataset, Dataset, int, int]:
    """The data of that name, read once in each process."""
    return digits() if name == "digits" else torchvision_data(name, root)


def measured_every(epochs: int) -> int:
    """Every how many epochs to measure: as seldom as leaves three points of a curve besides the untrained model.

    Args:
        epochs: How many there are.

    Returns:
        A divisor, so that the last epoch is measured.

    Example:
        >>> [measured_every(epochs) for epochs in (1, 2, 6, 7, 15)]
        [1, 1, 2, 1, 5]
    """
    return max(n for n in range(1, epochs + 1) if epochs % n == 0 and (epochs // n >= 3 or n == 1))


def folder_of(options: argparse.Namespace, *task: Any) -> Path:
    """Where a run goes."""
    model, regime, seed = task
    return options.out / options.data.split(":")[0] / f"{model}-{regime}-s{seed}"


def train(task: Task, options: argparse.Namespace) -> float:
    """Trains one model in one regime; the monitor's file keeps the curves.

    Args:
        task: The model, the regime, and the seed of initial weights, batches and augmentation, for all regimes alike.
        options: The command line.

    Returns:
        Accuracy on the validation images.
    """
    name, regime, seed = task
    seed_everything(seed, verbose=False)
    train_set, val_set, channels, classes = data_of(options.data, options.out / "data")
    settings = {"model": name, "regime": regime, "seed": seed, "epochs": options.epochs}
    augmentation = Augmentation(REGIMES[regime], seed, options.augmentation)
    model = Classifier(build(name, channels, classes), augmentation, settings=settings)
    batches = torch.Generator().manual_seed(seed)
    loaders = (
        DataLoader(train_set, options.batch_size, shuffle=True, generator=batches, drop_last=True),
        DataLoader(val_set, 128),
    )
    folder = folder_of(options, name, regime, seed)
    board = Board(folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False)
    generators = measured(options.regimes)
    monitor = lm.EquivarianceMonitor(
        generators,
        input_representation=PHOTOGRAPH if "colour" in options.regimes else None,
        num_images=options.num_images,
        every_n_epochs=measured_every(options.epochs),
        lee_output="probabilities",  # as in the paper; it is compared with `relative` below
        resampling=lm.Resampling(options.interpolation),
    )
    fit(
        model,
        loaders,
        folder,
        options.epochs,
        [monitor, Charts(options.models, options.seeds, generators)],
        accelerator="auto",
        logger=board,
    )
    return float(model.trainer.callback_metrics["val_accuracy"])


def named(task: Task) -> str:
    """A task in words, and how it is seen alone."""
    model, regime, seed = task
    return f"{model}, augmentation {regime}, seed {seed} (`--models {model} --regimes {regime}`)"


def curve_of(run: Run, family: str, generator: str) -> Curve:
    """A curve of a run over epochs, with standard errors over images."""
    points = [point for point in run.points if (point.key, point.generator) == (family, generator)]
    return Curve([p.epoch for p in points], [p.value for p in points], [p.standard_error for p in points])


def average(curves: Sequence[Curve]) -> Curve:
    """The mean curve over seeds with the standard error over them; a single one keeps that over images."""
    if len(curves) == 1:
        return curves[0]
    points = list(zip(*(curve.values for curve in curves), strict=True))
    errors = [stdev(point) / math.sqrt(len(point)) for point in points]
    return Curve(curves[0].epochs, [fmean(point) for point in points], errors)


def ratio(runs: Sequence[Run], base: Sequence[Run], family: str, kind: str) -> list[Replicates]:
    """Seed by seed the logarithm of what a regime left of an error: the mean over the generators of a kind.

    Args:
        runs: Of the regime, by seed.
        base: Without augmentation, of the same seeds: the same initial weights and batches.
        family: The text of the keys before the generator.
        kind: ``"rotation"`` or ``"translation"``.

    Returns:
        For each seed the logarithm, with what it is without each image.
    """
    found = []
    for one, other in zip(runs, base, strict=True):
        a, b = (run.records[family, 0][-1][1] for run in (one, other))
        chosen = [a.names.index(generator) for generator in KINDS[kind]]
        parts = [record.replicates.map(torch.log) for record in (a, b)]
        value, left_out = (
            (x - y)[..., chosen].mean(-1)
            for x, y in ((parts[0].value, parts[1].value), (parts[0].left_out, parts[1].left_out))
        )
        found.append(Replicates(value, left_out, parts[0].images))
    return found


def estimate(logarithms: Sequence[Replicates]) -> tuple[float, float, float]:
    """Ratio and ends of its interval: over trainings by Student's t if there are several, else over images."""
    if len(logarithms) > 1:
        centre, error, freedom = over_trainings([one.value.item() for one in logarithms])
    else:
        (one,) = logarithms
        centre, error, freedom = one.value.item(), one.standard_error().item(), one.groups - 1
    return around(centre, error, freedom, LEVEL)[:3]


def told(logarithms: Sequence[Replicates]) -> str:
    """Ratio, interval and single seeds in words."""
    value, low, high = estimate(logarithms)
    seeds = "; seeds " + ", ".join(f"{one.value.exp():.2f}" for one in logarithms) if len(logarithms) > 1 else ""
    return f"{value:.2f} ({low:.2f} to {high:.2f}{seeds})"


def quotients(a: Sequence[Replicates], b: Sequence[Replicates]) -> list[Replicates]:
    """Seed by seed the logarithm of one ratio over another."""
    return [Replicates(x.value - y.value, x.left_out - y.left_out, x.images) for x, y in zip(a, b, strict=True)]


def sentence(model: str, runs: Mapping[str, Sequence[Run]]) -> str:
    """What the numbers show, in words that follow from them: an order only where intervals over seeds exclude equality.

    Args:
        model: The model's name.
        runs: By regime the runs of all seeds, in one order.

    Returns:
        A few clauses.
    """
    if not {"none", *KINDS} <= set(runs):
        return f"{model}: too few regimes to compare."
    seeds, parts = len(runs["none"]), []
    for own, other in (("rotation", "translation"), ("translation", "rotation")):
        far, near = (
            [ratio(runs[own], runs["none"], family, kind) for kind in (own, other)]
            for family in ("equivariance_finite", "equivariance")
        )
        text = (
            f"{own} augmentation left {told(far[0])} of the {own} error at two pixels and {told(far[1])} of the "
            f"{other} error"
        )
        local = f"of the local (relative) errors it left {told(near[0])} and {told(near[1])}"
        if seeds > 1:
            gap = quotients(*far)
            _, low, high = estimate(gap)
            verdict = "more than" if high < 1 else "less than" if low > 1 else "not distinguishably more than"
            below = sum(one.value.item() < 0 for one in gap)
            text += (
                f": it lowered the former {verdict} the latter (quotient, paired by seed, {told(gap)}; below 1 in "
                f"{below} of {seeds})"
            )
            local += f" (quotient {told(quotients(*near))})"
        parts += [text, local]
    final = {
        family: {regime: [curve_of(run, family, "rotation").values for run in found] for regime, found in runs.items()}
        for family in ("equivariance", "equivariance_lee")
    }

    def order(family: str, seed: int) -> list[str]:
        return sorted(runs, key=lambda regime: final[family][regime][seed][-1])

    unlike = sum(order("equivariance", seed) != order("equivariance_lee", seed) for seed in range(seeds))
    lee = final["equivariance_lee"]
    lowest = sum(lee["none"][seed][0] < min(lee[regime][seed][-1] for regime in runs) for seed in range(seeds))
    parts.append(
        f"by rotation raw LEE orders the regimes otherwise than the relative error in {unlike} of {seeds} seeds, and "
        f"is lowest for the untrained network, which has learned nothing, in {lowest}"
    )
    return f"{model}: " + ".\n  ".join(parts) + "."


def table(results: Mapping[str, Mapping[str, dict]], generators: Sequence[str] = GENERATORS) -> list[list[str]]:
    """Rows of text: model, regime, accuracy, then relative, finite and raw LEE ± standard error for each generator."""
    header = ["model", "regime", "accuracy"]
    header += [f"{g} / {unit_of(g)}" for g in generators]
    header += [f"{g} at 2 px" for g in moving(generators)] + [f"LEE {g}" for g in generators]
    rows = [header]
    for model, regimes in results.items():
        for regime, result in regimes.items():
            row = [model, regime, f"{100 * result['accuracy']:.1f} %"]
            fixed, short = (".3f", ".3f"), (".1e", ".0e")
            for family, (form, error) in zip(FAMILIES, (fixed, fixed, short), strict=False):
                curves = result["curves"][family]
                known = moving(generators) if family == "equivariance_finite" else generators
                row += [f"{curves[g].values[-1]:{form}} ± {curves[g].errors[-1]:{error}}" for g in known]
            rows.append(row)
    return rows


def ratios(runs: Mapping[str, Mapping[str, Sequence[Run]]], generators: Sequence[str] = GENERATORS) -> list[list[str]]:
    """Rows of text: what each regime left of the errors without augmentation, by :func:`lie_metric.compare`."""
    rows = [["model", "regime", "measure", *(f"{g}, of none" for g in generators)]]
    for model, regimes in runs.items():
        for regime in regimes if "none" in regimes else ():
            for family, words in (("equivariance_finite", "at 2 px"), ("equivariance", "relative")):
                a, b = ([run.records[family, 0][-1][1] for run in regimes[name]] for name in (regime, "none"))
                if regime != "none":
                    found = lm.compare(a, b, level=LEVEL) if len(a) > 1 else lm.compare(a[0], b[0], level=LEVEL)
                    cells = {one.name: f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f})" for one in found}
                    rows.append([model, regime, words, *(cells.get(name, "-") for name in generators)])
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=["cnn", "vit"], help="cnn, vit, or timm names")
    add("--regimes", nargs="+", default=list(DEFAULT), choices=list(REGIMES))
    add("--data", default="digits", help="digits, mnist, cifar10, or folder:PATH with train/ and val/")
    add("--augmentation", default="lie_metric", choices=["lie_metric", "torchvision"], help="who transforms the images")
    add("--interpolation", default="bspline", choices=["bspline", "cubic", "bilinear", "fourier"], help="the stencil")
    add("--num-images", type=int, default=256, help="validation images that are measured")
    add_common(add, epochs=6, batch_size=32)
    options = parser.parse_args(argv)
    at_least(parser, options, num_images=1)
    if options.data not in {"digits", "mnist", "cifar10"} and not options.data.startswith("folder:"):
        parser.error(f"--data must be digits, mnist, cifar10 or folder:PATH, got {options.data!r}")
    if "colour" in options.regimes and options.data in {"digits", "mnist"}:
        parser.error(
            f"--regimes colour needs images with colours, got --data {options.data}, whose digits are grey: they have "
            "no hue, and one brightness. Pass --data cifar10 or folder:PATH, or leave the regime out"
        )
    if "colour" in options.regimes and options.augmentation == "torchvision":
        parser.error(
            "--regimes colour needs --augmentation lie_metric: torchvision changes colours by products, and in hue, "
            "saturation and value, which is not what is measured"
        )
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, dict]]:
    """Trains, compares, prints, and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        The results by model and regime.
    """
    options = parse(argv)
    started = time.monotonic()
    prepare(options.threads)
    dataset = options.data.split(":")[0]
    folder = options.out / dataset
    data = data_of(options.data, options.out / "data")  # before any process begins: what cannot be had shows here
    generators = measured(options.regimes)
    names = [(m, r, s) for m in options.models for r in options.regimes for s in range(options.seeds)]
    accuracies: dict[Task, float] = {}
    try:
        for task, accuracy, seconds in finished(train, names, options, named):
            accuracies[task] = accuracy
            print(
                f"[{len(accuracies):{len(str(len(names)))}}/{len(names)}] {task[0]}, augmentation {task[1]}, seed "
                f"{task[2]}: accuracy {100 * accuracy:.1f} %, {seconds:.0f} s",
                flush=True,
            )
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first, in this process
        raise SystemExit(
            f"Stopped after {len(accuracies)} of {len(names)} runs; no process is left. What they measured is in "
            f"{folder}; the same command starts again from the first."
        ) from None
    runs = {
        m: {r: [read(folder_of(options, m, r, s))[0] for s in range(options.seeds)] for r in options.regimes}
        for m in options.models
    }
    shown = dict.fromkeys(FAMILIES, generators) | {
        family: moving(generators) for family in ("equivariance_finite", "equivariance_floor")
    }
    results = {
        m: {
            r: {
                "accuracy": fmean(accuracies[m, r, s] for s in range(options.seeds)),
                "curves": {
                    family: {g: average([curve_of(run, family, g) for run in found]) for g in shown[family]}
                    for family in FAMILIES
                },
            }
            for r, found in regimes.items()
        }
        for m, regimes in runs.items()
    }
    report(options, runs, results, min(options.num_images, len(data[1])), started)
    return results


def report(
    options: argparse.Namespace,
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    results: Mapping[str, Mapping[str, dict]],
    images: int,
    started: float,
) -> None:
    """Prints tables and sentences, and writes them, the picture, and the mean curves for TensorBoard.

    Args:
        options: The command line.
        runs: By model and regime the runs of all seeds.
        results: By model and regime accuracy and mean curves.
        images: How many images were measured.
        started: When the job began, by ``time.monotonic()``.
    """
    dataset = options.data.split(":")[0]
    folder = options.out / dataset
    over = f"{options.seeds} seeds" if options.seeds > 1 else f"{images} images"
    stencil = lm.Resampling(options.interpolation)
    generators = measured(options.regimes)
    rows, left = table(results, generators), ratios(runs, generators)
    further = "".join(
        f", {name.replace('_', ' ')} ±{STRENGTH[name]} ({unit_of(name)})" for name in generators[len(GENERATORS) :]
    )
    caption = (
        f"Relative Lie derivative of the logits ± standard error over {over} of {dataset} (validation), "
        f"in output standard deviations per unit of t; 0 = invariant to first order.\n"
        f"Stencil: {stencil}. Augmentation ranges: translation ±{STRENGTH['translation_x']} half sides, rotation "
        f"±{STRENGTH['rotation']} rad, scale ±{STRENGTH['scale']} (log factor){further}."
    )
    explained = (
        "At 2 px: what moving the image by two pixels does to the logits, 1 = as much as another image. LEE: mean "
        "square of the Lie derivative of the class probabilities (raw)."
    )
    paired = (
        f"Ratios are of runs with the same seed: geometric means with {100 * LEVEL:g} % intervals over {over} "
        "(Student's t on logarithms), each of one comparison alone."
        if options.seeds > 1
        else f"Ratios are of one training each, with {100 * LEVEL:g} % intervals over images."
    )
    blocks = [show(rows), f"{caption}\n{explained}"]
    if len(left) > 1:
        blocks += [show(left), paired]
    blocks += [sentence(model, regimes) for model, regimes in runs.items()]
    if options.seeds == 1:
        blocks.append(
            "One training of each: intervals are over images and do not cover the spread between trainings, so one "
            "training settles nothing. Three seeds or more (--seeds) say which augmentation does what."
        )
    curves = {
        family: {m: {r: res["curves"][family] for r, res in regimes.items()} for m, regimes in results.items()}
        for family in FAMILIES
    }
    floors = {
        model: {regime: {g: found[g].values[-1] for g in moving(generators)} for regime, found in regimes.items()}
        for model, regimes in curves["equivariance_floor"].items()
    }
    # The monitor measures floors ever more seldom, so that theirs may be of an earlier epoch than the last.
    when = curve_of(runs[options.models[0]][options.regimes[0]][0], "equivariance_floor", GENERATORS[0]).epochs[-1]
    count = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}[len(set(options.regimes))]
    figure = comparison(
        curves["equivariance"],
        title=f"Equivariance error under {count} augmentation regimes",
        caption=f"{caption}\nGrey: at or below the stencil's own error on the network and images as of epoch {when:g} "
        "(band: the least of the regimes).",
        floors=floors,
    )
    write_means(folder / "mean", curves["equivariance_finite"], options)
    hint = "   (tab Custom Scalars: means over seeds first; HPARAMS: every run)"
    write(folder, rows, "\n\n".join(blocks), {"comparison.png": figure}, started, hint)


def write_means(
    folder: Path, curves: Mapping[str, Mapping[str, Mapping[str, Curve]]], options: argparse.Namespace
) -> None:
    """Writes a TensorBoard run for each regime with the mean curves of every model, so that a chart has one line each.

    Args:
        folder: Where they go.
        curves: By model, regime and generator.
        options: The command line.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for regime in options.regimes:
        with SummaryWriter(str(folder / regime)) as writer:
            writer.add_custom_scalars(layout(options.models, options.seeds, measured(options.regimes)))
            for model in options.models:
                for generator, curve in curves[model][regime].items():
                    for epoch, value, error in zip(curve.epochs, curve.values, curve.errors, strict=True):
                        key = f"{model}/{generator}"
                        for tag, number in {key: value, **limits(key, value, error)}.items():
                            writer.add_scalar(tag, number, int(epoch))


if __name__ == "__main__":
    main()
