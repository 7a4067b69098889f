"""Which augmentation makes a network respond less to which transform? Equivariance curves of five regimes.

    python examples/compare_augmentations.py

trains a small convolutional network and a small vision transformer on handwritten digits without augmentation and with
random translations, rotations, scalings, and all three, each with `EquivarianceMonitor`. It prints a table, writes one
picture, and leaves a TensorBoard run for every regime.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lie_metric as lm
from lie_metric.figures import Curve, comparison, unit_of

GENERATORS = ("translation_x", "translation_y", "rotation", "scale")
REGIMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "translation": ("translation_x", "translation_y"),
    "rotation": ("rotation",),
    "scale": ("scale",),
    "all": GENERATORS,
}
# Largest parameter drawn: 2.4 of 32 pixels, 23 degrees, a factor of 1.22.
STRENGTH = {"translation_x": 0.15, "translation_y": 0.15, "rotation": 0.4, "scale": 0.2}
SIZE = 32
FAMILIES = ("equivariance", "equivariance_finite", "equivariance_lee", "equivariance_floor")


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
        drawn = {name: torch.rand(count, generator=self.source) * 2 - 1 for name in GENERATORS}
        return {name: drawn[name] * STRENGTH[name] * (name in self.generators) for name in GENERATORS}

    def __call__(self, images: Tensor) -> Tensor:
        """The transformed batch, (N, C, H, W)."""
        t = self.draw(len(images))
        if self.backend == "torchvision":
            return self._torchvision(images, t)
        for name in self.generators:
            images = lm.transforms.apply(images, name, t[name].to(images.device), lm.Resampling("bilinear", "border"))
        return images

    def _torchvision(self, images: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import affine

        half = min(images.shape[-2:]) / 2
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


class Classifier(LightningModule):
    """A classifier with cross entropy and AdamW on a cosine schedule.

    Args:
        model: From images to class scores.
        augmentation: Applied to training images.
        learning_rate: Peak learning rate.
    """

    def __init__(self, model: nn.Module, augmentation: Augmentation, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.model = model
        self.augmentation = augmentation
        self.learning_rate = learning_rate

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
        self.log("val_loss", nn.functional.cross_entropy(scores, labels), prog_bar=True)
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a one-cycle schedule over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class History(Logger):
    """Keeps what is logged, by step, so that curves can be drawn at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        """The logger's name."""
        return "history"

    @property
    def version(self) -> str:
        """There is one."""
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keeps none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps the metrics of a step."""
        self.rows.setdefault(step or 0, {}).update(metrics)

    def curve(self, family: str, generator: str, steps_per_epoch: int) -> Curve:
        """The curve of a generator, with steps counted in epochs."""
        key, error = f"{family}/{generator}", f"{family}_se/{generator}"
        found = sorted((step, row) for step, row in self.rows.items() if key in row)
        # Values are logged at the last step of an epoch, counted from 0; the untrained model stands at step 0.
        epochs = [0.0 if step == 0 else (step + 1) / steps_per_epoch for step, _ in found]
        return Curve(epochs, [row[key] for _, row in found], [row[error] for _, row in found])


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


def train(
    name: str, regime: str, seed: int, data: tuple[Dataset, Dataset, int, int], options: argparse.Namespace
) -> dict:
    """Trains one model in one regime.

    Args:
        name: The model.
        regime: The regime.
        seed: Fixes initial weights, batches and augmentation; the same for every regime.
        data: Training set, validation set, channels, classes.
        options: The command line.

    Returns:
        ``curves``: {family: {generator: Curve}}; ``accuracy``: on the validation images.
    """
    seed_everything(seed, verbose=False)
    train_set, val_set, channels, classes = data
    model = Classifier(build(name, channels, classes), Augmentation(REGIMES[regime], seed, options.augmentation))
    batches = torch.Generator().manual_seed(seed)
    loaders = (
        DataLoader(train_set, options.batch_size, shuffle=True, generator=batches, drop_last=True),
        DataLoader(val_set, 128),
    )
    history = History()
    board = TensorBoardLogger(
        options.out, name=options.data.split(":")[0], version=f"{name}-{regime}-s{seed}", default_hp_metric=False
    )
    board.log_hyperparams({"model": name, "regime": regime, "seed": seed, "epochs": options.epochs})
    monitor = lm.EquivarianceMonitor(
        GENERATORS,
        num_images=options.num_images,
        lee_output="probabilities",  # as in the paper; it is compared with `relative` below
        resampling=lm.Resampling(options.interpolation),
    )
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        devices=1,
        logger=[board, history],
        callbacks=[monitor, TQDMProgressBar(refresh_rate=20, leave=False)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1000,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, *loaders)
    steps = len(loaders[0])
    curves = {
        family: {generator: history.curve(family, generator, steps) for generator in GENERATORS} for family in FAMILIES
    }
    return {"curves": curves, "accuracy": float(trainer.callback_metrics["val_accuracy"])}


def average(curves: Sequence[Curve]) -> Curve:
    """The mean curve over seeds with the standard error over them; a single one keeps that over images."""
    if len(curves) == 1:
        return curves[0]
    points = list(zip(*(curve.values for curve in curves), strict=True))
    errors = [stdev(point) / math.sqrt(len(point)) for point in points]
    return Curve(curves[0].epochs, [fmean(point) for point in points], errors)


def change(regimes: Mapping[str, Mapping[str, Curve]], regime: str, generators: Sequence[str]) -> tuple[float, float]:
    """The mean final value of some generators in a regime over that without augmentation, and its standard error."""

    def mean(name: str) -> tuple[float, float]:
        values = [regimes[name][g].values[-1] for g in generators]
        # Errors over the same images go together: they are averaged, not added in squares.
        return fmean(values), fmean(regimes[name][g].errors[-1] for g in generators)

    (value, error), (base, base_error) = mean(regime), mean("none")
    ratio = value / base
    return ratio, ratio * math.hypot(error / value, base_error / base)


Curves = Mapping[str, Mapping[str, Curve]]


def sentence(model: str, finite: Curves, relative: Curves, lee: Curves) -> str:
    """What the numbers show, in words that follow from them.

    Args:
        model: The model's name.
        finite: Curves of the finite error by regime and generator: what a moved image meets.
        relative: Curves of the relative measure by regime and generator.
        lee: Curves of the raw measure.

    Returns:
        A few clauses.
    """
    parts = []
    kinds = {"rotation": ("rotation",), "translation": ("translation_x", "translation_y")}
    if {"none", *kinds} <= set(relative):
        for own, other in (("rotation", "translation"), ("translation", "rotation")):
            (a, da), (b, db) = change(finite, own, kinds[own]), change(finite, own, kinds[other])
            gap, error = b - a, math.hypot(da, db)
            verdict = (
                "more than" if gap > 2 * error else "less than" if gap < -2 * error else "not distinguishably more than"
            )
            parts.append(
                f"{own} augmentation left {a:.2f} ± {da:.2f} of the {own} error at two pixels and {b:.2f} ± {db:.2f} "
                f"of the {other} error, so it lowered the former {verdict} the latter"
            )
        by_relative = sorted(relative, key=lambda regime: relative[regime]["rotation"].values[-1])
        by_lee = sorted(lee, key=lambda regime: lee[regime]["rotation"].values[-1])
        same = "the same order" if by_relative == by_lee else f"another one ({', '.join(by_lee)})"
        parts.append(f"by relative rotation error the regimes order as {', '.join(by_relative)}; raw LEE gives {same}")
        start = lee["none"]["rotation"].values[0]
        if start < min(lee[regime]["rotation"].values[-1] for regime in lee):
            parts.append(f"raw LEE is lowest for the untrained network ({start:.1e}), which has learned nothing")
    return f"{model}: " + "; ".join(parts) + "." if parts else f"{model}: too few regimes to compare."


def table(results: Mapping[str, Mapping[str, dict]]) -> list[list[str]]:
    """Rows of text: model, regime, accuracy, then relative, finite and raw LEE ± standard error for each generator."""
    header = ["model", "regime", "accuracy"]
    header += [f"{g} / {unit_of(g)}" for g in GENERATORS]
    header += [f"{g} at 2 px" for g in GENERATORS] + [f"LEE {g}" for g in GENERATORS]
    rows = [header]
    for model, regimes in results.items():
        for regime, result in regimes.items():
            row = [model, regime, f"{100 * result['accuracy']:.1f} %"]
            fixed, short = (".3f", ".3f"), (".1e", ".0e")
            for family, (form, error) in zip(FAMILIES, (fixed, fixed, short), strict=False):
                curves = result["curves"][family]
                row += [f"{curves[g].values[-1]:{form}} ± {curves[g].errors[-1]:{error}}" for g in GENERATORS]
            rows.append(row)
    return rows


def show(rows: Sequence[Sequence[str]]) -> str:
    """The rows in aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, refused before any work where it cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=["cnn", "vit"], help="cnn, vit, or timm names")
    add("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    add("--data", default="digits", help="digits, mnist, cifar10, or folder:PATH with train/ and val/")
    add("--augmentation", default="lie_metric", choices=["lie_metric", "torchvision"], help="who transforms the images")
    add("--interpolation", default="bspline", choices=["bspline", "cubic", "bilinear", "fourier"], help="the stencil")
    add("--epochs", type=int, default=15)
    add("--batch-size", type=int, default=32)
    add("--num-images", type=int, default=256, help="validation images measured each epoch")
    add("--seeds", type=int, default=1, help="how many seeds; with more than one, errors are over seeds")
    add("--threads", type=int, default=1, help="torch threads; a second one gains little on images this small")
    add("--out", type=Path, default=Path("runs"), help="folder for TensorBoard runs, table and picture")
    options = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "num_images", "seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.data not in {"digits", "mnist", "cifar10"} and not options.data.startswith("folder:"):
        parser.error(f"--data must be digits, mnist, cifar10 or folder:PATH, got {options.data!r}")
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
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    data = digits() if options.data == "digits" else torchvision_data(options.data, options.out / "data")
    results: dict[str, dict[str, dict]] = {}
    for model in options.models:
        results[model] = {}
        for regime in options.regimes:
            runs = [train(model, regime, seed, data, options) for seed in range(options.seeds)]
            families = runs[0]["curves"]
            results[model][regime] = {
                "accuracy": fmean(run["accuracy"] for run in runs),
                "curves": {
                    family: {g: average([run["curves"][family][g] for run in runs]) for g in GENERATORS}
                    for family in families
                },
            }
            print(
                f"{model}, augmentation: {regime}: accuracy {100 * results[model][regime]['accuracy']:.1f} % "
                f"({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    dataset = options.data.split(":")[0]
    over = f"{options.seeds} seeds" if options.seeds > 1 else f"{min(options.num_images, len(data[1]))} images"
    stencil = lm.Resampling(options.interpolation)
    rows = table(results)
    caption = (
        f"Relative Lie derivative of the logits ± standard error over {over} of {dataset} (validation), "
        f"in output standard deviations per unit of t; 0 = invariant to first order.\n"
        f"Stencil: {stencil}. Augmentation ranges: translation ±{STRENGTH['translation_x']} half sides, rotation "
        f"±{STRENGTH['rotation']} rad, scale ±{STRENGTH['scale']} (log factor)."
    )
    print(
        f"\n{show(rows)}\n\n{caption}\nAt 2 px: what moving the image by two pixels does to the logits, 1 = as much as "
        "another image. LEE: mean square of the Lie derivative of the class probabilities (raw).\n"
    )
    families = {
        family: {m: {r: res["curves"][family] for r, res in regimes.items()} for m, regimes in results.items()}
        for family in FAMILIES
    }
    told = [
        sentence(m, families["equivariance_finite"][m], families["equivariance"][m], families["equivariance_lee"][m])
        for m in results
    ]
    if options.seeds == 1:
        told.append("One training for each regime: errors are over images, not over trainings; see --seeds.")
    print("\n".join(told))
    folder = options.out / dataset
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "summary.txt").write_text("\n\n".join([show(rows), caption, *told]) + "\n")
    floors = {
        model: {regime: {g: curves[g].values[-1] for g in GENERATORS} for regime, curves in regimes.items()}
        for model, regimes in families["equivariance_floor"].items()
    }
    figure = comparison(
        families["equivariance"],
        title="Equivariance error under five augmentation regimes",
        caption=f"{caption}\nGrey: at or below the stencil's own error on the network and images (band: the least).",
        floors=floors,
    )
    figure.savefig(folder / "comparison.png", dpi=110)
    print(
        f"\nPicture: {folder / 'comparison.png'}\nTable: {folder / 'table.csv'}\n"
        f"Curves: tensorboard --logdir {folder}   (tabs Time Series, Custom Scalars, HPARAMS)\n"
        f"{time.monotonic() - started:.0f} s in all, {options.threads} threads."
    )
    return results


if __name__ == "__main__":
    main()
