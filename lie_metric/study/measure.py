"""What is measured of one model: Lie derivatives, accuracy, consistency, size, and what it costs."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lie_metric.layerwise import attributed
from lie_metric.measured import function_of
from lie_metric.metrics import LocalEquivarianceError
from lie_metric.options import Options
from lie_metric.orbits import uniform
from lie_metric.records import Record
from lie_metric.resampling import Resampling
from lie_metric.study.data import ImageSet, Prepared, class_numbers
from lie_metric.study.settings import LIE_MEASURES, Settings
from lie_metric.study.sources import selection

__all__ = ["Measured", "measure_model"]

Row = dict[str, Any]


class Measured(NamedTuple):
    """What was measured of a model.

    Attributes:
        rows: Rows of the main table, one for each generator; one in all if no Lie derivative is asked for.
        layers: Rows by type of operation.
        records: What comparisons with other models need, for each measure.
        remarks: On values that could not be had.
    """

    rows: list[Row]
    layers: list[Row]
    records: list[Record]
    remarks: list[str]


def measure_model(
    model: Callable[..., Any],
    images: ImageSet,
    settings: Settings,
    *,
    device: torch.device,
    batch_size: int,
    workers: int = 0,
    chunk_size: int | None = None,
) -> Measured:
    """Measures a model on a set, in one pass over its images.

    Args:
        model: A model in evaluation mode.
        images: The set.
        settings: What to measure.
        device: Where to.
        batch_size: Images in a batch.
        workers: Processes that read images.
        chunk_size: Tangents pushed through the model at once.

    Returns:
        Rows, layers, records and remarks.

    Raises:
        StudyError: If images cannot be read.
        ValueError: If they differ in size and the model does not say what it takes, or it does not take them.
    """
    if isinstance(model, nn.Module):
        model.to(device)
    measures, stencil, output = settings.measures, settings.resampling, selection(settings.output)
    remarks: list[str] = []
    # The map that is measured, also for accuracy: one tensor, with weights of half precision raised to float32.
    run = function_of(model, output)
    if isinstance(model, nn.Module) and any(one.dtype in _HALF for one in model.parameters()):
        remarks.append("weights in half precision, measured and timed in float32")
    metric = LocalEquivarianceError(
        settings.generators,
        output=output,
        lee_output=settings.lee_output,
        resampling=stencil,
        with_noise="sensitivity" in measures,
        chunk_size=chunk_size,
        seed=settings.seed,
    ).to(device)
    lie = any(name in measures for name in LIE_MEASURES)
    prepared = Prepared(images, model, settings.framing)
    loader = DataLoader(prepared, batch_size, num_workers=workers, collate_fn=_collate)
    common: Row = {"status": "ok", "stencil": str(stencil), "device": _device_name(device)}
    right: list[Tensor] = []
    same: list[Tensor] = []
    numbers: Tensor | None = None
    seen = evaluated = 0
    seconds = {"measurement": 0.0, "evaluation": 0.0}
    for batch, labels, indices in loader:
        if seen >= settings.num_images and not {"accuracy", "consistency"} & set(measures):
            break
        batch = batch.to(device)
        if not evaluated:
            _first_call(run, batch)
            common |= _size(model, run, batch[:1], remarks)
        start = _now(device)
        with torch.no_grad():
            scores = run(batch)
        seconds["evaluation"] += _now(device) - start
        evaluated += len(batch)
        if scores.ndim == 2 and scores.shape[1] > 1:
            predictions = scores.argmax(1)
            if numbers is None:
                found = class_numbers(images.classes, scores.shape[1], model)
                if found is None and "accuracy" in measures:
                    remarks.append(
                        f"no accuracy: the model has {scores.shape[1]} outputs, the set {len(images.classes)} classes"
                    )
                numbers = torch.tensor(found or [-1] * len(images.classes), device=device)
            if bool((numbers >= 0).all()):
                right.append(predictions == numbers[labels.to(device)])
            if "consistency" in measures:
                same.append(_consistent(run, batch, predictions, indices.tolist(), settings, stencil))
        elif {"accuracy", "consistency"} & set(measures) and evaluated == len(batch):
            shape = ", ".join(["B", *map(str, scores.shape[1:])])
            remarks.append(f"no accuracy or consistency: the output is no batch of class scores, its shape ({shape})")
        if lie and seen < settings.num_images:
            part = batch[: settings.num_images - seen]
            start = _now(device)
            metric.update(model, part)
            seconds["measurement"] += _now(device) - start
            seen += len(part)
    common |= {f"seconds_{name}": value for name, value in seconds.items()}
    common |= {"images": seen, "evaluation_images": evaluated, "method": metric.method_used or ""}
    if "accuracy" in measures:
        common |= _fraction("accuracy", right)
    if "consistency" in measures:
        common |= _fraction("consistency", same)
    if not lie:
        return Measured([{"generator": "", **common}], [], [], remarks)
    values = metric.measures()
    rows = []
    for name in metric.names:
        row = {"generator": name, **common}
        for measure in LIE_MEASURES:
            if measure in measures:
                row[measure] = values[measure][name].item()
                row[f"{measure}_se"] = values[f"{measure}_standard_error"][name].item()
        rows.append(row)
    layers = _layers(model, prepared, settings, device, remarks) if settings.layerwise else []
    records = metric.records([name for name in LIE_MEASURES if name in measures])
    return Measured(rows, layers, _told_apart(records, images, prepared, settings), remarks)


_HALF = {torch.float16, torch.bfloat16}


def _told_apart(records: Sequence[Record], images: ImageSet, prepared: Prepared, settings: Settings) -> list[Record]:
    """Records of which those can be compared that are of the same pictures, cut alike.

    A metric tells images apart by the pixels it was given. In a study these are normalised as each model wants it: a
    part of the model, which changes no derivative along motions of a picture whose border is made of itself.
    """
    kept = {"frame": prepared.frame, "output": settings.output}
    if settings.resampling.padding == "zeros" or "saturation" in settings.names:
        kept["normalisation"] = prepared.normalisation
    found = []
    for record in records:
        told = f"{images.fingerprint} {[int(count) for count in record.replicates.images]}"
        fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        found.append(replace(record, fingerprint=fingerprint, settings={**record.settings, **kept}))
    return found


def _first_call(run: Callable[[Tensor], Tensor], batch: Tensor) -> None:
    """Runs the model once, which allocates and chooses kernels, and says what it was given if it fails."""
    try:
        with torch.no_grad():
            run(batch)
    except (torch.OutOfMemoryError, TypeError):
        raise
    except Exception as error:
        shape = "x".join(map(str, batch.shape[1:]))
        raise ValueError(
            f"the model must take images of {shape} ({batch.dtype}), got {type(error).__name__}: {error}. Say what it "
            "takes with --input-size, --channels, --mean and --std, or by an attribute `pretrained_cfg` of the model."
        ) from error


def _collate(items: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {tuple(image.shape) for image, _, _ in items}
    if len(sizes) > 1:
        raise ValueError(
            f"`data` must hold images of one size for a model without a data config, got {sorted(sizes)[:3]}. Give "
            "--input-size, or the model an attribute `pretrained_cfg` such as {'input_size': (3, 224, 224), 'mean': "
            "..., 'std': ...}."
        )
    images, labels, numbers = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(numbers)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _size(model: Callable[..., Any], run: Callable[[Tensor], Tensor], image: Tensor, remarks: list[str]) -> Row:
    """Parameters, multiply-additions of one image (convolutions, matrix products, attention), and its shape."""
    row: Row = {"input_size": "x".join(map(str, image.shape[1:]))}
    row["parameters"] = sum(one.numel() for one in model.parameters()) if isinstance(model, nn.Module) else None
    try:
        # With gradients off the counter fails where a module is called on a parameter (torch 2.15).
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            run(image)
        row["macs"] = counter.get_total_flops() // 2
    except Exception as error:  # a count is no reason to lose the measurement
        remarks.append(f"no MACs: {type(error).__name__}: {error}")
    return row


def _consistent(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    predictions: Tensor,
    indices: list[int],
    settings: Settings,
    stencil: Resampling,
) -> Tensor:
    """Whether each image keeps its predicted class under a random shift that its number and the seed fix."""
    # The predictions of the images as they are exist already: the metric of that name would make them once more.
    orbit = uniform("translation", settings.max_shift, samples=1)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    (element,) = orbit.draw(indices, size, settings.seed, stencil)
    with torch.no_grad():
        moved = element.forward(images)
        return run(moved).argmax(1) == predictions


def _fraction(name: str, hits: list[Tensor]) -> Mapping[str, float | None]:
    """A share of images with its binomial standard error."""
    if not hits:
        return {name: None, f"{name}_se": None}
    all_hits = torch.cat(hits).double()
    share = all_hits.mean().item()
    return {name: share, f"{name}_se": math.sqrt(share * (1 - share) / len(all_hits))}


def _layers(
    model: Callable[..., Any],
    prepared: Prepared,
    settings: Settings,
    device: torch.device,
    remarks: list[str],
) -> list[Row]:
    batch = torch.stack([prepared[number][0] for number in range(settings.layerwise)]).to(device)
    try:
        report = attributed(
            model,
            batch,
            settings.generators,
            Options(output=selection(settings.output), resampling=settings.resampling),
            probes=settings.probes,
            seed=settings.seed,
        )
    except Exception as error:  # the measurement of the whole stands without its parts
        remarks.append(f"no layers: {type(error).__name__}: {error}")
        return []
    residual = report.residual
    return [
        {
            "generator": one.generator,
            "type": one.name,
            "squared_norm": one.squared_norm,
            "standard_error": one.standard_error,
            "share": one.share,
            "share_se": one.share_standard_error,
            "calls": one.calls,
            "residual": residual[one.generator],
        }
        for one in report.by("type")
    ]
