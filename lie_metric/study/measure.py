"""What is measured of one model: Lie derivatives, accuracy, consistency, size, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lie_metric.layerwise import attributed
from lie_metric.metrics import LocalEquivarianceError
from lie_metric.orbits import uniform
from lie_metric.resampling import Resampling
from lie_metric.study.data import ImageSet, Prepared, class_numbers
from lie_metric.study.settings import LIE_MEASURES, Settings

__all__ = ["measure_model"]

Row = dict[str, Any]


def measure_model(
    model: Callable[..., Any],
    images: ImageSet,
    settings: Settings,
    *,
    device: torch.device,
    batch_size: int,
    workers: int = 0,
    chunk_size: int | None = None,
) -> tuple[list[Row], list[Row], list[str]]:
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
        Rows of the main table, one for each generator (one in all if no Lie derivative is asked for); rows by type of
        operation; remarks on values that could not be had.

    Raises:
        StudyError: If images cannot be read.
        ValueError: If they differ in size and the model does not say what it takes.
    """
    if isinstance(model, nn.Module):
        model.to(device)
    measures, stencil = settings.measures, settings.resampling
    remarks: list[str] = []
    metric = LocalEquivarianceError(
        settings.generators,
        lee_output=settings.lee_output,
        resampling=stencil,
        with_noise="sensitivity" in measures,
        chunk_size=chunk_size,
        seed=settings.seed,
    ).to(device)
    lie = any(name in measures for name in LIE_MEASURES)
    loader = DataLoader(Prepared(images, model), batch_size, num_workers=workers, collate_fn=_collate)
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
            common |= _size(model, batch[:1], remarks)
            with torch.no_grad():
                model(batch)  # the first call allocates and chooses kernels
        start = _now(device)
        with torch.no_grad():
            scores = model(batch)
        seconds["evaluation"] += _now(device) - start
        evaluated += len(batch)
        if isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > 1:
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
                same.append(_consistent(model, batch, predictions, indices.tolist(), settings, stencil))
        elif not remarks or not remarks[-1].startswith("no accuracy"):
            remarks.append("no accuracy or consistency: the output is no batch of class scores")
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
        return [{"generator": "", **common}], [], remarks
    values = metric.measures()
    rows = []
    for name in metric.names:
        row = {"generator": name, **common}
        for measure in LIE_MEASURES:
            if measure in measures:
                row[measure] = values[measure][name].item()
                row[f"{measure}_se"] = values[f"{measure}_standard_error"][name].item()
        rows.append(row)
    layers = _layers(model, loader, settings, stencil, device, remarks) if settings.layerwise else []
    return rows, layers, remarks


def _collate(items: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {tuple(image.shape) for image, _, _ in items}
    if len(sizes) > 1:
        raise ValueError(
            f"`data` must hold images of one size for a model without a data config, got {sorted(sizes)[:3]}. Give the "
            "model an attribute `pretrained_cfg` such as {'input_size': (3, 224, 224), 'mean': ..., 'std': ...}."
        )
    images, labels, numbers = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(numbers)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _size(model: Callable[..., Any], image: Tensor, remarks: list[str]) -> Row:
    """Parameters, multiply-additions of one image (convolutions, matrix products, attention), and its shape."""
    row: Row = {"input_size": "x".join(map(str, image.shape[1:]))}
    row["parameters"] = sum(one.numel() for one in model.parameters()) if isinstance(model, nn.Module) else None
    try:
        # With gradients off the counter fails where a module is called on a parameter (torch 2.15).
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            model(image)
        row["macs"] = counter.get_total_flops() // 2
    except Exception as error:  # a count is no reason to lose the measurement
        remarks.append(f"no MACs: {type(error).__name__}: {error}")
    return row


def _consistent(
    model: Callable[..., Any],
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
        return model(moved).argmax(1) == predictions


def _fraction(name: str, hits: list[Tensor]) -> Mapping[str, float | None]:
    """A share of images with its binomial standard error."""
    if not hits:
        return {name: None, f"{name}_se": None}
    all_hits = torch.cat(hits).double()
    share = all_hits.mean().item()
    return {name: share, f"{name}_se": math.sqrt(share * (1 - share) / len(all_hits))}


def _layers(
    model: Callable[..., Any],
    loader: DataLoader,
    settings: Settings,
    stencil: Resampling,
    device: torch.device,
    remarks: list[str],
) -> list[Row]:
    dataset = loader.dataset
    batch = torch.stack([dataset[number][0] for number in range(settings.layerwise)]).to(device)
    try:
        report = attributed(
            model, batch, settings.generators, probes=settings.probes, resampling=stencil, seed=settings.seed
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
            "calls": one.calls,
            "residual": residual[one.generator],
        }
        for one in report.by("type")
    ]
