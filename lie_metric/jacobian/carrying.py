r"""Forward mode for many tangents at once: tensors that carry their tangents through a function.

A :class:`Dual` is a tensor with K tangents, and has no memory of its own. Every operation of ATen that meets one, from
wherever it is called (torch functions, C++, scripted code, ``vmap`` and ``grad`` of :mod:`torch.func`, backward passes
inside the function), arrives at :func:`dispatch`, below all that torch does to tensors. There its value is computed as
always, and its tangents by a rule; an operation without a rule is differentiated on its own by ``vmap`` over ``jvp``.
What is no operation of ATen, reads or writes memory otherwise, or takes a number out of torch, is refused
(:class:`Unsupported`): nothing can use the value of a carrying tensor and lose its tangents.

Tangents follow the function as it computes: through ``detach``, under ``no_grad``, and through the bodies of custom
autograd functions, whose declared derivatives are not used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from lie_metric.jacobian.memory import Tangents, Unknown, same_memory
from lie_metric.jacobian.refusals import NumberTaken, Unsupported, WrittenInto

__all__ = [
    "FUSED",
    "IN_PLACE",
    "RULES",
    "WITHOUT_DERIVATIVE",
    "Dual",
    "Rule",
    "above",
    "any_operation",
    "carries",
    "dispatch",
    "motionless",
    "plain",
    "stands_for_a_view",
    "wrap",
    "wrap_all",
]

Rule = Callable[[Any, tuple, dict], Any]

RULES: dict[str, Rule] = {}
"""Tangents of operations, by the name of the operation; a rule may answer ``NotImplemented``."""

IN_PLACE: dict[str, Callable[[Any, tuple, dict, Tangents], Any]] = {}
"""Rules that may form their tangents in the memory of those of the first argument, which they are given besides."""

FUSED: dict[Any, Rule] = {}
"""Tangents of torch functions that are cheaper as a whole than operation by operation."""

WITHOUT_DERIVATIVE: set[str] = set()
"""Operations whose value does not move, or moves by jumps alone: their results carry no tangents."""


class Dual(Tensor):
    """A tensor of shape S with tangents of shape (K, *S).

    Attributes:
        value: The tensor without tangents; nobody outside can see it.
        moving: The tangents.
        aliases: All dual tensors, this one included, whose values are in the same memory, or would be there if a copy
            did not stand for a conjugate or negative view; one list in common.
    """

    value: Tensor
    moving: Tangents
    aliases: list[weakref.ReferenceType[Dual]]

    # Functions of torch need no treatment of their own, whatever they are made of.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def tangents(self) -> Tensor:
        """Shape (K, *S). Not to be written into."""
        return self.moving.get()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        """Computes an operation of dual tensors, and the tangents of its result."""
        return dispatch(func, args, kwargs or {})

    def _refuse_memory(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: whoever reads or shares memory by its address loses the tangents."""
        raise Unsupported("the memory of a tensor is used by its address, or stored")

    data_ptr = const_data_ptr = storage = untyped_storage = share_memory_ = __dlpack__ = _refuse_memory
    __reduce_ex__ = numpy = tolist = _refuse_memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Dual:
        return cast(Dual, memo.setdefault(id(self), self.clone()))

    @property
    def data(self) -> Tensor:
        """The tensor behind autograd's back, tangents included."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise Unsupported("the values of a tensor are exchanged by its attribute `data`")


def carries(value: Tensor) -> bool:
    """Whether values of this kind can move.

    Args:
        value: A tensor.

    Returns:
        Whether it is of real or complex numbers.
    """
    return value.is_floating_point() or value.is_complex()


def wrap(value: Tensor, tangents: Tensor | Tangents, sources: Sequence[Any] = ()) -> Dual:
    """A tensor with its tangents.

    Args:
        value: Shape S.
        tangents: Shape (K, *S).
        sources: Dual tensors whose memory the two may use; others are passed over.

    Returns:
        The dual tensor.
    """
    dual: Dual = torch.Tensor._make_wrapper_subclass(
        Dual, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
        device=value.device,
    )  # fmt: skip
    torch._C._set_throw_on_mutable_data_ptr(dual)  # there is no memory, and C++ would read from address 0
    dual.value = value
    moving = dual.moving = tangents if isinstance(tangents, Tangents) else Tangents(tangents)
    if moving.raw.shape[1:] != value.shape:
        raise RuntimeError(f"a rule gives tangents of shape {tuple(moving.raw.shape)} to {tuple(value.shape)}")
    aliases = None
    for source in sources:
        if isinstance(source, Dual):
            if aliases is not source.aliases and same_memory(value, source.value):
                aliases = source.aliases if aliases is None else _merged(aliases, source.aliases)
            if moving is not source.moving and same_memory(moving.raw, source.moving.raw):
                moving.share(source.moving)
    dual.aliases = [] if aliases is None else aliases
    dual.aliases.append(weakref.ref(dual))
    return dual


def stands_for_a_view(copy: Dual, source: Dual) -> Dual:
    """Counts a copy among those that share memory: to write into any of them is refused as long as both are in use.

    Args:
        copy: The copy.
        source: What it would be a view of.

    Returns:
        The copy.
    """
    _merged(source.aliases, copy.aliases)
    return copy


def _merged(
    first: list[weakref.ReferenceType[Dual]], second: list[weakref.ReferenceType[Dual]]
) -> list[weakref.ReferenceType[Dual]]:
    first.extend(second)
    for reference in second:
        dual = reference()
        if dual is not None:
            dual.aliases = first
    return first


def wrap_all(values: Any, tangents: Any, sources: Sequence[Any]) -> Any:
    """One tensor or several with their tangents.

    Args:
        values: A tensor, or a sequence of them.
        tangents: The tangents of each.
        sources: As in :func:`wrap`.

    Returns:
        The dual tensors, in a container as that of the values.
    """
    if isinstance(values, Tensor):
        return wrap(values, tangents, sources)
    found: list[Dual] = []
    for value, moved in zip(values, tangents, strict=True):
        found.append(wrap(value, moved, [*sources, *found]))
    return type(values)(found)


def plain(value: Any) -> Any:
    """An argument without tangents.

    Args:
        value: A dual tensor, a list or tuple that may hold some, or anything else.

    Returns:
        The value of a dual tensor, anything else as it is.
    """
    if isinstance(value, Dual):
        return value.value
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def motionless(value: Tensor, count: int) -> Tensor:
    """Tangents of a tensor that does not move.

    Args:
        value: Shape S.
        count: K.

    Returns:
        Zeros, shape (K, *S), all in one place.
    """
    return value.new_zeros(()).expand(count, *value.shape)


_TABLE: dict[Any, Rule] = {}
"""What is done for each operation that was met; there are as many as torch and its extensions register."""


def dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation of dual tensors, by what is done for it.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        What the operation returns, as dual tensors where it moves.
    """
    rule = _TABLE.get(func)
    if rule is None:
        rule = _TABLE[func] = _chosen(func)
    # Modes have seen the function that the operation is of: what a rule is made of does not concern them.
    with torch._C.DisableTorchFunction():
        return rule(func, args, kwargs)


def _chosen(func: Any) -> Rule:
    """How an operation is treated, by what its schema says of it."""
    name = func._overloadpacket.__name__
    if func.namespace not in {"aten", "prim", "prims"}:
        return _refuse(f"{func} is no operation of torch itself")
    if func._schema.is_mutable:
        if torch.Tag.inplace_view in func.tags:
            return _refuse(f"{name} changes the shape of a tensor in place")
        twin = _twin(func)
        if twin is None:
            return _refuse(f"{name} writes into a tensor")
        return partial(_in_place, twin)
    if name in WITHOUT_DERIVATIVE:
        return _without_tangents
    if torch.Tag.nondeterministic_seeded in func.tags and name not in RULES:
        return _refuse(f"{name} draws random numbers that depend on a moving tensor")
    if name == "_local_scalar_dense":
        return _scalar
    rule = RULES.get(name)
    return any_operation if rule is None else partial(_by_rule, rule)


def _twin(func: Any) -> Any:
    """The operation that gives what this one would write into its first argument; None if there is none."""
    name = func._overloadpacket.__name__
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        schema = getattr(packet, overload)._schema
        if not schema.is_mutable and [(argument.name, str(argument.type)) for argument in schema.arguments] == wanted:
            return getattr(packet, overload)
    return None


def _by_rule(rule: Rule, func: Any, args: tuple, kwargs: dict) -> Any:
    result = rule(func, args, kwargs)
    return any_operation(func, args, kwargs) if result is NotImplemented else result


def _refuse(reason: str) -> Rule:
    def refuse(func: Any, args: tuple, kwargs: dict) -> Any:
        if any(isinstance(leaf, Dual) for leaf in tree_iter((args, kwargs))):
            raise Unsupported(reason)
        return func(*args, **kwargs)

    return refuse


def _scalar(func: Any, args: tuple, kwargs: dict) -> Any:
    if carries(args[0]):
        raise NumberTaken
    return func(*plain(args))


def _without_tangents(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*plain(args), **{key: plain(value) for key, value in kwargs.items()})


def _in_place(twin: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation that writes into its first argument, by its twin that does not."""
    name, target = twin._overloadpacket.__name__, args[0]
    if not isinstance(target, Dual):
        raise WrittenInto(f"a tensor without tangents is changed in place by {name}_")
    family = [dual for dual in (other() for other in target.aliases) if dual is not None and dual is not target]
    if not all(same_memory(dual.value, target.value) for dual in family):
        raise Unsupported(f"{name}_ changes memory of which there is a conjugate or negative view")
    rule = IN_PLACE.get(name)
    result: Any = NotImplemented
    if rule is not None and not family and target.moving.alone():
        result = rule(twin, args, kwargs, target.moving)
    if result is NotImplemented:
        result = dispatch(twin, args, kwargs)
    if not isinstance(result, Dual):
        result = wrap(result, motionless(result, len(target.moving.raw)))
    if result.shape != target.shape or result.dtype != target.dtype:
        raise Unsupported(f"{name}_ changes a tensor in a way that is not followed")
    if family:
        _write_through(target, family, result)
        return target
    value = result.value
    if value.stride() != target.stride():
        value = torch.empty_strided(target.shape, target.stride(), dtype=value.dtype, device=value.device).copy_(value)
    elif any(other() is not None and other() is not result for other in result.aliases):
        value = value.clone()
    target.value, target.moving, target.aliases = value, result.moving, [weakref.ref(target)]
    return target


def _write_through(target: Dual, family: Sequence[Dual], result: Dual) -> None:
    """Writes values and tangents where those that share the memory see them.

    Values are in one memory already. Tangents need not be: they are put into one, of K times the size, with the same
    places.
    """
    if any(dual.dtype != target.dtype for dual in family):
        raise Unsupported("memory is changed in place that is seen as numbers of two types")
    moved = result.tangents
    numel = max(1 + sum((n - 1) * s for n, s in zip(d.shape, d.stride(), strict=True)) + d.value.storage_offset()
                for d in (target, *family))  # fmt: skip
    memory = torch.zeros((len(moved), numel), dtype=moved.dtype, device=moved.device)

    def place(dual: Dual) -> Tensor:
        return memory.as_strided((len(moved), *dual.shape), (numel, *dual.stride()), dual.value.storage_offset())

    for dual in family:
        if dual.numel():
            once = (slice(None), *(slice(1 if stride == 0 else None) for stride in dual.stride()))
            place(dual)[once].copy_(dual.tangents[once])
    target.value.copy_(result.value)
    place(target).copy_(moved)
    together = Tangents(place(target))
    target.moving = together
    for dual in family:
        dual.moving = Tangents(place(dual))
        dual.moving.share(together)


with torch.inference_mode(False):
    # The dispatch keys that are active above all operations; below, where rules run, derivatives are switched off.
    _ABOVE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def above() -> Any:
    """A context in which operations are differentiated again, for the rules that use :mod:`torch.func`."""
    keys = torch._C._ForceDispatchKeyGuard(*_ABOVE)
    return _outside_of_inference(keys) if torch.is_inference_mode_enabled() else keys


@contextmanager
def _outside_of_inference(keys: Any) -> Iterator[None]:
    # Torch 2.8 and before give zeros as derivatives in inference mode. Leaving it turns gradients on.
    with keys, torch.inference_mode(False), torch.no_grad():
        yield


def _by_parts(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation by simpler ones that give the same: backward passes of activations have no forward derivative."""
    return decomposition_table[func](*args, **kwargs)


def any_operation(func: Any, args: tuple, kwargs: dict) -> Any:
    """Any operation, by forward mode through this one call.

    Args:
        func: The operation.
        args: Its arguments, with dual tensors among them.
        kwargs: Its keyword arguments.

    Returns:
        What the operation returns, as dual tensors where it can move.

    Raises:
        Unsupported: If torch has no derivative of it.
    """
    leaves, structure = tree_flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Dual) and carries(leaf)]
    given = [plain(leaf) for leaf in leaves]
    new_args, new_kwargs = tree_unflatten(given, structure)
    with above():  # below, what is conjugate or negative by a bit of the tensor would not be seen as such
        results, outer = tree_flatten(func(*new_args, **new_kwargs))
    moving = [index for index, r in enumerate(results) if isinstance(r, Tensor) and carries(r)]
    if not moving or not places:
        return tree_unflatten(results, outer)

    def values(*moved: Tensor) -> tuple[Tensor, ...]:
        filled = list(given)
        for index, value in zip(places, moved, strict=True):
            filled[index] = value
        new_args, new_kwargs = tree_unflatten(filled, structure)
        found, _ = tree_flatten(func(*new_args, **new_kwargs))
        return tuple(found[index] for index in moving)

    duals = [leaves[index] for index in places]
    # Forward mode lays tangents out as the values, which several elements in one place do not allow.
    primals = tuple(dual.value.contiguous() for dual in duals)
    moved = [dual.tangents for dual in duals]
    try:
        with above():
            pushed = torch.vmap(lambda *t: torch.func.jvp(values, primals, t)[1])(*moved)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if func in decomposition_table:
            _TABLE[func] = _by_parts
            return _by_parts(func, args, kwargs)
        raise Unsupported(f"{func} has no forward derivative ({str(error).strip().splitlines()[0][:120]})") from error
    aside = len(moving) > 1 and not all(bool(tangents.any()) for tangents in pushed)
    if aside and torch.is_grad_enabled() and func in decomposition_table:
        return _by_parts(func, args, kwargs)  # backward passes inside the function use side results
    found: list[Dual] = []
    for index, tangents in zip(moving, pushed, strict=True):
        # Torch takes side results, such as the means that a normalisation saves, for constants: using one is refused.
        known = tangents if len(moving) == 1 or bool(tangents.any()) else Unknown(tangents, str(func))
        found.append(wrap(results[index], known, [*duals, *found]))
        results[index] = found[-1]
    return tree_unflatten(results, outer)
