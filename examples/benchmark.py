"""What does a measurement cost? Time in units of the crudest finite difference, and peak memory, for any timm model.

The unit is one forward pass over (K + 1) · B images: what K + 1 plain forward passes cost that a finite difference of K
generators on B images needs. Double backward, the usual way, is given for one transform and for the nine named affine
ones. Everything is measured in one run, in turn, so that ratios hold on a machine whose speed drifts.

    python examples/benchmark.py resnet50 vit_tiny_patch16_224 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lie_metric as lm
from lie_metric.curves import strides_of
from lie_metric.layerwise import attributed
from lie_metric.lie import linearise
from lie_metric.options import Options

METHODS = ("forward", "forward vmap", "double_backward")
CHECKED = "default and its check, affine"


def load(name: str, batch: int, size: int, device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A timm model with random weights in evaluation mode, and a batch of noise.

    Args:
        name: Name of a timm model.
        batch: Number of images.
        size: Their side in pixels.
        device: Where both are put.

    Returns:
        The model, in which no matrix is left at zero, and the images.
    """
    import timm

    torch.manual_seed(0)
    options = {"img_size": size} if size != 224 else {}
    try:
        model = timm.create_model(name, **options)
    except TypeError:
        model = timm.create_model(name)
    for parameter in model.parameters():
        # A head that begins at zero gives an output that does not move, of which there is nothing to measure.
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    return model.eval().to(device), torch.randn(batch, 3, size, size, device=device)


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call.

    Args:
        run: What to time.
        device: The device it runs on, which is waited for.

    Returns:
        Seconds.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def runs(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The passes that are compared.

    Args:
        model: The model.
        images: B images.

    Returns:
        A function for each label.
    """
    affine, one = lm.generators("affine"), lm.generators("rotation")
    tiled = torch.randn(7 * len(images), *images.shape[1:], device=images.device)
    found: dict[str, Callable[[], object]] = {
        "plain forward, B": lambda: model(images),
        "unit: forward, 7 B": lambda: model(tiled),
        "double_backward, 1 transform": lambda: linearise(
            model, images, one, Options(method="double_backward"), verify=False
        ),
    }
    for method in METHODS[:2]:
        found[f"{method}, affine"] = lambda method=method: linearise(
            model, images, affine, Options(method=method), verify=False
        )
    # By default tangents go in two parts where tensors are large.
    found["default, affine"] = lambda: linearise(model, images, affine, verify=False)
    # The first batch of a metric: the method is checked against the function itself.
    found[CHECKED] = lambda: linearise(model, images, affine)
    return found


def memory_above_start(run: Callable[[], object], device: str) -> float:
    """Peak memory of one call above what is held when it starts.

    Args:
        run: What to measure.
        device: ``"cpu"`` (resident memory as Linux counts it) or ``"cuda"`` (what torch has allocated).

    Returns:
        MiB.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def status(entry: str) -> float:
    """An entry of this process's memory table.

    Args:
        entry: ``VmRSS`` or ``VmHWM``.

    Returns:
        MiB.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(entry))


def peak_memory(arguments: argparse.Namespace, name: str, label: str) -> float:
    """Peak memory of one pass, in a process of its own on the CPU.

    Args:
        arguments: The command line.
        name: The model.
        label: Which pass.

    Returns:
        MiB.
    """
    command = [sys.executable, __file__, name, "--memory-of", label, "--batch", str(arguments.batch)]
    command += ["--layerwise", str(arguments.layerwise or 0)]
    command += ["--size", str(arguments.size), "--threads", str(arguments.threads), "--device", arguments.device]
    # Memory that was freed goes back at once: what is in use is counted, not what the C library keeps of it.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | malloc)
    return float(json.loads(done.stdout.splitlines()[-1]))


def report(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """Measures a model and prints its table.

    Args:
        arguments: The command line.
        name: The model.

    Returns:
        Median cost in units by label.
    """
    model, images = load(name, arguments.batch, arguments.size, arguments.device)
    passes = runs(model, images)
    times: dict[str, list[float]] = {label: [] for label in passes}
    with torch.no_grad():
        for label, run in passes.items():
            if "double" not in label:
                run()
        for _ in range(arguments.repeats):
            for label, run in passes.items():
                times[label].append(seconds(run, arguments.device))
    print(f"\n{name}: B={arguments.batch}, {arguments.size} px, K=6 tangents for the 9 named affine generators,")
    print(f"{arguments.threads} thread(s), {arguments.device}, torch {torch.__version__}, {arguments.repeats} repeats")
    print(
        f"{'pass':32}{'seconds':>10}{'units':>8}{'(min to max)':>18}"
        + ("" if arguments.no_memory else f"{'peak MiB':>10}")
    )
    ratios = {}
    for label, values in times.items():
        units = [value / unit for value, unit in zip(values, times["unit: forward, 7 B"], strict=True)]
        ratios[label] = median(units)
        line = f"{label:32}{median(values):10.3f}{median(units):8.2f}{f'({min(units):.2f} to {max(units):.2f})':>18}"
        print(line + ("" if arguments.no_memory else f"{peak_memory(arguments, name, label):10.0f}"), flush=True)
    parts = zip(times[CHECKED], times["default, affine"], strict=True)
    check = median((checked - without) / without for checked, without in parts) * arguments.batch / 256
    ratios["check"] = check
    print(f"the check, once for a model: {check:.1%} of measuring 256 images")
    usual = 9 * ratios["double_backward, 1 transform"]
    print(
        f"nine transforms by double backward: {usual:.1f} units, {usual / ratios['default, affine']:.0f} times as much"
    )
    return ratios


def report_layers(arguments: argparse.Namespace, name: str) -> float:
    """Measures the attribution by layer, in plain forward passes of one image, and prints the lines.

    Args:
        arguments: The command line.
        name: The model.

    Returns:
        Median cost of an image after the first, in forward passes.
    """
    model, images = load(name, 3, arguments.size, arguments.device)
    probes = arguments.layerwise
    passes = layer_runs(model, images, probes)
    times: dict[str, list[float]] = {label: [] for label in passes}
    with torch.no_grad():
        model(images[:1])
        for _ in range(arguments.repeats):
            for label, run in passes.items():
                times[label].append(seconds(run, arguments.device))
    plain, one, three, usual = map(median, times.values())
    cost = (three - one) / 2 / plain
    what = f"shares, and squared norms by {probes} probes" if probes else "shares alone"
    print(
        f"by layer, 9 generators (K=6), {what}: {cost:.0f} forward passes an image, {one / plain - cost:.0f} once for "
        f"the check;\none double backward, of one generator: {usual / plain:.1f}",
        flush=True,
    )
    if not arguments.no_memory:
        peaks = [f"{label}: {peak_memory(arguments, name, label):.0f}" for label in passes]
        print("peak MiB: " + "; ".join(peaks), flush=True)
    return cost


def layer_runs(model: torch.nn.Module, images: torch.Tensor, probes: int) -> dict[str, Callable[[], object]]:
    """A plain pass, the attribution by layer of one image and of all, and a double backward to compare it with.

    Args:
        model: The model.
        images: Some images.
        probes: Number of probes; 0 for shares alone.

    Returns:
        A function for each label.
    """
    rotation, one = lm.generators("rotation"), images[:1]
    return {
        "plain forward, one image": lambda: model(one),
        "by layer, one image": lambda: attributed(model, one, "affine", probes=probes or None),
        "by layer, three images": lambda: attributed(model, images, "affine", probes=probes or None),
        "double_backward, one image": lambda: linearise(
            model, one, rotation, Options(method="double_backward"), verify=False
        ),
    }


def report_companions(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """Measures what each metric costs for a batch, in plain forward passes of it, and prints the table.

    Args:
        arguments: The command line.
        name: The model.

    Returns:
        Median cost by metric.
    """
    model, images = load(name, arguments.batch, arguments.size, arguments.device)
    shifts = lm.orbits.uniform("translation", 0.25, samples=4)
    metrics: dict[str, lm.metrics.base.ModelMetric] = {
        "LocalEquivarianceError, affine": lm.LocalEquivarianceError("affine", with_noise=False),
        "LocalEquivarianceError, affine, noise": lm.LocalEquivarianceError("affine"),
        "FiniteEquivarianceError, 5 angles": lm.FiniteEquivarianceError(
            lm.orbits.listed("rotation", (0.05, 0.1, 0.2, 0.4, 0.8))
        ),
        "LatticeEquivarianceError, flips": lm.LatticeEquivarianceError("flips"),
        "PredictionConsistency, 4 shifts": lm.PredictionConsistency(shifts),
        "OrbitVariance, 4 shifts": lm.OrbitVariance(shifts),
        "RelaxedEquivarianceError, 4 shifts": lm.RelaxedEquivarianceError(shifts),
        "BandLimitedEquivariance, 3 kinds": lm.BandLimitedEquivariance(),
        "RelativeStability": lm.RelativeStability(),
    }
    costs: dict[str, list[float]] = {label: [] for label in metrics}
    model(images)
    for _ in range(arguments.repeats):
        with torch.no_grad():
            plain = seconds(lambda: model(images), arguments.device)
        for label, metric in metrics.items():
            costs[label].append(seconds(lambda metric=metric: metric.update(model, images), arguments.device) / plain)
    print(f"metrics, in plain forward passes of the same {arguments.batch} images:")
    for label, values in costs.items():
        print(f"{label:40}{median(values):8.1f}{f'({min(values):.1f} to {max(values):.1f})':>18}", flush=True)
    return {label: median(values) for label, values in costs.items()}


def report_epoch(arguments: argparse.Namespace, name: str = "") -> float:
    """Measures the monitor's share of an epoch of training.

    Args:
        arguments: The command line.
        name: A model of timm, for an epoch of ImageNet's 1,281,167 images; without it a resnet18 with a 3×3 stem, for
            one of CIFAR's 50,000 images of 32 px.

    Returns:
        Median share.
    """
    import timm

    model = timm.create_model(name or "resnet18", num_classes=1000 if name else 10).to(arguments.device)
    size, batch, total = (arguments.size, arguments.batch, 1_281_167) if name else (32, 128, 50_000)
    if not name:
        model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False).to(arguments.device)
        model.maxpool = torch.nn.Identity()
    images = torch.randn(batch, 3, size, size, device=arguments.device)
    labels = torch.arange(batch, device=arguments.device) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step() -> None:
        model.train()
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def measure(usual: bool = False, **options: Any) -> None:
        """What the monitor does in one epoch: the method that was found is checked again."""
        program = lm.EquivarianceMonitor(**options).program
        measurement = program.measurement(images.device, program.seldom(3) if usual else frozenset())
        measurement.strides = strides_of(256)
        measurement.local.expect(checked)
        for start in range(0, 256, batch):
            measurement.update(model, images[: 256 - start], list(range(start, min(start + batch, 256))))
        measurement.finish(model)
        for metric in measurement.metrics.values():
            metric.compute()

    kinds: dict[str, dict[str, Any]] = {
        "EquivarianceMonitor(), an epoch with floor and linearity": {},
        "EquivarianceMonitor(), an epoch without them": {"usual": True},
        "EquivarianceMonitor(floor=False, displacement=None)": {"floor": False, "displacement": None},
    }
    step()
    checked = lm.LocalEquivarianceError("rotation")
    checked.update(model, images[:2])
    shares: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        epoch = seconds(step, arguments.device) * total / batch
        for kind, options in kinds.items():
            shares[kind].append(seconds(partial(measure, **options), arguments.device) / epoch)
    kind_of = "bfloat16" if arguments.bf16 else "float32"
    print(f"\nOf an epoch of {total:,} images of {size} px, {name or 'resnet18'} in {kind_of}, 256 images measured:")
    for kind, found in shares.items():
        print(f"{kind}: {median(found):.3%} ({min(found):.3%} to {max(found):.3%})", flush=True)
    return median(shares["EquivarianceMonitor(), an epoch with floor and linearity"])


def report_geometry(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints what a graph network and a network of volumes cost by each method, in plain forward passes.

    Args:
        arguments: The command line.

    Returns:
        Median cost by network and label.
    """
    sys.path.insert(0, str(Path(__file__).parent))
    from networks import EGNN, UNet3d

    torch.manual_seed(0)
    points, field = lm.representations.Points(3), lm.representations.Field(3)
    small = arguments.size < 224
    cases: dict[str, tuple[torch.nn.Module, torch.Tensor, Any, tuple[lm.Generator, ...]]] = {
        "EGNN, B=64, N=24, 6 generators": (
            EGNN().eval(), torch.randn(4 if small else 64, 24, 3), points, lm.generators("rigid", dimension=3)
        ),
        "3-D U-Net, B=1, 16³ voxels, 12 tangents": (
            UNet3d().eval(), torch.randn(1, 1, *[8 if small else 16] * 3), field, lm.generators("affine", dimension=3)
        ),
    }  # fmt: skip
    table: dict[str, dict[str, float]] = {}
    for name, (model, inputs, layout, generators) in cases.items():
        options = {"input_representation": layout, "output_representation": layout}
        passes: dict[str, Callable[[], object]] = {"plain forward": lambda model=model, inputs=inputs: model(inputs)}
        for method in ("auto", "forward vmap", "double_backward", "difference"):
            passes[method] = lambda method=method, model=model, inputs=inputs, generators=generators, options=options: (
                linearise(model, inputs, generators, Options(method=method, **options), verify=False)
            )
        passes[CHECKED] = lambda model=model, inputs=inputs, generators=generators, options=options: linearise(
            model, inputs, generators, Options(**options)
        )
        rounds = []
        with torch.no_grad():
            for run in passes.values():
                run()
            for _ in range(arguments.repeats):
                times = {label: seconds(run, "cpu") for label, run in passes.items()}
                rounds.append({label: time / times["plain forward"] for label, time in times.items()})
        table[name] = {label: median(each[label] for each in rounds) for label in passes}
        print(f"\n{name}: plain forward passes, median of {arguments.repeats} rounds")
        for label in passes:
            low, high = (bound(each[label] for each in rounds) for bound in (min, max))
            print(f"  {label:40} {table[name][label]:6.1f}   ({low:.1f} to {high:.1f})")
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs the benchmark.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        Median cost in units by model and label.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50", "vit_tiny_patch16_224"], help="timm names")
    parser.add_argument("--batch", type=int, default=8, help="images, B")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows the median")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory, which takes a process each")
    help_layers = "measure the attribution by layer as well: shares, and with probes squared norms"
    parser.add_argument("--layerwise", type=int, nargs="?", const=0, metavar="PROBES", help=help_layers)
    parser.add_argument("--companions", action="store_true", help="measure what each metric costs as well")
    help_epoch = "measure the monitor's share of an epoch as well: of CIFAR's size, or of ImageNet's for models of timm"
    parser.add_argument("--epoch", nargs="*", metavar="NAME", help=help_epoch)
    parser.add_argument("--bf16", action="store_true", help="train these epochs under autocast in bfloat16")
    help_geometry = "measure a graph network and a network of volumes by each method, and no timm model"
    parser.add_argument("--geometry", action="store_true", help=help_geometry)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        model, images = load(arguments.models[0], arguments.batch, arguments.size, arguments.device)
        with torch.no_grad():
            passes = runs(model, images) | layer_runs(model, images[:3], arguments.layerwise or 0)
            print(json.dumps(memory_above_start(passes[arguments.memory_of], arguments.device)))
        return {}
    if arguments.geometry:
        return report_geometry(arguments)
    ratios = {}
    for name in arguments.models:
        ratios[name] = report(arguments, name)
        if arguments.layerwise is not None:
            ratios[name]["by layer"] = report_layers(arguments, name)
        if arguments.companions:
            ratios[name] |= report_companions(arguments, name)
    if arguments.epoch is not None:
        ratios["epoch"] = {name or "monitor": report_epoch(arguments, name) for name in arguments.epoch or [""]}
    return ratios


if __name__ == "__main__":
    main()
