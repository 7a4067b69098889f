"""Which measure orders networks by their invariance to shifts, and which does not?

    python examples/which_measure.py

trains small networks on images of points and on handwritten digits: not at all, plainly, with shifted images, with a
penalty on Lie derivatives, and one that is invariant by construction. What is true is known without interpolation: how
far the output moves when images whose content keeps away from the frame are shifted by two whole pixels. The table says
how many of the ten pairs of networks each measure puts in the true order.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lie_metric as lm
from lie_metric import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from compare_augmentations import digits

SIZE = 32
AXES = ("translation_x", "translation_y")
SHIFTS = lm.orbits.uniform("translation", 0.25, samples=4, name="shifts")
Data = tuple[Tensor, Tensor]


def points(count: int, reach: float, seed: int) -> Data:
    """Images of one bright point, of two side by side, and of two on top of each other.

    Args:
        count: Number of images.
        reach: How far their centre is from that of the image at most, in pixels along each axis.
        seed: Seed.

    Returns:
        Images (N, 1, 32, 32) and labels (N,).
    """
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centre = (torch.rand(count, 2, generator=source) * 2 - 1) * reach
    apart = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])[labels]
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    images = torch.zeros(count, SIZE, SIZE)
    for side in (1, -1):
        x, y = (centre + side * apart).unbind(1)
        along_x = torch.exp(-((axis - x[:, None]) ** 2) / 4)
        along_y = torch.exp(-((axis - y[:, None]) ** 2) / 4)
        images += along_y[:, :, None] * along_x[:, None, :]
    return images[:, None], labels


def placed() -> nn.Module:
    """A network whose last layer sees where things are."""
    body = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32 * (SIZE // 4) ** 2, 10))


def invariant() -> nn.Module:
    """Circular convolutions without striding and a global mean: shifts by whole pixels change nothing."""
    layers: list[nn.Module] = []
    for inside, outside in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inside, outside, 5, padding=2, padding_mode="circular"), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(model: nn.Module, data: Data, epochs: int, *, shifted: bool = False, penalty: float = 0.0) -> nn.Module:
    """Trains with AdamW, on images shifted by up to 4 pixels along each axis or with a penalty, if asked for."""
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    source = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=source).split(64):
            x, y = images[rows], labels[rows]
            if shifted:
                dx, dy = torch.randint(-4, 5, (2, len(x)), generator=source).tolist()
                x = torch.stack([image.roll((b, a), (1, 2)) for image, a, b in zip(x, dx, dy, strict=True)])
            loss = nn.functional.cross_entropy(model(x), y)
            if penalty:
                loss = loss + penalty * lm.equivariance_penalty(model, x[:32], AXES)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def networks(data: Data, epochs: int) -> dict[str, nn.Module]:
    """The five networks, by how they came about."""

    def fresh(make: object = placed) -> nn.Module:
        torch.manual_seed(0)
        return make()  # type: ignore[operator]

    return {
        "untrained": fresh().eval(),
        "plain": train(fresh(), data, epochs),
        "shifted images": train(fresh(), data, epochs, shifted=True),
        "penalty": train(fresh(), data, epochs, penalty=0.02),
        "by construction": train(fresh(invariant), data, 2 * epochs),
    }


def measures(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Every measure of one network, so that smaller is more invariant; means over both axes."""
    metric = lm.LocalEquivarianceError(AXES, with_noise=True)
    metric.update(model, images)

    def mean(values: Mapping[str, Tensor]) -> float:
        return torch.stack(list(values.values())).mean().item()

    rolls = [lm.lattice.Roll(*step) for step in ((2, 0), (-2, 0), (0, 2), (0, -2))]
    far = lm.orbits.listed(AXES, (0.25,))
    return {
        "truth: two whole pixels": mean(F.lattice_equivariance_error(model, images, rolls)),
        "LEE of probabilities": mean(F.lee(model, images, AXES, output="probabilities")),
        "LEE of scores": mean(metric.lee()),
        "relative": mean(metric.relative()),
        "sensitivity": mean(metric.sensitivity()),
        "finite error, 4 pixels": mean(F.finite_equivariance_error(model, images, far)),
        "1 - consistency": 1 - mean(F.prediction_consistency(model, images, SHIFTS)),
        "orbit variance": mean(F.orbit_variance(model, images, SHIFTS)),
        "E'": mean(F.relaxed_equivariance_error(model, images, SHIFTS)),
        "E' / norm": mean(F.relaxed_equivariance_error(model, images, SHIFTS, normalise=True)),
    }


def right(found: Sequence[float], truth: Sequence[float]) -> int:
    """How many pairs two lists put in the same order."""
    pairs = itertools.combinations(range(len(truth)), 2)
    return sum((found[i] - found[j]) * (truth[i] - truth[j]) > 0 for i, j in pairs)


def table(name: str, data: Data, models: Mapping[str, nn.Module]) -> dict[str, list[float]]:
    """Measures all networks, prints the table, and returns its rows."""
    images, labels = data
    columns = {label: measures(model, images) for label, model in models.items()}
    rows = {row: [columns[label][row] for label in models] for row in next(iter(columns.values()))}
    with torch.no_grad():
        accuracy = [(model(images).argmax(1) == labels).float().mean().item() for model in models.values()]
    print(f"\n{name}, {len(images)} images; smaller means more invariant")
    print(f"{'':26}" + "".join(f"{label:>17}" for label in models) + f"{'right pairs':>14}")
    truth = rows["truth: two whole pixels"]
    pairs = len(truth) * (len(truth) - 1) // 2
    for row, values in rows.items():
        score = "" if row.startswith("truth") else f"{right(values, truth)} of {pairs}"
        print(f"{row:26}" + "".join(f"{value:17.3g}" for value in values) + f"{score:>14}")
    print(f"{'(accuracy)':26}" + "".join(f"{value:17.3f}" for value in accuracy))
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Runs both data sets.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        For each data set the measures' values over the networks.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--num-images", type=int, default=256, help="validation images that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/which_measure"), help="where the picture goes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    learn, check, _, _ = digits()
    sets = {
        "points": (points(1440, 1.0, 0), points(arguments.num_images, 4.0, 1)),
        "digits": (learn.tensors, tuple(part[: arguments.num_images] for part in check.tensors)),  # type: ignore[attr-defined]
    }
    results, curves = {}, {}
    for name, (training, validation) in sets.items():
        models = networks(training, arguments.epochs)
        results[name] = table(name, validation, models)
        for label, model in models.items():
            metric = lm.FiniteEquivarianceError(lm.orbits.listed("translation_x", (0.03, 0.0625, 0.125, 0.25, 0.375)))
            metric.update(model, validation[0])
            curves.setdefault(label, {})[name] = metric.curves()["translation_x"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    caption = f"error of shifts along x, {arguments.num_images} images, stencil bspline, bars: one standard error"
    figure = lm.figures.error_curves(curves, caption=caption)
    for axis in figure.axes:
        axis.set_xlabel("t (half side, 16 pixels)", fontsize=8)
    figure.savefig(arguments.out / "curves.png", dpi=120)
    print(f"\n{time.perf_counter() - start:.0f} s; picture: {arguments.out / 'curves.png'}")
    return results


if __name__ == "__main__":
    main()
