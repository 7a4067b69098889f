"""What the modules of a model hold: kept by reference, tensors by value, and given back."""

from __future__ import annotations

import array
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lie_metric.running.between import Between
from lie_metric.running.containers import MUTABLE, Saved, contents, give_back, names_of_slots, write_back
from lie_metric.running.draws import RandomStates
from lie_metric.running.modules import OWN, Found
from lie_metric.running.tensors import Kept, address_of, different, equal, version_of

__all__ = ["State"]

# What most attributes of modules are: nothing in them can be changed.
_ATOMS = frozenset({bool, int, float, str, type(None)})

# How many containers and objects inside one another are kept: an attribute, what it holds, and what that does.
_DEPTH = 3
# Libraries whose objects live on by themselves, such as the trainer of a module and what it logs to.
_FOREIGN = frozenset(
    {"builtins", "lightning", "lightning_fabric", "numpy", "pytorch_lightning", "torch", "torchmetrics"}
)
# Larger arrays than that are no counters: nobody would wait for copies of them.
_LARGEST = 2**24


_HOOKS = OWN - {"_parameters", "_buffers", "_modules"}


class State:
    """The state of a model's modules, which :meth:`restore` gives back.

    Kept are every module's attributes, buffers, parameters, submodules and hooks by reference, containers among them
    and objects of the model's own classes (and in those) entry by entry; numbers of these classes; buffers and arrays
    by value; of parameters their gradients and ``requires_grad``; the states of random sources. Other tensors are
    copied when something is about to write to them (:meth:`before_write`): copies of all weights would double their
    memory.

    Args:
        found: The modules.
    """

    def __init__(self, found: Found) -> None:
        modules = list(found.modules.values())
        self._modules = [module for _, module in modules]
        classes = {type(module) for _, module in modules}
        self._exchanging = {cls for cls in classes if _keeps_a_protocol(cls)}
        self._hooks = [
            value
            for module in self._modules
            for key, value in module.__dict__.items()
            if key in _HOOKS and isinstance(value, dict)
        ]
        self._random = RandomStates(found.generators)
        # Frozen scripted modules have no mode.
        self._modes = [(module, module.training) for _, module in modules if hasattr(module, "training")]
        self._packages = {cls.__module__.partition(".")[0] for cls in classes} - _FOREIGN
        self._references: list[tuple[Any, Saved]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._classes = [
            (cls, {name: value for name, value in vars(cls).items() if type(value) in _ATOMS})
            for cls in classes
            if cls.__module__.partition(".")[0] in self._packages
        ]
        self._met: set[int] = set()
        self._empty: list[Any] = []
        self._inference: list[tuple[Any, str | int]] = []
        self._scripted: list[tuple[Any, dict[str, Any]]] = []
        # Those of scripted modules have items, and cannot be iterated over.
        self._places = [
            (f"{path}.{name}".lstrip("."), module, name)
            for path, module in modules
            for name, _ in module._buffers.items()
        ]
        self._buffers: dict[int, Kept] = {}
        self._standing: list[tuple[str, nn.Module, str, Tensor | None, int]] = []
        self._tensors: dict[int, Kept] = {}
        self._gradients: list[tuple[str, Tensor, bool, Tensor | None, int]] = []
        self._memories: dict[int, list[Kept]] | None = None
        self._between: Between | None = None
        for path, module in modules:
            self._keep_module(f"{path}." if path else "", module)
        for value in found.objects:
            if hasattr(value, "__dict__"):
                self._keep_entries("", value.__dict__, _DEPTH)
        self._stand()

    def _keep_module(self, prefix: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule) and hasattr(module, "_concrete_type"):  # frozen ones keep nothing
            names = [name for name in module._concrete_type.get_attributes() if name != "training"]
            self._scripted.append((module._c, {name: module._c.getattr(name) for name in names}))
        if type(module) not in self._exchanging:
            self._keep_entries(prefix, module.__dict__, _DEPTH)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                self._inference.append((module._buffers, name))
            if buffer is not None and id(buffer) not in self._buffers:
                memory = buffer.detach()
                value = None if buffer.is_meta else memory.clone()
                self._buffers[id(buffer)] = Kept(prefix + name, buffer, memory, version_of(buffer), value)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            gradient = parameter.grad
            version = 0 if gradient is None else version_of(gradient)
            self._gradients.append((f"{prefix}{name}.grad", parameter, parameter.requires_grad, gradient, version))
            self._keep_tensor(prefix + name, parameter, module._parameters, name)

    def _keep_tensor(self, path: str, value: Tensor, holder: Any, name: str | int) -> None:
        if value.is_inference() and not isinstance(holder, tuple):
            self._inference.append((holder, name))
        kept = Kept(path, value, value.detach(), version_of(value), recorded=value.grad_fn is not None)
        self._tensors.setdefault(id(value), kept)

    def _keep_entries(self, prefix: str, container: Any, depth: int) -> None:
        """Keeps what a container holds: references, and what stands behind those that can change."""
        if not isinstance(container, tuple):
            self._references.append((container, contents(container)))
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if type(value) in _ATOMS:
                continue
            if isinstance(value, Tensor):
                self._keep_tensor(f"{prefix}{key}", value, container, key)
            elif key in OWN and isinstance(value, dict) and value:
                self._references.append((value, contents(value)))  # what is in them is looked at by itself
            elif isinstance(value, MUTABLE) or type(value) is tuple:
                # Most containers of a module are empty: those are not copied, for the garbage collector's sake.
                if not value:
                    self._empty.append(value)
                elif depth:
                    self._keep_entries(f"{prefix}{key}.", value, depth - 1)
            elif depth:
                self._keep_object(f"{prefix}{key}.", value, depth - 1)

    def _keep_object(self, prefix: str, value: Any, depth: int) -> None:
        """Keeps an array by its values, and of an object of the model's own classes the attributes."""
        if isinstance(value, (array.array, bytearray)):
            self._arrays.append((value, value[:]))
        elif type(value).__module__ == "numpy" and hasattr(value, "flags"):
            if value.flags.writeable and value.nbytes <= _LARGEST:
                self._arrays.append((value, value.copy()))
        elif (
            isinstance(value, types.SimpleNamespace) or type(value).__module__.partition(".")[0] in self._packages
        ) and not isinstance(value, (nn.Module, type, types.FunctionType, types.MethodType)):
            if id(value) in self._met:
                return
            self._met.add(id(value))
            if isinstance(getattr(value, "__dict__", None), dict):
                self._keep_entries(prefix, value.__dict__, depth)
            for name in (name for cls in type(value).__mro__ for name in names_of_slots(cls)):
                if hasattr(value, name):
                    self._slots.append((value, name, getattr(value, name)))

    def leave_inference(self) -> None:
        """Puts copies in the place of tensors made in inference mode: no derivative passes those."""
        copies: dict[int, Tensor] = {}
        for holder, name in self._inference:
            value = holder[name]
            if id(value) not in copies:
                copy = value.clone()
                copies[id(value)] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
            holder[name] = copies[id(value)]

    def evaluated(self) -> None:
        """Takes everything as it stands for the state of evaluation: what ``eval()`` made of it is no change."""
        self._stand()
        moved = different(self._buffers.values())
        same = {key: kept.value for key, kept in self._buffers.items() if key not in moved}
        self._between = Between(self._modules, same)

    def _stand(self) -> None:
        self._standing = []
        for path, module, name in self._places:
            buffer = _buffer(module, name)
            self._standing.append((path, module, name, buffer, 0 if buffer is None else version_of(buffer)))

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the function, which begins with attributes and buffers in the state of evaluation.

        Hooks that the call itself adds are taken off: a model that remembers by an attribute that it has added them
        would add them again in the next one. Parameters have no gradients until :meth:`restore` gives them back.

        Yields:
            Nothing.
        """
        if self._between is not None:
            self._between.restore()
        for _, parameter, *_ in self._gradients:
            if parameter.grad is not None:
                parameter.grad = None  # a model that calls `backward` would add to it
        counts = list(map(len, self._hooks))
        try:
            yield
        finally:
            for hooks, count in zip(self._hooks, counts, strict=True):
                while len(hooks) > count:
                    hooks.popitem()

    def before_write(self, tensor: Tensor) -> None:
        """Copies what the model holds in the memory of a tensor that is about to be written to.

        Args:
            tensor: The tensor.
        """
        if self._memories is None:
            self._memories = {}
            for kept in self._tensors.values():
                self._memories.setdefault(address_of(kept.tensor), []).append(kept)
        address = address_of(tensor)
        for kept in self._memories.get(address, ()):
            if kept.value is None:
                kept.value = kept.memory.clone()
        if self._between is not None:
            self._between.before_write(address)

    def restore(self) -> tuple[list[str], list[str]]:
        """Gives everything back; may be called again if it was interrupted.

        Returns:
            Paths of the buffers that were changed since :meth:`evaluated`, and of what could not be given back.
        """
        moved = different([kept for kept in self._buffers.values() if kept.value is not None])
        changed = [
            path
            for path, module, name, buffer, version in self._standing
            if _changed(module, name, buffer, version, moved)
        ]
        lost = [
            kept.path
            for kept in self._tensors.values()
            if kept.value is None and version_of(kept.tensor) != kept.version
        ]
        for kept in (*moved.values(), *self._tensors.values()):
            kept.restore()
        for path, parameter, required, gradient, version in self._gradients:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if gradient is not None and version_of(gradient) != version:
                lost.append(path)
        for scripted, attributes in self._scripted:
            for name, value in attributes.items():
                if scripted.getattr(name) is not value:
                    scripted.setattr(name, value)
        for container in self._empty:
            if container:  # an empty tuple stays so
                container.clear()
        for container, saved in self._references:
            give_back(container, saved)
        for holder, name, value in self._slots:
            if getattr(holder, name, None) is not value:
                object.__setattr__(holder, name, value)
        for cls, numbers in self._classes:
            for name, value in numbers.items():
                if vars(cls).get(name) is not value:
                    setattr(cls, name, value)
        for values, copy in self._arrays:
            write_back(values, copy)
        for module, mode in self._modes:
            if module.training != mode:
                module.training = mode
        self._random.restore()
        return changed, lost


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    # Those of scripted modules stand in no dictionary.
    return module._buffers[name] if name in module._buffers else None  # noqa: SIM401


def _changed(module: nn.Module, name: str, standing: Tensor | None, version: int, moved: dict[int, Kept]) -> bool:
    if standing is None:
        return False
    if version_of(standing) != version:
        return True
    kept = moved.get(id(standing))
    if kept is not None and kept.version == version:  # written to behind the count, as by way of `.data`
        return True
    present = _buffer(module, name)
    return present is not standing and (present is None or not equal(present, standing))


def _keeps_a_protocol(cls: type) -> bool:
    """Whether modules of a class keep account of what they exchange with other processes: that has to stay."""
    return any(
        base.__module__.startswith(("torch.distributed.", "torch.nn.parallel.distributed")) for base in cls.__mro__
    )
