"""Models whose weights are dealt out over processes, made whole in each of them for a measurement."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from lie_metric.running.processes import add_up, process
from lie_metric.running.shared import Places, buffers_of_the_first, shared_buffers

__all__ = ["Unsharded", "gather", "is_sharded", "refuse_sharded", "unsharded"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PACKAGE, _TENSORS = "torch.distributed.fsdp", "torch.distributed.tensor"
_SHARDED, _WRAPPER = "FSDPModule", "FullyShardedDataParallel"


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its whole weights in this process, as one that was never sharded; afterwards it is as it was.

    Under FSDP each forward pass is an exchange among processes, in which all of them have to take part equally often.
    How often a measurement runs a model depends on its images and on the model, so it is run without exchanges: the
    weights are gathered once, and what stands in their place meanwhile is a plain module, whose class, hooks and
    parameters know nothing of sharding. Its buffers are those of the first process, because running statistics are each
    process's own. Each device has to hold the whole weights once more, in the precision in which they are sharded;
    gradients and the state of the optimizer stay dealt out.

    Every process has to enter, at the same time; inside, each may measure what it likes.

    Args:
        model: A module to which ``fully_shard`` (FSDP2) or ``FullyShardedDataParallel`` (FSDP1) was applied, the
            outermost one; any other is yielded as it is. A wrapper of FSDP1 within another one may be given after the
            first forward pass of that alone: before, it would take itself for the outermost.

    Yields:
        The module to measure: the one that was given, or for FSDP1 the one in its wrapper.

    Raises:
        ValueError: If parts of the model are tensor parallel, or it is a part of a wrapper of FSDP1.
        RuntimeError: If a process has not memory enough.

    Example:
        >>> import lie_metric as lm
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))  # fully_shard(model)
        >>> with lm.unsharded(model) as whole:
        ...     derivative = lm.lie_derivative(whole, torch.rand(3, 1, 4, 4), "rotation")["rotation"]
        >>> derivative.shape
        torch.Size([3, 2])
    """
    if not is_sharded(model.modules()):
        yield model
        return
    whole = gather(model)
    with whole.standing():
        yield whole.model


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether weights of some modules are dealt out over processes.

    Args:
        modules: The modules.

    Returns:
        Whether any are.

    Example:
        >>> is_sharded([nn.Linear(2, 2)])
        False
    """
    modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    if any(_has(cls, kind) for cls in set(map(type, modules)) for kind in (_SHARDED, _WRAPPER)):
        return True
    if not {_PACKAGE, _TENSORS} & sys.modules.keys():
        return False
    return any(_is_dealt(value) for module in modules for value in module._parameters.values()) or any(
        _has_flat(module) for module in modules if "_is_fsdp_managed_module" in module.__dict__
    )


def refuse_sharded(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuses modules of which this process holds a part only: each pass of them waits for the other processes.

    Args:
        modules: Paths and modules.

    Raises:
        RuntimeError: If weights of one are dealt out over processes.
    """
    modules = list(modules)
    if not is_sharded(module for _, module in modules):
        return
    for path, module in modules:
        if is_sharded([module]):
            raise RuntimeError(
                f"`model` must have its whole weights in this process, got {path or 'the model'!r} "
                f"({type(module).__name__}), whose weights are dealt out over processes. Measure inside "
                "`with lie_metric.unsharded(model) as whole:`, which all processes enter together, and pass `whole`."
            )


class Unsharded:
    """The whole weights of a model of which each process holds a part; see :func:`gather`.

    Args:
        model: The model without wrappers.
        wrappers: By parent and name the modules that stand in the place of a wrapper of FSDP1.
        weights: By module the parameters that take the place of its own.
        buffers: Those of the first process.

    Attributes:
        model: What is to be measured, inside :meth:`standing`.
    """

    def __init__(
        self,
        model: nn.Module,
        wrappers: list[tuple[nn.Module, str, nn.Module]],
        weights: list[tuple[nn.Module, dict[str, nn.Parameter]]],
        buffers: Places,
    ) -> None:
        self.model, self._wrappers, self._weights, self._buffers = model, wrappers, weights, buffers

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Puts the whole weights into the model; nothing is exchanged among processes here.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for parent, name, inner in self._wrappers:
                stack.callback(parent._modules.__setitem__, name, parent._modules[name])
                parent._modules[name] = inner
            for module, weights in self._weights:
                stack.enter_context(_plain(module, weights))
            stack.enter_context(shared_buffers(self._buffers))
            yield


@contextmanager
def _plain(module: nn.Module, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """A module without what FSDP changes of it: its class, attributes of its own, hooks and parameters."""
    cls, names = type(module), [cls.__name__ for cls in type(module).__mro__]
    tables = [module.__dict__[name] for name in ("_parameters", *_HOOKS)]
    before = list(map(dict, tables))
    # `register_fsdp_forward_method` puts a method before that of the class; FSDP1 leaves views of flat weights, whose
    # memory is not theirs any more.
    own = {
        key: value
        for key, value in module.__dict__.items()
        if key in weights or _is_view(value) or (isinstance(value, MethodType) and _is_of(value, _PACKAGE))
    }
    try:
        if _SHARDED in names:
            # Wrappers such as Fabric's hand what they are set on to the module inside, whose class it would become.
            object.__setattr__(module, "__class__", cls.__mro__[names.index(_SHARDED) + 1])
        for key in own:
            del module.__dict__[key]
        _set(tables[0], weights)
        for table, hooks in zip(tables[1:], before[1:], strict=True):
            _set(table, {key: hook for key, hook in hooks.items() if not _is_of(hook, _PACKAGE)})
        yield
    finally:
        object.__setattr__(module, "__class__", cls)
        module.__dict__.update(own)
        for table, entries in zip(tables, before, strict=True):
            _set(table, entries)


def _set(table: dict[Any, Any], entries: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(entries)


def gather(model: nn.Module, device: torch.device | None = None) -> Unsharded:
    """Gathers the whole weights of a model; every process has to ask for it.

    Args:
        model: As of :func:`unsharded`.
        device: Where the weights are wanted; by default where the model runs.

    Returns:
        The weights, to be put into the model by :meth:`Unsharded.standing`.

    Raises:
        ValueError: If parts of the model are tensor parallel, or it is a part of a wrapper of FSDP1.
        RuntimeError: If a process has not memory enough.
    """
    # Scripted modules keep their tables elsewhere; FSDP leaves them as they are.
    every = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    modules = [module for module in every if not _has(type(module), _WRAPPER)]
    _refuse_tensor_parallel(model)
    units: list[Any] = [module for module in every if _has(type(module), _WRAPPER)]
    wrapped = {id(inner) for unit in units for inner in _inside(unit)}
    for module in modules:
        if id(module) not in wrapped and _has_flat(module):
            raise ValueError(
                f"`model` must be the outermost wrapper of FSDP, got {type(model).__name__}, whose weights belong to a "
                "wrapper around it. Pass what `FullyShardedDataParallel(...)` returned."
            )
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            if _has(type(module), _SHARDED):
                module.reshard()  # type: ignore[operator]
        place = _make_room(modules, units, device)
        made = _Made(device)
        # What stands outside wrappers, or was left to each process, stays.
        made.keep(value for module in modules for value in module._parameters.values())
        found = {id(module): made.whole(module) for module in modules if id(module) not in wrapped}
        for unit in units:
            # Wrapper by wrapper: what is gathered here is given back before the next one.
            with unit.summon_full_params(unit, recurse=False, writeback=False):
                found |= {id(module): made.whole(module) for module in _inside(unit)}
    parents = [
        (parent, name, _unwrapped(child))
        for parent in modules
        for name, child in parent._modules.items()
        if child is not None and _unwrapped(child) is not child
    ]
    weights = [(module, found[id(module)]) for module in modules]
    return Unsharded(_unwrapped(model), parents, weights, buffers_of_the_first(modules, place))


class _Made:
    """Whole parameters for those that are dealt out; one that stands in two places stays one."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        # The old ones are held, or others would get their ids.
        self._made: dict[int, tuple[Any, Any]] = {}

    def keep(self, parameters: Iterable[nn.Parameter | None]) -> None:
        for value in parameters:
            if not _is_dealt(value) and not _is_flat(value):
                self._made[id(value)] = value, value

    def whole(self, module: nn.Module) -> dict[str, Any]:
        for parameter in module._parameters.values():
            if id(parameter) not in self._made:
                assert parameter is not None
                value: Any = parameter.detach()
                # Weights that are kept in main memory are exchanged where they are used.
                value = value.to(value.device_mesh.device_type).full_tensor() if _is_dealt(value) else value.clone()
                new = nn.Parameter(value.to(self._device or value.device), parameter.requires_grad)
                self._made[id(parameter)] = parameter, new
        return {name: self._made[id(parameter)][1] for name, parameter in module._parameters.items()}


def _make_room(modules: list[nn.Module], units: list[Any], device: torch.device | None) -> torch.device:
    """Refuses on all processes if one has no room: in the midst of an exchange others would wait for it for ever."""
    world = process()[1]
    dealt: dict[int, Any] = {
        id(value): value for module in modules for value in module.parameters(False) if _is_dealt(value)
    }
    needed = sum(value.numel() * value.element_size() for value in dealt.values())
    place = device or next((torch.device(value.device_mesh.device_type) for value in dealt.values()), None)
    for unit in units:
        for value in {value for module in _inside(unit) for value in module.parameters(False) if _is_flat(value)}:
            parts = 1 if unit.sharding_strategy.name == "NO_SHARD" else unit.process_group.size()
            needed += value.numel() * value.element_size() * parts
        place = place or unit.compute_device
    place = place or torch.device("cpu")
    lacking = torch.zeros(1, device=place)
    try:
        torch.empty(needed, dtype=torch.uint8, device=place)
    except torch.OutOfMemoryError:
        lacking += 1
    lacks = int(add_up(lacking))
    if lacks:
        raise RuntimeError(
            f"`model` must fit whole into the memory of each device to be measured, got {needed / 2**30:.3g} GiB of "
            f"weights and {lacks} of {world} processes without room for them. Measure a checkpoint on a larger device, "
            "or train with smaller batches."
        )
    return place


def _refuse_tensor_parallel(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for table in _HOOKS:
            if any(_is_of(hook, _TENSORS) for hook in getattr(module, table).values()):
                raise ValueError(
                    f"`model` must be sharded by FSDP alone to be measured, got {name or 'a model'!r}, which is tensor "
                    "parallel. Measure a checkpoint of it in one process, or train with `tensor_parallel_size=1`."
                )


def _inside(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules in a wrapper that are in no other one within it.

    Yields:
        Modules.
    """
    waiting: list[Any] = [unit._fsdp_wrapped_module]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen or _has(type(module), _WRAPPER):
            continue
        seen.add(id(module))
        yield module
        waiting += module.children()


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module in a wrapper of FSDP1, also in a compiled one, which would call the wrapper itself."""
    found: Any = module
    inside: Any = module
    while True:
        if _has(type(inside), _WRAPPER):
            found = inside = inside._fsdp_wrapped_module
        elif _has(type(inside), "OptimizedModule"):
            inside = inside._orig_mod
        else:
            return found


def _has_flat(module: nn.Module) -> bool:
    """Whether FSDP1 deals the weights of a module out: as its parameters, or as views that stand in their place."""
    return any(map(_is_flat, module._parameters.values())) or any(map(_is_view, module.__dict__.values()))


def _is_view(value: object) -> bool:
    return isinstance(value, torch.Tensor) and _is_flat(value._base)


def _is_flat(value: object) -> bool:
    """Whether a parameter is, or is a part of, a flat one of FSDP1."""
    return hasattr(value, "_fsdp_flattened")


def _has(cls: type, kind: str) -> bool:
    return any(each.__name__ == kind for each in cls.__mro__)


def _is_dealt(value: object) -> bool:
    # Whoever has such a tensor has imported its class.
    made = sys.modules.get(_TENSORS)
    return made is not None and isinstance(value, made.DTensor)


def _is_of(function: Any, package: str) -> bool:
    """Whether a function or a method is of a package, also one that gave itself another's name."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    path = package.replace(".", "/")
    return str(getattr(function, "__module__", "")).startswith(package) or (
        code is not None and path in Path(code.co_filename).as_posix()
    )
