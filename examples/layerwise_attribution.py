"""Which operations break a symmetry, and how much of the answer is the stencil's?

    python examples/layerwise_attribution.py

trains a small CNN, the same with anti-aliased down-sampling, and a vision transformer on handwritten digits, attributes
their translation and rotation errors to types of operation with three stencils, and checks that the attribution sees
the anti-aliasing. `--models resnet18 vit_tiny_patch16_224 --pretrained` does the attribution for any timm models.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lie_metric as lm

GENERATORS = ("translation_x", "rotation")
STENCILS = {
    "bilinear": lm.PAPER,
    "bspline": lm.Resampling(),
    "fourier": lm.Resampling("fourier", "reflection"),
}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits at 32 pixels, standardised, in a fixed random order.

    Returns:
        Images (1797, 1, 32, 32) and labels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.pad(nn.functional.interpolate(images, size=24, mode="bicubic"), (4, 4, 4, 4))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], torch.tensor(data.target)[order]


def cnn(anti_aliased: bool = False) -> nn.Module:
    """Convolutions with ReLU and two down-samplings, by maximum or by timm's BlurPool.

    Args:
        anti_aliased: Whether to blur before dropping pixels.

    Returns:
        The model with random weights.
    """
    from timm.layers import BlurPool2d

    def down(channels: int) -> nn.Module:
        pool = nn.MaxPool2d(2, 1) if anti_aliased else nn.MaxPool2d(2)
        return nn.Sequential(pool, BlurPool2d(channels, stride=2)) if anti_aliased else pool

    layers: list[nn.Module] = []
    for inside, outside in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        if outside < 64:
            layers.append(down(outside))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """A vision transformer of four blocks on patches of 8 pixels."""
    from timm.models import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**sizes, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2)


MODELS = {"cnn": cnn, "cnn, anti-aliased": lambda: cnn(True), "vit": vit}


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """Trains a classifier on all but 360 images.

    Args:
        model: The model; it is left in evaluation mode.
        images: Images.
        labels: Labels.
        epochs: Epochs.

    Returns:
        Accuracy on the 360.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    source = torch.Generator().manual_seed(0)
    steps = (len(images) - 360) // 32
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images) - 360, generator=source)[: steps * 32].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(images[-360:]).argmax(1) == labels[-360:]).float().mean().item()


def report(name: str, model: nn.Module, images: Tensor, probes: int, out: Path) -> dict[str, lm.LayerwiseReport]:
    """Attributes a model with every stencil, prints the shares and draws the picture of the default one.

    Args:
        name: The model's name.
        model: The model.
        images: Images to measure.
        probes: Number of random probes of the squared norms.
        out: Folder for the picture.

    Returns:
        The reports by stencil.
    """
    reports = {
        stencil: lm.layerwise_equivariance_error(model, images, GENERATORS, probes=probes, resampling=resampling)
        for stencil, resampling in STENCILS.items()
    }
    for generator in GENERATORS:
        print(f"\n{name}, {generator}: share of the error ± standard error (squared norm / dim) by type and stencil")
        rows = {
            stencil: {row.name: row for row in found.by("type") if row.generator == generator}
            for stencil, found in reports.items()
        }
        print(f"  {'type':24}" + "".join(f"{stencil:>30}" for stencil in STENCILS))
        for kind in rows["bspline"]:
            found = [row[kind] for row in rows.values()]
            shares = [f"{100 * one.share:6.1f} ± {100 * one.share_standard_error:.1f} %" for one in found]
            cells = [f"{share} ({one.squared_norm:.1e})" for share, one in zip(shares, found, strict=True)]
            if any(abs(row[kind].share) > 5e-3 for row in rows.values()):
                print(f"  {kind:24}" + "".join(f"{cell:>30}" for cell in cells))
        residuals = [f"{found.residual[generator]:.1e}" for found in reports.values()]
        print(f"  {'completeness error':24}" + "".join(f"{cell:>30}" for cell in residuals))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"layers-{name.replace(', ', '-')}.png"
    reports["bspline"].plot().savefig(path, dpi=110)
    print(f"Picture: {path}")
    return reports


def down_sampling(found: lm.LayerwiseReport, model: nn.Module, images: Tensor) -> tuple[float, float]:
    """What the two down-samplings of a CNN add to its translation error, comparable between networks.

    Args:
        found: The CNN's report.
        model: The CNN.
        images: Images over which its outputs vary.

    Returns:
        Norm of their contribution and of the whole Lie derivative, in output standard deviations per half side.
    """
    with torch.no_grad():
        spread = model(images).var(0).mean().item()
    rows = [row for row in found.by("module", 1) if row.generator == "translation_x" and row.name in {"3", "7"}]
    whole = next(row for row in found.by("module", 0) if row.generator == "translation_x")
    return (sum(row.squared_norm for row in rows) / spread) ** 0.5, (whole.squared_norm / spread) ** 0.5


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, lm.LayerwiseReport]]:
    """Trains, attributes, prints and draws.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        The reports by model and stencil.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="timm names instead of the three small models trained here")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights (needs a network)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    options = parser.parse_args(argv)
    for name in ("epochs", "num_images", "probes", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = {}
    if options.models:
        import timm

        for name in options.models:
            model = timm.create_model(name, pretrained=options.pretrained).eval()
            size = timm.data.resolve_model_data_config(model)["input_size"]
            torch.manual_seed(0)
            results[name] = report(name, model, torch.randn(options.num_images, *size), options.probes, options.out)
        return results
    images, labels = digits()
    added = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        accuracy = train(model, images, labels, options.epochs)
        print(f"\n{name}: accuracy {100 * accuracy:.1f} %")
        results[name] = report(name, model, images[-options.num_images :], options.probes, options.out)
        if name.startswith("cnn"):
            added.append(down_sampling(results[name]["bspline"], model, images[-360:]))
    (plain, all_plain), (smooth, all_smooth) = added
    print(
        "\nDown-sampling adds, in output standard deviations per half side of translation (bspline), the two steps in "
        f"squares: {plain:.2f} with max pooling (whole model {all_plain:.2f}), {smooth:.2f} with a blur before pixels "
        f"are dropped (whole model {all_smooth:.2f}): {'less' if smooth < plain else 'not less'} when anti-aliased."
    )
    print(
        "Shares are signed and add up to 100 %; squared norms do not add up. How hidden tensors move was assumed from\n"
        "their layout, so a share says where the error enters under that assumption.\n"
        f"{time.monotonic() - started:.0f} s in all."
    )
    return results


if __name__ == "__main__":
    main()
