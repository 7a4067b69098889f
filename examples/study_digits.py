"""Are more accurate models more equivariant? A study of 48 small models on handwritten digits.

    python examples/study_digits.py

trains convolutional networks, the same with anti-aliased down-sampling, vision transformers and mixers, each in three
sizes, with and without augmentation, from two seeds; measures all of them as `lie-metric study` does; and writes the
report. Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from compare_augmentations import REGIMES, SIZE, Augmentation

from lie_metric.study import ModelSpec, Settings, read_records, read_rows, run_study, write_report
from lie_metric.study.data import digits
from lie_metric.study.report import answers, correlations, summarise

# Epochs in units of --epochs, and the peak learning rate: what each family needs to learn the digits in little time.
FAMILIES = {"cnn": (1, 1e-2), "anti-aliased cnn": (1, 1e-2), "vit": (4, 2e-3), "mixer": (2, 5e-3)}
WIDTHS = {"small": 6, "medium": 10, "large": 20}
TAGS = {"no augmentation": REGIMES["none"], "augmentation": REGIMES["all"]}
# Timm's evaluation transform reads it from the model: one channel, mean and standard deviation of the digits.
CONFIG = {"input_size": (1, SIZE, SIZE), "mean": (0.17,), "std": (0.32,), "crop_pct": 1.0, "interpolation": "bilinear"}


class BlurPool(nn.Module):
    """A binomial filter of four pixels and a stride of two (Zhang 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("weight", (row[:, None] * row).expand(channels, 1, 4, 4).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and width."""
        return nn.functional.conv2d(
            nn.functional.pad(x, (1, 1, 1, 1), "reflect"), self.weight, stride=2, groups=x.shape[1]
        )


def cnn(width: int, *, anti_aliased: bool) -> nn.Module:
    """Four convolutions with batch norm, two of them striding or followed by a blurring stride, and a global mean."""

    def block(inside: int, outside: int, stride: int) -> list[nn.Module]:
        blur = anti_aliased and stride > 1
        convolution = nn.Conv2d(inside, outside, 3, 1 if blur else stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True), *[BlurPool(outside)] * blur]

    shape = ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2))
    layers = [layer for sizes in shape for layer in block(*sizes)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def build(family: str, size: str) -> nn.Module:
    """A model with random weights that knows its family and what images it takes.

    Args:
        family: One of ``FAMILIES``.
        size: One of ``WIDTHS``.

    Returns:
        The model.
    """
    from timm.models import MlpMixer, VisionTransformer

    width = WIDTHS[size]
    if family == "vit":
        shape = {"embed_dim": 4 * width, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
        model: nn.Module = VisionTransformer(img_size=SIZE, patch_size=8, in_chans=1, num_classes=10, **shape)
    elif family == "mixer":
        model = MlpMixer(img_size=SIZE, patch_size=8, in_chans=1, num_classes=10, embed_dim=4 * width, num_blocks=4)
    else:
        model = cnn(width, anti_aliased=family != "cnn")
    model.family = family
    model.pretrained_cfg = CONFIG
    return model


def train(family: str, size: str, tag: str, seed: int, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Trains a model by cross entropy with AdamW on one cycle.

    Args:
        family: One of ``FAMILIES``.
        size: One of ``WIDTHS``.
        tag: One of ``TAGS``.
        seed: Fixes initial weights, batches and augmentation.
        images: Training images, (N, 1, 32, 32).
        labels: Their classes.
        epochs: Passes over them, times what the family needs.

    Returns:
        The trained model.
    """
    torch.manual_seed(seed)
    model, augmentation, batch = build(family, size), Augmentation(TAGS[tag], seed), 32
    factor, rate = FAMILIES[family]
    epochs *= factor
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for rows in order[: len(order) // batch * batch].split(batch):
            loss = nn.functional.cross_entropy(model(augmentation(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Trains, studies, reports.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        What the study says of accuracy and equivariance.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study_digits"), help="folder for models and report")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of the cnn; transformers take four times as many, mixers two"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--num-images", type=int, default=256, help="images whose Lie derivatives are taken")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    for name in ("epochs", "seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    pictures, classes = digits(train=True)
    images = torch.tensor(np.stack([np.array(one) for one in pictures]))[:, None] / 255
    images, labels = (images - CONFIG["mean"][0]) / CONFIG["std"][0], torch.tensor(classes)
    weights = options.out / f"models-{options.epochs}-epochs"
    weights.mkdir(parents=True, exist_ok=True)
    specs = []
    for family in options.families:
        for size in options.sizes:
            for tag in TAGS:
                for seed in range(options.seeds):
                    name = f"{family} {size}, {tag}, seed {seed}"
                    path = weights / (name.replace(" ", "-").replace(",", "") + ".pt")
                    if not path.exists():
                        model = train(family, size, tag, seed, images, labels, options.epochs)
                        torch.save({"state_dict": model.state_dict(), "tag": tag}, path.with_suffix(".part"))
                        os.replace(path.with_suffix(".part"), path)
                        print(f"trained {name} ({time.monotonic() - started:.0f} s)", flush=True)
                    specs.append(ModelSpec(name, partial(build, family, size), path))
    settings = Settings(
        "digits", options.num_images, max(1024, options.num_images), layerwise=4, lee_output="probabilities"
    )
    study = options.out / f"study-{options.epochs}-epochs"
    run_study(specs, study, settings, batch_size=32)
    models = summarise(read_rows(study), read_records(study))
    found = correlations(models)
    told = answers(found)
    accuracy = [one["accuracy"] for one in models]
    print(f"\n{len(models)} models, accuracy {min(accuracy):.3f} to {max(accuracy):.3f}.")
    print("Spearman correlations, 95 % bootstrap intervals over models. Seeds of one configuration count separately,")
    print("so intervals are too narrow. Augmentation moves accuracy and error at once: see the correlations by tag.")
    print("\n".join([*told, *map(str, write_report(study))]))
    print(f"{time.monotonic() - started:.0f} s in all, {options.threads} threads.")
    return told


if __name__ == "__main__":
    main()
