"""Calls of a module of which its logs and metrics know nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric

from lie_metric.callbacks.trainers import is_a

__all__ = ["silence"]


@contextmanager
def silence(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Keeps calls of a module out of its logged values and its metrics.

    ``log`` and ``log_dict`` of it and of Lightning modules inside it do nothing, loggers take nothing, and what
    torchmetrics objects held by any of its modules have seen is undone; only their ``forward`` counts meanwhile,
    because it returns a value.

    Args:
        trainer: The trainer.
        pl_module: The module.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        loggers = trainer.loggers
        if loggers:
            stack.callback(setattr, trainer, "loggers", loggers)
            trainer.loggers = [DummyLogger() for _ in loggers]
        for module in pl_module.modules():
            if is_a(module, "LightningModule"):
                for name in ("log", "log_dict"):
                    stack.enter_context(_attribute(module, name, _nothing))
        stack.enter_context(_undone(_metrics_of(pl_module)))
        yield


def _nothing(*args: object, **kwargs: object) -> None:
    """Does nothing, whatever it is given."""


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Something else under a name of an object itself, not of its class."""
    attributes = vars(module)
    had, old = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        if had:
            attributes[name] = old


def _metrics_of(module: nn.Module) -> list[Metric]:
    """The metrics among a module's modules, and in their plain attributes, lists and mappings."""
    found: dict[int, nn.Module] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            if id(value) not in found:
                found[id(value)] = value
                for attribute in list(vars(value).values()):
                    look(attribute, 3)
        elif depth and isinstance(value, (list, tuple, dict)) and len(value) <= 1024:
            for entry in list(value.values() if isinstance(value, dict) else value):
                look(entry, depth - 1)

    look(module, 3)
    return [value for value in found.values() if isinstance(value, Metric)]


@contextmanager
def _undone(metrics: list[Metric]) -> Iterator[None]:
    """Gives metrics everything back that they had seen."""
    attributes = [(metric, dict(vars(metric))) for metric in metrics]
    # Members of a collection may share the tensors of their states: each is kept once.
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    lists: list[tuple[list[Any], list[Any]]] = []
    for _, held in attributes:
        for value in held.values():
            if isinstance(value, Tensor):
                tensors[id(value)] = value, value.detach().clone()
            elif isinstance(value, list):
                lists.append((value, list(value)))
    inside = [0]
    for metric in metrics:
        _count_only_forward(metric, inside)
    try:
        yield
    finally:
        for metric, held in attributes:
            vars(metric).clear()
            vars(metric).update(held)
        for now, before in lists:
            now[:] = before
        for tensor, value in tensors.values():
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)


def _count_only_forward(metric: Metric, inside: list[int]) -> None:
    """Makes ``update`` do nothing unless a metric's ``forward`` calls it, which needs it for its value."""
    real_update, real_forward = metric.update, metric.forward

    def update(*args: Any, **kwargs: Any) -> None:
        if inside[0]:
            real_update(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        inside[0] += 1
        try:
            return real_forward(*args, **kwargs)
        finally:
            inside[0] -= 1

    vars(metric)["update"], vars(metric)["forward"] = update, forward
