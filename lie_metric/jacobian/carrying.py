r"""Forward mode for many tangents at once: tensors that carry their tangents through a function.

A :class:`Dual` is a tensor with K tangents, and has no memory of its own. Every operation of ATen that meets one, from
wherever it is called (torch functions, C++, scripted code, ``vmap`` and ``grad`` of :mod:`torch.func`, backward passes
inside the function), arrives at :func:`_dispatch`, below all that torch does to tensors. There its value is computed as
always, and its tangents by a rule; an operation without a rule is differentiated on its own by ``vmap`` over ``jvp``.
What is no operation of ATen, reads or writes memory otherwise, or takes a number out of torch, is refused
(:class:`Unsupported`): nothing can use the value of a carrying tensor and lose its tangents.

Tangents follow the function as it computes: through ``detach``, under ``no_grad``, and through the bodies of custom
autograd functions, whose declared derivatives are not used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from lie_metric.jacobian.memory import Tangents, same_memory

__all__ = ["Dual", "Unsupported", "any_operation", "carries", "plain", "push_forward", "wrap", "wrap_all"]

Rule = Callable[[Any, tuple, dict], Any]

RULES: dict[str, Rule] = {}
"""Tangents of operations, by the name of the operation; a rule may answer ``NotImplemented``."""

IN_PLACE: dict[str, Callable[[Any, tuple, dict, Tangents], Any]] = {}
"""Rules that may form their tangents in the memory of those of the first argument, which they are given besides."""

FUSED: dict[Any, Rule] = {}
"""Tangents of torch functions that are cheaper as a whole than operation by operation."""

WITHOUT_DERIVATIVE: set[str] = set()
"""Operations whose value does not move, or moves by jumps alone: their results carry no tangents."""


class Unsupported(RuntimeError):
    """A function does something that tangents carried by tensors cannot follow."""


class Unknown(Tangents):
    """Tangents that are not known, of a tensor that is mostly not used: to use it is refused."""

    __slots__ = ("source",)

    def __init__(self, raw: Tensor, source: str) -> None:
        super().__init__(raw)
        self.source = source

    def get(self) -> Tensor:
        """Refuses.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported(f"a side result of {self.source} is used, of which torch knows no derivative")

    def scaled(self, factor: Tensor | float | None = None) -> Tangents:
        """As unknown.

        Returns:
            Itself.
        """
        return self


class Dual(Tensor):
    """A tensor of shape S with tangents of shape (K, *S).

    Attributes:
        value: The tensor without tangents; nobody outside can see it.
        moving: The tangents.
        aliases: All dual tensors, this one included, whose values are in the same memory; one list in common.
    """

    value: Tensor
    moving: Tangents
    aliases: list[weakref.ref[Dual]]

    # Functions of torch need no treatment of their own, whatever they are made of.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def tangents(self) -> Tensor:
        """Shape (K, *S). Not to be written into."""
        return self.moving.get()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Computes an operation of dual tensors, and the tangents of its result."""
        return _dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """Refuses: whoever reads memory by its address loses the tangents.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported("the memory of a tensor is read by its address")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Unsupported("a tensor is copied or stored by pickling")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        # Without this torch reads memory that is not there, and the process ends.
        raise Unsupported("a tensor leaves torch by DLPack")

    def untyped_storage(self) -> Any:
        """Refuses, as :meth:`data_ptr`.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported("the storage of a tensor is read")


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
    dual: Dual = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        Dual, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
        device=value.device,
    )  # fmt: skip
    dual.value = value
    moving = dual.moving = tangents if isinstance(tangents, Tangents) else Tangents(tangents)
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


def _merged(first: list[weakref.ref[Dual]], second: list[weakref.ref[Dual]]) -> list[weakref.ref[Dual]]:
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


def push_forward(function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivatives along K tangents, from one run of the function.

    Args:
        function: A function of one tensor, built of operations of torch. Gradients must be disabled.
        inputs: Any shape S.
        tangents: Shape (K, *S).

    Returns:
        The value, shape S', and the derivatives, shape (K, *S').

    Raises:
        Unsupported: If the function does what tangents cannot follow.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> push_forward(lambda v: v.square(), x, torch.eye(2))[1].tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    moving = Tangents(tangents)
    moving.sharing.append(lambda: tangents)  # the caller's, who may still need them
    with _Fused():
        result = function(wrap(inputs, moving))
    if not isinstance(result, Tensor):
        raise Unsupported(f"the function returns {type(result).__name__}")
    if not isinstance(result, Dual):
        if torch._C._functorch.is_functorch_wrapped_tensor(result):
            raise Unsupported("the function returns a tensor of a transform that has ended")
        return result, result.new_zeros((len(tangents), *result.shape))
    return result.value, result.tangents.expand(len(tangents), *result.shape)


class _Fused(TorchFunctionMode):
    """Lets torch functions that have a rule as a whole use it; whatever does not pass here is right as well."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = FUSED.get(func)
        if rule is not None:
            result = rule(func, args, kwargs or {})
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


_TABLE: dict[Any, Rule] = {}
"""What is done for each operation that was met; there are as many as torch and its extensions register."""


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    rule = _TABLE.get(func)
    if rule is None:
        rule = _TABLE[func] = _chosen(func)
    return rule(func, args, kwargs)


def _chosen(func: Any) -> Rule:
    """How an operation is treated, by what its schema says of it."""
    name = func._overloadpacket.__name__
    if func.namespace not in {"aten", "prim", "prims"}:
        return _refuse(f"{func} is no operation of torch itself")
    if func._schema.is_mutable:
        if torch.Tag.inplace_view in func.tags:
            return _refuse(f"{name} changes the shape of a tensor in place")
        twin = getattr(getattr(torch.ops.aten, name[:-1], None), func._overloadname, None)
        if not name.endswith("_") or twin is None or twin._schema.is_mutable:
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
        raise Unsupported("a number is taken out of torch (`.item()`, `float()`)")
    return func(*plain(args))


def _without_tangents(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*plain(args), **{key: plain(value) for key, value in kwargs.items()})


def _in_place(twin: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation that writes into its first argument, by its twin that does not."""
    name, target = twin._overloadpacket.__name__, args[0]
    if not isinstance(target, Dual):
        raise Unsupported(f"a tensor without tangents is changed in place by {name}_")
    if any(other() is not None and other() is not target for other in target.aliases):
        raise Unsupported(f"{name}_ changes memory that other tensors share")
    rule = IN_PLACE.get(name)
    if rule is not None and target.moving.alone():
        result = rule(twin, args, kwargs, target.moving)
        if result is NotImplemented:
            result = _dispatch(twin, args, kwargs)
    else:
        result = _dispatch(twin, args, kwargs)
    if not isinstance(result, Dual):
        result = wrap(result, target.moving.raw.new_zeros(()).expand(len(target.moving.raw), *result.shape))
    if result.shape != target.shape or result.dtype != target.dtype:
        raise Unsupported(f"{name}_ changes a tensor in a way that is not followed")
    value = result.value
    if value.stride() != target.stride():
        value = torch.empty_strided(target.shape, target.stride(), dtype=value.dtype, device=value.device).copy_(value)
    elif any(other() is not None and other() is not result for other in result.aliases):
        value = value.clone()
    target.value, target.moving, target.aliases = value, result.moving, [weakref.ref(target)]
    return target


with torch.inference_mode(False):
    # The dispatch keys that are active above all operations; below, where rules run, derivatives are switched off.
    _ABOVE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def above() -> Any:
    """A context in which operations are differentiated again, for the rules that use :mod:`torch.func`."""
    return torch._C._ForceDispatchKeyGuard(*_ABOVE)


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
    primals, moved = tuple(dual.value for dual in duals), [dual.tangents for dual in duals]
    try:
        with above():
            pushed = torch.vmap(lambda *t: torch.func.jvp(values, primals, t)[1])(*moved)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise Unsupported(f"{func} has no forward derivative ({str(error).strip().splitlines()[0][:120]})") from error
    found: list[Dual] = []
    for index, tangents in zip(moving, pushed, strict=True):
        # Torch takes side results, such as the means that a normalisation saves, for constants: using one is refused.
        known = tangents if len(moving) == 1 or bool(tangents.any()) else Unknown(tangents, str(func))
        found.append(wrap(results[index], known, [*duals, *found]))
        results[index] = found[-1]
    return tree_unflatten(results, outer)
