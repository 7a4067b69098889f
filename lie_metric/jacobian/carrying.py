r"""Forward mode for many tangents at once: tensors that carry their tangents through a model.

A :class:`Dual` is a tensor with K tangents. Every torch function that meets one computes its value as it always does,
and its tangents by a rule for its kind: linear functions map the tangents as one larger batch; pointwise ones multiply
them by a derivative that is taken once for all; normalisation and softmax have symmetric Jacobians, which are the
fused kernels of their backward passes; any other function is differentiated on its own by ``vmap`` over ``jvp``. What
cannot be followed (an in-place change of a tensor that others share) raises :class:`Unsupported`.

Memory decides the speed: writing K tangents to fresh memory costs up to seven times as much as changing them where they
are. So a diagonal Jacobian is kept as a factor of the size of one tangent, which the next one multiplies, and which is
applied when the tangents are needed: in place if no other tensor can still see them.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Dual", "Unsupported", "push_forward"]


class Unsupported(RuntimeError):
    """A model does something that tangents carried by tensors cannot follow."""


class _Tangents:
    """Tangents of shape (K, *S), still to be multiplied by one factor for all of them.

    Attributes:
        raw: Shape (K, *S).
        factor: What broadcasts to S without changing it, or None for 1.
        sharing: All tangents, this one included, that may use the memory of ``raw``; one list that they have in common.
    """

    def __init__(self, raw: Tensor, factor: Tensor | float | None = None) -> None:
        self.raw, self.factor = raw, factor
        self.sharing: list[Callable[[], object]] = [weakref.ref(self)]

    def share(self, group: list[Callable[[], object]]) -> None:
        """Joins those that use the same memory."""
        if group is not self.sharing:
            group[:] = [other for other in group if other() is not None]
            group.append(weakref.ref(self))
            self.sharing = group

    def scaled(self, factor: Tensor | float | None = None) -> _Tangents:
        """The same tangents times a factor."""
        if factor is None:
            factor = self.factor
        elif self.factor is not None:
            factor = self.factor * factor
        result = _Tangents(self.raw, factor)
        result.share(self.sharing)
        return result

    def alone(self) -> bool:
        """Whether nobody else can see the memory, and no two entries are at one place."""
        others = (other() for other in self.sharing)
        return all(other is None or other is self for other in others) and _is_dense(self.raw)

    def get(self) -> Tensor:
        """The tangents, after the factor."""
        if self.factor is not None:
            factor, self.factor = self.factor, None
            if self.alone():
                self.raw.mul_(factor)
            else:
                self.replace(self.raw * factor)
        return self.raw

    def replace(self, raw: Tensor) -> None:
        """Turns to memory of its own."""
        mine = [other for other in self.sharing if other() is self]
        self.sharing[:] = [other for other in self.sharing if other() is not self]
        self.raw, self.sharing = raw, mine


def _is_dense(value: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Dual(Tensor):
    """A tensor of shape S with tangents of shape (K, *S)."""

    moving: _Tangents
    aliases: list[weakref.ref[Dual]]

    @property
    def tangents(self) -> Tensor:
        """Shape (K, *S). Not to be written into."""
        return self.moving.get()

    @staticmethod
    def wrap(value: Tensor, tangents: Tensor | _Tangents, source: Dual | None = None) -> Dual:
        """A tensor with its tangents; ``source`` is a dual tensor with whose memory it may share."""
        dual = value.as_subclass(Dual)
        dual.moving = tangents if isinstance(tangents, _Tangents) else _Tangents(tangents)
        shares = source is not None and _storage(value) == _storage(source)
        dual.aliases = source.aliases if source is not None and shares else []
        dual.aliases.append(weakref.ref(dual))
        return dual

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Computes a torch function of dual tensors, and the tangents of its result."""
        _refuse_bodies()
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


def push_forward(function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivatives along K tangents, from one run of the function.

    Args:
        function: A function of one tensor, built of torch functions. Gradients must be disabled.
        inputs: Any shape S.
        tangents: Shape (K, *S).

    Returns:
        The value, shape S', and the derivatives, shape (K, *S').

    Raises:
        Unsupported: If the function changes memory that several tensors share.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> push_forward(lambda v: v.square(), x, torch.eye(2))[1].tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    moving = _Tangents(tangents)
    moving.sharing.append(lambda: tangents)  # the caller's, who may still need them
    with _declared_derivatives():
        result = function(Dual.wrap(inputs, moving))
    if not isinstance(result, Dual):
        return result, result.new_zeros((len(tangents), *result.shape))
    with torch._C.DisableTorchFunctionSubclass():
        return _plain(result), result.tangents.expand(len(tangents), *result.shape)


_bodies: dict[CodeType, str] = {}
"""The code of the forward methods of all custom autograd functions, as :func:`push_forward` found them."""


@contextmanager
def _declared_derivatives() -> Iterator[None]:
    """Refuses custom autograd functions: their body would be differentiated, not the derivative that they declare.

    Two nets, because ``apply`` may have been bound to another name before (then the frame of the body tells, as soon as
    it calls a torch function), and because a body may leave torch at once (then the call by ``apply`` tells).
    """
    original = torch.autograd.Function.__dict__.get("apply")

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == "torch.utils.checkpoint" and cls.__name__ == "_NoopSaveInputs":
            return torch.empty(0)  # without gradients, older versions of torch ask it for nothing else
        if any(isinstance(leaf, Dual) for leaf in tree_leaves((args, kwargs))):
            raise Unsupported(f"{cls.__name__} declares its own derivative")
        if original is not None:
            return original.__get__(None, cls)(*args, **kwargs)
        return super(torch.autograd.Function, cls).apply(*args, **kwargs)

    _find_bodies(torch.autograd.Function)
    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        if original is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = original


def _find_bodies(parent: type) -> None:
    functions: list[type] = type.__subclasses__(parent)
    for function in functions:
        _find_bodies(function)
        method: Any = vars(function).get("forward")
        code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
        if code is not None:
            _bodies[code] = function.__name__


def _refuse_bodies() -> None:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not push_forward.__code__:
        if frame.f_code in _bodies:
            raise Unsupported(f"{_bodies[frame.f_code]} declares its own derivative")
        frame = frame.f_back


def _plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _call(func: Any, args: tuple, kwargs: dict) -> Any:
    name = _name(func)
    args, kwargs, written = _out_of_place(func, name, args, kwargs)
    if written is not None:
        func, name = written
        target = args[0]
        if not isinstance(target, Dual):
            raise Unsupported(f"a tensor without tangents is changed in place by {name}")
        if any(other() is not None and other() is not target for other in target.aliases):
            raise Unsupported(f"{name} changes memory in place that other tensors share")
        if name in _SUMS and target.moving.alone():
            result = _SUMS[name](func, args, kwargs, target.moving)
        else:
            result = _evaluate(func, name, args, kwargs)
        if not isinstance(result, Dual) or result.shape != target.shape or result.dtype != target.dtype:
            raise Unsupported(f"{name} changes a tensor in place in a way that is not followed")
        target.data = _plain(result)
        target.moving = result.moving
        return target
    return _evaluate(func, name, args, kwargs)


def _evaluate(func: Any, name: str, args: tuple, kwargs: dict) -> Any:
    if name in _NO_DERIVATIVE:
        return func(*_strip(args), **_strip(kwargs))
    rule = _RULES.get(name)
    if rule is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return _note_sharing(result, args, kwargs)
    return _note_sharing(_any_function(func, args, kwargs), args, kwargs)


def _note_sharing(result: Any, args: tuple, kwargs: dict) -> Any:
    """Remembers whose tangents are in the same memory; whatever the rule did, it is told by the memory's address."""
    groups: dict[int, list[Callable[[], object]]] = {}
    for leaf in tree_leaves((args, kwargs, result)):
        if isinstance(leaf, Dual):
            moving = leaf.moving
            moving.share(groups.setdefault(_storage(moving.raw), moving.sharing))
    return result


@lru_cache(maxsize=4096)
def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return f"get {getattr(func.__self__, '__name__', '')}"
    module = getattr(func, "__module__", None) or ""
    # A function of the user's own that happens to bear a name of the tables below is differentiated as any other.
    if module and not module.startswith("torch") and module != "builtins":
        return f"{module}.{name}"
    return _SYNONYMS.get(name, name)


_SYNONYMS = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add_",
    "__sub__": "sub",
    "__isub__": "sub_",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul_",
    "multiply": "mul",
    "__truediv__": "div",
    "__div__": "div",
    "true_divide": "div",
    "__itruediv__": "div_",
    "__idiv__": "div_",
    "__matmul__": "matmul",
    "__neg__": "neg",
    "__getitem__": "getitem",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}


@lru_cache(maxsize=4096)
def _inplace_position(func: Any) -> int | None:
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def _out_of_place(func: Any, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple[Any, str] | None]:
    """Replaces a function that writes into its first argument by its twin that does not."""
    if kwargs.get("out") is not None or name in {"__setitem__", "copy_", "set_", "requires_grad_"}:
        raise Unsupported(f"{name or func} writes into a tensor")
    position = _inplace_position(func)
    if position is not None:
        if kwargs.get("inplace"):
            return args, kwargs | {"inplace": False}, (func, name)
        if len(args) > position and args[position]:
            return (*args[:position], False, *args[position + 1 :]), kwargs, (func, name)
    elif name.endswith("_") and not name.endswith("__"):
        twin = getattr(Tensor, name[:-1], None) or getattr(F, name[:-1], None)
        if twin is None:
            raise Unsupported(f"{name} writes into a tensor")
        return args, kwargs, (twin, name[:-1])
    return args, kwargs, None


def _strip(value: Any) -> Any:
    leaves, structure = tree_flatten(value)
    return tree_unflatten([_plain(leaf) if isinstance(leaf, Dual) else leaf for leaf in leaves], structure)


def _any_function(func: Any, args: tuple, kwargs: dict) -> Any:
    """Any function, by forward mode through this one call."""
    leaves, structure = tree_flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    duals = [leaves[index] for index in places]
    if not duals:
        return func(*args, **kwargs)
    plain = [_plain(leaf) if isinstance(leaf, Dual) else leaf for leaf in leaves]
    new_args, new_kwargs = tree_unflatten(plain, structure)
    results, outer = tree_flatten(func(*new_args, **new_kwargs))
    moving = [index for index, r in enumerate(results) if isinstance(r, Tensor) and r.is_floating_point()]
    if not moving:
        return tree_unflatten(results, outer)

    def values(*given: Tensor) -> tuple[Tensor, ...]:
        filled = list(plain)
        for index, value in zip(places, given, strict=True):
            filled[index] = value
        new_args, new_kwargs = tree_unflatten(filled, structure)
        found, _ = tree_flatten(func(*new_args, **new_kwargs))
        return tuple(found[index] for index in moving)

    primals = tuple(_plain(dual) for dual in duals)

    def push(*tangents: Tensor) -> Any:
        return torch.func.jvp(values, primals, tangents)[1]

    pushed = torch.vmap(push, randomness="same")(*(dual.tangents for dual in duals))
    for index, tangents in zip(moving, pushed, strict=True):
        results[index] = Dual.wrap(results[index], tangents, duals[0])
    return tree_unflatten(results, outer)


def _only_first(args: tuple, kwargs: dict) -> bool:
    """Whether the first argument, and no other, is dual."""
    if not args or not isinstance(args[0], Dual):
        return False
    rest, _ = tree_flatten((args[1:], kwargs))
    return not any(isinstance(leaf, Dual) for leaf in rest)


def _wrap_all(values: Any, tangents: Any, source: Dual) -> Any:
    if isinstance(values, Tensor):
        return Dual.wrap(values, tangents, source)
    return type(values)(Dual.wrap(v, t, source) for v, t in zip(values, tangents, strict=True))


def _linear_in_first(func: Any, args: tuple, kwargs: dict) -> Any:
    """A function that is linear in its first argument maps tangents as it maps values."""
    if not _only_first(args, kwargs):
        return NotImplemented
    dual, rest = args[0], args[1:]
    value = func(_plain(dual), *rest, **kwargs)
    return _wrap_all(value, torch.vmap(lambda t: func(t, *rest, **kwargs))(dual.tangents), dual)


def _pointwise(func: Any, args: tuple, kwargs: dict) -> Any:
    """A pointwise function multiplies every tangent by one derivative."""
    if not _only_first(args, kwargs):
        return NotImplemented
    dual, rest = args[0], args[1:]
    value = _plain(dual)
    pair: Any = torch.func.jvp(lambda v: func(v, *rest, **kwargs), (value,), (torch.ones_like(value),))
    return Dual.wrap(pair[0], _times(dual, pair[0], pair[1]), dual)


def _times(dual: Dual, value: Tensor, factor: Tensor | float) -> _Tangents:
    """Tangents times a factor, later if that is possible; ``value`` is the result, ``factor`` nobody else's."""
    kept = value.shape == dual.shape and value.dtype == dual.moving.raw.dtype
    if kept and (not isinstance(factor, Tensor) or factor.dtype == value.dtype):
        return dual.moving.scaled(factor)
    tangents = _aligned(dual, value.ndim) * factor
    return _Tangents(tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _lasting(factor: Any, value: Tensor) -> Any:
    """A factor of the model's as a number or a tensor that nobody can change, or None if its copy costs too much."""
    if isinstance(factor, Tensor):
        return factor.clone() if 4 * factor.numel() <= value.numel() else None
    return factor if isinstance(factor, (int, float)) else None


def _aligned(dual: Dual, axes: int) -> Tensor:
    """Tangents with as many axes, behind the first, as a result with which they are broadcast."""
    tangents = dual.tangents
    missing = axes - (tangents.ndim - 1)
    return tangents.reshape(tangents.shape[0], *[1] * missing, *tangents.shape[1:]) if missing else tangents


def _sum(func: Any, args: tuple, kwargs: dict, into: _Tangents | None = None, sign: int = 1) -> Any:
    """A sum; the tangents of its first argument are ``into`` if they are no longer needed."""
    if len(args) != 2 or set(kwargs) - {"alpha"}:
        return NotImplemented
    value = func(*_strip(args), **kwargs)
    factor = sign * kwargs.get("alpha", 1)
    first, second = args
    if isinstance(first, Dual) and isinstance(second, Dual):
        return Dual.wrap(value, _sum_of_both(first, second, value, factor, into))
    dual, factor = (first, 1) if isinstance(first, Dual) else (second, factor)
    if dual.shape == value.shape and dual.moving.raw.dtype == value.dtype:
        return Dual.wrap(value, dual.moving.scaled(None if factor == 1 else factor))
    tangents = _aligned(dual, value.ndim)
    tangents = tangents if factor == 1 else factor * tangents
    return Dual.wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _sum_of_both(first: Dual, second: Dual, value: Tensor, factor: float, into: _Tangents | None) -> Tensor:
    one, other = first.moving, second.moving
    alike = first.shape == second.shape and one.raw.shape == other.raw.shape and one.raw.dtype == other.raw.dtype
    out = one.raw if alike and into is one else None
    if alike and isinstance(other.factor, Tensor):
        return torch.addcmul(one.get(), other.raw, other.factor, value=factor, out=out)
    if alike and isinstance(one.factor, Tensor) and factor == 1:
        return torch.addcmul(other.get(), one.raw, one.factor, out=out)
    if out is not None:
        return one.get().add_(other.get(), alpha=factor)
    tangents = torch.add(_aligned(first, value.ndim), _aligned(second, value.ndim), alpha=factor)
    return tangents.expand(tangents.shape[0], *value.shape).to(value.dtype)


def _difference(func: Any, args: tuple, kwargs: dict, into: _Tangents | None = None) -> Any:
    return _sum(func, args, kwargs, into, sign=-1)


def _product(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    first, second = args
    a, b = _strip(args)
    value = func(a, b)
    if isinstance(first, Dual) and isinstance(second, Dual):
        if first.shape != value.shape:
            (first, a), (second, b) = (second, b), (first, a)
        one = first.moving
        if first.shape == value.shape and one.raw.dtype == second.moving.raw.dtype == value.dtype:
            tangents = one.raw * (b if one.factor is None else one.factor * b)
            return Dual.wrap(value, tangents.addcmul_(_aligned(second, value.ndim), a))
        tangents = torch.addcmul(_aligned(first, value.ndim) * b, _aligned(second, value.ndim), a)
        return Dual.wrap(value, tangents.to(value.dtype))
    dual, factor = (first, b) if isinstance(first, Dual) else (second, a)
    lasting = _lasting(factor, value)
    if lasting is not None:
        return Dual.wrap(value, _times(dual, value, lasting))
    tangents = _aligned(dual, value.ndim) * factor
    return Dual.wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _quotient(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) != 2 or kwargs or not _only_first(args, kwargs):
        return NotImplemented
    value = func(*_strip(args))
    if isinstance(args[1], (int, float)) and args[1]:
        return Dual.wrap(value, _times(args[0], value, 1 / args[1]))
    tangents = _aligned(args[0], value.ndim) / args[1]
    return Dual.wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _matmul(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) != 2 or kwargs or min(arg.ndim for arg in args) < 2:
        return NotImplemented
    first, second = args
    a, b = _strip(args)
    value = torch.matmul(a, b)
    tangents = None
    if isinstance(first, Dual):
        tangents = torch.matmul(_aligned(first, value.ndim), b)
    if isinstance(second, Dual):
        other = torch.matmul(a, _aligned(second, value.ndim))
        tangents = other if tangents is None else _added(tangents, other)
    return Dual.wrap(value, cast(Tensor, tangents))


def _added(fresh: Tensor, other: Tensor) -> Tensor:
    """The sum of two tensors of which the first is nobody else's."""
    return fresh.add_(other) if fresh.shape == other.shape else fresh + other


def _cat(func: Any, args: tuple, kwargs: dict) -> Any:
    parts, axis = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if len(args) > 2 or set(kwargs) - {"dim"} or not isinstance(axis, int):
        return NotImplemented
    value = func([_plain(part) for part in parts], axis)
    count = next(len(part.tangents) for part in parts if isinstance(part, Dual))
    tangents = [
        part.tangents if isinstance(part, Dual) else part.new_zeros((1, *part.shape)).expand(count, *part.shape)
        for part in parts
    ]
    return Dual.wrap(value, func(tangents, axis + 1 if axis >= 0 else axis))


def _weighted(func: Any, args: tuple, kwargs: dict) -> Any:
    """Convolutions and linear layers: the tangents are a larger batch, without the bias."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    rest, others = args[3:], {k: v for k, v in kwargs.items() if k not in names}
    dual, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(dual, Dual) or isinstance(weight, Dual) or isinstance(bias, Dual):
        return NotImplemented
    value = func(_plain(dual), weight, bias, *rest, **others)
    if weight.ndim > 2:
        if dual.ndim != weight.ndim:
            return NotImplemented
        tangents = func(dual.tangents.flatten(0, 1), weight, None, *rest, **others)
        tangents = tangents.unflatten(0, dual.tangents.shape[:2])
    else:
        tangents = func(dual.tangents, weight, None, *rest, **others)
    return Dual.wrap(value, tangents)


def _layer_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """Normalisation has the symmetric Jacobian r (1 - 11ᵀ/n - yyᵀ/n), which its backward kernel applies in one pass."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    if not _only_first((given.pop("input"),), given) or set(given) - {"normalized_shape", "weight", "bias", "eps"}:
        return NotImplemented
    dual = args[0] if args else kwargs["input"]
    shape, weight, bias = list(given["normalized_shape"]), given.get("weight"), given.get("bias")
    plain = _plain(dual).contiguous()
    value, mean, rstd = torch.native_layer_norm(plain, shape, weight, bias, given.get("eps", 1e-5))
    tangents = torch.empty(dual.tangents.shape, dtype=value.dtype, device=value.device)
    for source, result in zip(dual.tangents, tangents, strict=True):
        moved, _, _ = torch.ops.aten.native_layer_norm_backward(
            source.contiguous(), plain, shape, mean, rstd, None, None, [True, False, False]
        )
        if weight is None:
            result.copy_(moved)
        else:
            torch.mul(moved, weight, out=result)
    return Dual.wrap(value, tangents)


def _softmax_tangents(tangents: Tensor, value: Tensor, axis: int) -> Tensor:
    """The Jacobian of softmax, diag(p) - ppᵀ, is symmetric: its backward kernel applies it, in one pass."""
    moved = [torch.ops.aten._softmax_backward_data(t, value, axis, value.dtype) for t in tangents]
    return torch.stack(moved)


def _softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    if not _only_first(args, kwargs) or kwargs.get("dtype") is not None or len(args) > 2:
        return NotImplemented
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(axis, int):
        return NotImplemented
    dual = args[0]
    value = _plain(dual).softmax(axis)
    return Dual.wrap(value, _softmax_tangents(dual.tangents, value, axis))


def _attention(func: Any, args: tuple, kwargs: dict) -> Any:
    r"""Scaled dot-product attention by its formula, with dP = J_softmax · scale · (dQ Kᵀ + Q dKᵀ)."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    if (
        not all(isinstance(entry, Dual) for entry in (q, k, v))
        or isinstance(mask, Dual)
        or given.get("is_causal")
        or given.get("dropout_p")
        or given.get("enable_gqa")
        or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        or q.ndim != 4
    ):
        return NotImplemented
    scale = given.get("scale") or 1 / math.sqrt(q.shape[-1])
    heads = q.shape[:2]
    queries, keys, values = (_plain(entry).flatten(0, 1).contiguous() for entry in (q, k, v))
    queries = queries * scale
    scores = torch.bmm(queries, keys.mT)
    if mask is not None:
        apart = scores.unflatten(0, heads)
        apart = apart.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else apart + mask
        scores = apart.flatten(0, 1)
    weights = scores.softmax(-1)
    # One tangent at a time, in memory used again: the scores of all of them would be the largest tensor of the model.
    change, pulled = scores, torch.empty_like(weights)
    moved = values.new_empty((len(q.tangents), *heads, q.shape[-2], v.shape[-1]))
    for dq, dk, dv, result in zip(q.tangents, k.tangents, v.tangents, moved.flatten(1, 2), strict=True):
        torch.bmm((dq * scale).flatten(0, 1), keys.mT, out=change)
        change.baddbmm_(queries, dk.flatten(0, 1).contiguous().mT)
        torch.ops.aten._softmax_backward_data.out(change, weights, -1, weights.dtype, grad_input=pulled)
        torch.bmm(pulled, values, out=result)
        result.baddbmm_(weights, dv.flatten(0, 1).contiguous())
    return Dual.wrap(torch.bmm(weights, values).unflatten(0, heads), moved)


def _padding(func: Any, args: tuple, kwargs: dict) -> Any:
    # Padding by a constant other than zero is affine, and its tangents are padded by zero: the general way knows.
    if (len(args) > 3 and args[3]) or kwargs.get("value"):
        return NotImplemented
    return _linear_in_first(func, args, kwargs)


def _identity_in_evaluation(func: Any, args: tuple, kwargs: dict) -> Any:
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    return given["input"] if given.get("training") is False else NotImplemented


_SUMS: dict[str, Callable[..., Any]] = {"add": _sum, "sub": _difference}
"""Sums, that can be formed in the memory of their first argument."""

_NO_DERIVATIVE = {"detach", "get data", "argmax", "argmin", "sign", "floor", "ceil", "round", "zeros_like", "ones_like"}

_LINEAR = (
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "mean", "sum", "getitem",
    "chunk", "split", "unbind", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "roll", "flip", "movedim",
    "moveaxis", "neg", "clone", "narrow", "select", "index_select", "pixel_shuffle", "pixel_unshuffle", "avg_pool2d",
    "adaptive_avg_pool2d", "avg_pool1d", "adaptive_avg_pool1d", "tensor_split", "diagonal", "t", "rot90", "view_as",
    "reshape_as", "float", "double",
)  # fmt: skip

_POINTWISE = (
    "relu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "relu6", "leaky_relu", "elu", "selu",
    "celu", "softplus", "mish", "hardtanh", "exp", "log", "sqrt", "rsqrt", "square", "pow", "reciprocal", "abs",
    "clamp", "clamp_min", "clamp_max", "sin", "cos", "erf",
)  # fmt: skip

_RULES: dict[str, Callable[[Any, tuple, dict], Any]] = {
    **dict.fromkeys(_LINEAR, _linear_in_first),
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _weighted),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "feature_dropout"), _identity_in_evaluation),
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "cat": _cat,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "pad": _padding,
}
