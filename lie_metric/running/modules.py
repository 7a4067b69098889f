"""Which modules a model runs: those of its tree, and those that closures, partials and bound methods hold."""

from __future__ import annotations

import collections
import functools
import itertools
import random
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["CONTAINERS", "OWN", "Found", "configuration", "found_modules", "refuse_lazy"]

CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)

# What every module has of its own: hooks and the like, no place for a model's parts.
OWN = frozenset(nn.Module().__dict__)

# How far from the model a module is looked for; an object, neither container nor function, costs as much as three.
_REACH, _OBJECT = 9, 3

# Entries of a container that are looked at: parts of a model are few, a list of a million labels holds none.
_ENTRIES = 10_000


@dataclass
class Found:
    """The modules of a model, and its own sources of random numbers.

    Attributes:
        roots: The modules that ``eval()`` is called on: the model, or those that a function holds. A module that
            another one hides in a plain list is none of them: the model's own ``eval()`` does not reach it either.
        modules: All of them with their paths, by ``id``, because a module's hash may be its own.
        objects: Callable objects, no modules, that are the model or wrapped in it.
        generators: Generators of torch, NumPy and Python that they hold.
    """

    roots: list[nn.Module] = field(default_factory=list)
    modules: dict[int, tuple[str, nn.Module]] = field(default_factory=dict)
    objects: list[object] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)


def found_modules(model: object) -> Found:
    """The modules that a callable runs, as far as they can be reached from it.

    Looked into are modules, containers, ``functools.partial`` (function, arguments, keywords), bound methods
    (``__self__``), functions (closure cells, defaults, attributes, and the modules and functions of the same file that
    they name) and the attributes of objects. A module's plain attributes are looked into where they are containers or
    functions, and no further: a Lightning module holds its trainer.

    Args:
        model: A module or any other callable.

    Returns:
        The modules, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> [path for path, _ in found_modules(lambda x: net(x)).modules.values()]
        ['', '0']
    """
    # The values stand beside their ids, which would be given to others if those were gone.
    found, seen = Found(), dict[int, Any]()
    # Modules that a module hides come last, so that one that is a part of the model as well counts as that.
    hidden: list[tuple[Any, str, int]] = []
    ahead: list[tuple[Any, str, int, bool]] = [(model, "", _REACH, True)]
    while ahead or hidden:
        value, path, reach, open_ = ahead.pop() if ahead else (*hidden.pop(), False)
        if isinstance(value, _PLAIN) or id(value) in seen or reach < 0:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            if open_:
                found.roots.append(value)
            for name, module in value.named_modules(prefix=path):
                if id(module) in found.modules:
                    continue
                seen[id(module)] = module
                found.modules[id(module)] = name, module
                for key, held in module.__dict__.items():
                    if (
                        type(held) in _USUAL
                        or key in OWN
                        or (type(held) is tuple and _USUAL.issuperset(map(type, held)))
                    ):
                        continue
                    hidden.append((held, f"{name}.{key}" if name else key, _REACH))
        elif isinstance(value, _GENERATORS):
            found.generators.append(value)
        else:
            step = 1
            if not isinstance(value, (*CONTAINERS, *_FUNCTIONS)):
                if not open_:
                    continue
                step = _OBJECT
                if callable(value) and not type(value).__module__.startswith("torch."):
                    found.objects.append(value)
            # Reversed, because the last one is looked at first.
            ahead += [(held, path, reach - step, open_) for held in reversed(list(_held(value)))]
    return found


_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, Tensor,
          np.ndarray, torch.dtype, torch.device)  # fmt: skip
# The same for most attributes of most modules, at less cost.
_USUAL = frozenset({str, int, float, bool, type(None), Tensor})
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from itertools.islice(value.values(), _ENTRIES)
    elif isinstance(value, CONTAINERS):
        yield from itertools.islice(value, _ENTRIES)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords, value.__dict__)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from _held_by_function(value)
    else:
        yield from getattr(value, "__dict__", {}).values()
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(value, name, None)
        # How it is called may be a function that holds the modules; builtin ones hold none.
        for cls in type(value).__mro__:
            call = cls.__dict__.get("__call__")
            if isinstance(call, types.FunctionType):
                yield call
                break


def _held_by_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from (function.__defaults__, function.__kwdefaults__, function.__dict__)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module) or (
            isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
        ):
            yield value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def configuration(model: object) -> int:
    """What tells a model from itself after parts of it were exchanged or switched: its modules, and their choices.

    Choices are attributes that are truth values, texts, functions, classes or None, and buffers of truth values or
    bytes by how often they were written to. Numbers, which count and schedule, are none, nor is what stands outside
    modules.

    Args:
        model: A module or any other callable.

    Returns:
        A number that two configurations share by chance alone.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> before = configuration(net)
        >>> net[1] = nn.GELU()
        >>> configuration(net) == before
        False
    """
    told: list[Any] = []
    for path, module in found_modules(model).modules.values():
        told.append((path, id(module)))
        for name, value in module.__dict__.items():
            if name in OWN or name == "training":
                continue
            if type(value) in _CHOICES:
                told.append((name, value))
            elif isinstance(value, (type, *_FUNCTIONS, types.BuiltinFunctionType)):
                told.append((name, id(value)))
        if not isinstance(module, torch.jit.ScriptModule):
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in _SWITCHES and not buffer.is_inference():
                    told.append((name, buffer._version))
    return hash(tuple(told))


_CHOICES = frozenset({bool, str, type(None)})
_SWITCHES = frozenset({torch.bool, torch.uint8})


def refuse_lazy(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuses modules whose weights do not exist yet: the first pass would make them, and training finds them made.

    Args:
        modules: Paths and modules.

    Raises:
        RuntimeError: If a module has parameters or buffers that are not made yet.
    """
    for path, module in modules:
        for tensors in (module._parameters, module._buffers):
            lazy = [name for name, value in tensors.items() if value is not None and is_lazy(value)]
            if lazy:
                raise RuntimeError(
                    f"`model` must have its weights, got the lazy layer {path or 'of the model'!r} "
                    f"({type(module).__name__}) without {lazy}. Run one batch through the model first, e.g. "
                    "`with torch.no_grad(): model(images)`."
                )
