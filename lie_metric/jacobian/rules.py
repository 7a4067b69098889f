"""Tangents of operations: linear ones map them as one larger batch, pointwise ones multiply them by one derivative.

Normalisation and softmax have symmetric Jacobians, which are the fused kernels of their backward passes. An operation
without a rule here, or for which its rule answers ``NotImplemented``, is differentiated on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lie_metric.jacobian.carrying import (
    FUSED,
    IN_PLACE,
    RULES,
    WITHOUT_DERIVATIVE,
    Dual,
    Unsupported,
    above,
    carries,
    plain,
    stands_for_a_view,
    wrap,
    wrap_all,
)
from lie_metric.jacobian.memory import Tangents

__all__: list[str] = []

aten = torch.ops.aten


def _only_first(args: tuple, kwargs: dict) -> bool:
    """Whether the first argument is dual, and no other."""
    return (
        isinstance(args[0], Dual) and not any(map(_holds_dual, args[1:])) and not any(map(_holds_dual, kwargs.values()))
    )


def _holds_dual(value: Any) -> bool:
    return isinstance(value, Dual) or (isinstance(value, (list, tuple)) and any(map(_holds_dual, value)))


def _count(dual: Dual) -> int:
    return len(dual.moving.raw)


# Views and other linear operations ------------------------------------------------------------------------------------


def _same_order(func: Any, args: tuple, kwargs: dict) -> Any:
    """Another shape for the same elements in the same order."""
    dual = args[0]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype:
        raise Unsupported("the bits of numbers are read as those of another type")
    return wrap(value, dual.tangents.reshape(_count(dual), *value.shape), (dual,))


def _copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """The same elements at the same places: tangents are shared until somebody writes."""
    dual = args[0]
    value = func(dual.value, *args[1:], **kwargs)
    if value.dtype == dual.dtype and value.device == dual.device:
        return wrap(value, dual.moving.scaled(), (dual,))
    return wrap(value, dual.tangents.to(value.device, value.dtype), (dual,)) if carries(value) else value


def _flipped(func: Any, args: tuple, kwargs: dict) -> Any:
    """A conjugate or negative view, which torch marks by a bit of the tensor: here a copy."""
    dual = args[0]
    value, tangents = (func(part).resolve_conj().resolve_neg() for part in (dual.value, dual.tangents))
    return stands_for_a_view(wrap(value, tangents), dual)


def _other_numbers(func: Any, args: tuple, kwargs: dict) -> Any:
    """Complex numbers as pairs, or pairs as complex numbers, which must lie so."""
    dual = args[0]
    return wrap(func(dual.value), func(dual.tangents.resolve_conj().contiguous()), (dual,))


def _behind(axis: int) -> int:
    """The place of an axis behind that of the tangents."""
    return axis if axis < 0 else axis + 1


def _along(*places: int) -> Callable[[Any, tuple, dict], Any]:
    """A linear operation along axes, whose numbers are the arguments at these places."""

    def rule(func: Any, args: tuple, kwargs: dict) -> Any:
        if not args[0].ndim:
            return NotImplemented
        if len(args) <= places[-1]:  # an axis that is left out cannot be counted on
            return _linear_in_first(func, args, kwargs)
        dual, moved = args[0], list(args)
        for place in places:
            axis = args[place]
            if isinstance(axis, int):
                moved[place] = _behind(axis)
            elif axis:
                moved[place] = [_behind(a) for a in axis]
            else:
                return NotImplemented
        return wrap_all(func(dual.value, *args[1:]), func(dual.tangents, *moved[1:]), (dual,))

    return rule


def _apart(func: Any, args: tuple, kwargs: dict) -> Any:
    """Pieces that may be changed in place one by one, although they come from one tensor."""
    found = _along(2)(func, args, kwargs)
    if found is NotImplemented:
        return found
    return type(found)(wrap(part.value.clone(), part.tangents.clone()) for part in found)


def _expand(func: Any, args: tuple, kwargs: dict) -> Any:
    dual = args[0]
    value = func(dual.value, *args[1:], **kwargs)
    tangents = _aligned(dual, value.ndim)
    return wrap(value, tangents.expand(len(tangents), *value.shape), (dual,))


def _transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    """The last two axes, or the only one."""
    dual = args[0]
    tangents = dual.tangents
    return wrap(func(dual.value), tangents.transpose(1, 2) if dual.ndim == 2 else tangents, (dual,))


def _permute(func: Any, args: tuple, kwargs: dict) -> Any:
    dual, order = args
    moved = [0, *(axis % dual.ndim + 1 for axis in order)]
    return wrap(func(dual.value, order), dual.tangents.permute(moved), (dual,))


def _reduction(func: Any, args: tuple, kwargs: dict) -> Any:
    """A mean or sum, over all axes or some."""
    dual = args[0]
    if kwargs.get("dtype") not in {None, dual.dtype} or not carries(dual) or not dual.ndim:
        return NotImplemented
    axes, keep = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else False)
    value = func(dual.value, *args[1:], **kwargs)
    moved = [_behind(axis) for axis in axes] if axes else list(range(1, dual.ndim + 1))
    operation = torch.mean if func._overloadpacket.__name__ == "mean" else torch.sum
    return wrap(value, operation(dual.tangents, moved, keepdim=keep))


def _as_strided(func: Any, args: tuple, kwargs: dict) -> Any:
    """A view by strides; tangents, which need not lie as the values do, are taken from the elements that it shows."""
    dual = args[0]
    value = func(dual.value, *args[1:])
    own, shown = _places(dual.value), _places(value)
    elements = torch.full((1 + max(int(places.max()) if places.numel() else 0 for places in (own, shown)),), -1)
    elements[own] = torch.arange(own.numel())
    chosen = elements[shown]
    if bool((chosen < 0).any()):
        raise Unsupported("a view by strides reads memory beside a tensor's own elements")
    return wrap(value, dual.tangents.flatten(1)[:, chosen.to(value.device)].unflatten(1, value.shape), (dual,))


def _places(value: Tensor) -> Tensor:
    """Where in its memory each element of a tensor is."""
    found = torch.tensor(value.storage_offset())
    for size, stride in zip(value.shape, value.stride(), strict=True):
        found = found[..., None] + stride * torch.arange(size)
    return found.flatten()


def _linear_in_first(func: Any, args: tuple, kwargs: dict) -> Any:
    """A function that is linear in its first argument maps tangents as it maps values."""
    if not _only_first(args, kwargs):
        return NotImplemented
    dual, rest = args[0], args[1:]
    value = func(dual.value, *rest, **kwargs)
    if isinstance(value, Tensor) and not dual.ndim:  # `vmap` may take its own axis for one of a number
        return wrap(value, torch.stack([func(t, *rest, **kwargs) for t in dual.tangents]))
    with above():
        tangents = torch.vmap(lambda t: func(t, *rest, **kwargs))(dual.tangents)
    return wrap_all(value, tangents, (dual,))


def _folded(axes: int) -> Callable[[Any, tuple, dict], Any]:
    """A linear operation on a batch of so many axes, for which tangents are a larger batch."""

    def rule(func: Any, args: tuple, kwargs: dict) -> Any:
        dual = args[0]
        if dual.ndim != axes or not _only_first(args, kwargs):
            return _linear_in_first(func, args, kwargs)
        value = func(dual.value, *args[1:])
        tangents = func(dual.tangents.flatten(0, 1), *args[1:])
        return wrap(value, tangents.unflatten(0, (_count(dual), len(dual))))

    return rule


def _one_by_one(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation that is linear in its tensors together, of which `vmap` does not know that."""
    count = next(_count(arg) for arg in args if isinstance(arg, Dual))

    def moved(arg: Any, tangent: int) -> Any:
        if isinstance(arg, Dual):
            return arg.tangents[tangent]
        return torch.zeros_like(arg) if isinstance(arg, Tensor) and arg.is_floating_point() else arg

    value = func(*map(plain, args), **kwargs)
    return wrap(value, torch.stack([func(*(moved(arg, k) for arg in args), **kwargs) for k in range(count)]))


def _padding(func: Any, args: tuple, kwargs: dict) -> Any:
    """Padding by a constant, which does not move."""
    dual, widths = args[:2]
    return wrap(func(dual.value, *args[1:]), func(dual.tangents, widths, 0), (dual,))


def _cat(func: Any, args: tuple, kwargs: dict) -> Any:
    parts, axis = args[0], args[1] if len(args) > 1 else 0
    value = func([plain(part) for part in parts], axis)
    count = next(_count(part) for part in parts if isinstance(part, Dual))
    tangents = [
        part.tangents if isinstance(part, Dual) else part.new_zeros((1, *part.shape)).expand(count, *part.shape)
        for part in parts
    ]
    if func._overloadpacket.__name__ == "cat":  # empty ones of any shape are passed over
        tangents = [moved for part, moved in zip(parts, tangents, strict=True) if tuple(part.shape) != (0,)]
    joined = func(tangents, _behind(axis)) if tangents else value.new_zeros((count, *value.shape))
    return wrap(value, joined.to(value.dtype))


def _where(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) != 3:
        return NotImplemented
    condition, first, second = args
    value = func(condition, plain(first), plain(second))
    zero = value.new_zeros(())
    moved = [_aligned(arg, value.ndim) if isinstance(arg, Dual) else zero for arg in (first, second)]
    tangents = torch.where(condition, moved[0], moved[1]).to(value.dtype)
    return wrap(value, tangents.expand(len(tangents), *value.shape))


def _masked_fill(func: Any, args: tuple, kwargs: dict) -> Any:
    if not _only_first(args, kwargs):
        return NotImplemented
    dual, mask, filling = args
    value = func(dual.value, mask, filling)
    tangents = _aligned(dual, value.ndim).masked_fill(mask, 0)
    return wrap(value, tangents.expand(len(tangents), *value.shape))


def _index_fill(func: Any, args: tuple, kwargs: dict) -> Any:
    """By the rule of what it is made of: `vmap` fills all rows with the last one's number (seen in torch 2.14)."""
    dual, axis, index, filling = args
    if not isinstance(filling, Dual):
        return NotImplemented
    chosen = torch.zeros_like(plain(dual), dtype=torch.bool).index_fill(axis, index, True)
    return torch.where(chosen, filling.to(dual.dtype), dual)


def _constant(func: Any, args: tuple, kwargs: dict) -> Any:
    """A tensor filled anew."""
    if not _only_first(args, kwargs):
        return NotImplemented
    return func(plain(args[0]), *args[1:])


def _written_over(func: Any, args: tuple, kwargs: dict) -> Any:
    """What :meth:`copy_` leaves of its target."""
    target, source = args[:2]
    value = func(plain(target), plain(source), *args[2:])
    if not isinstance(source, Dual):
        return value
    tangents = _aligned(source, value.ndim).to(value.dtype)
    return wrap(value, tangents.expand(len(tangents), *value.shape), (source,))


def _pooled(func: Any, args: tuple, kwargs: dict) -> Any:
    """Maxima with their places: tangents are taken from there."""
    dual = args[0]
    value, places = func(dual.value, *args[1:])
    axes = 2 if "2d" in func._overloadpacket.__name__ else 3
    flat = places.flatten(-axes)
    moved = dual.tangents.flatten(-axes).gather(-1, flat.expand(_count(dual), *flat.shape))
    return wrap(value, moved.reshape(_count(dual), *value.shape)), places


_SAME_ORDER = ("view", "_unsafe_view", "unsqueeze", "squeeze", "reshape", "flatten")
_COPY = ("clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "lift", "detach_copy", "alias_copy")
_LINEAR = (
    "index", "index_select", "gather", "rot90", "repeat", "tril", "triu", "take", "trace", "diag_embed", "unfold",
    "masked_select", "cumsum", "roll", "flip", "take_along_dim", "_reshape_alias",
)  # fmt: skip
_FOLDED = {
    3: ("upsample_nearest1d", "upsample_linear1d", "reflection_pad1d", "replication_pad1d", "avg_pool1d"),
    4: (
        "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "reflection_pad2d", "replication_pad2d", "avg_pool2d",
        "_adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    ),
    5: ("upsample_nearest3d", "upsample_trilinear3d", "replication_pad3d", "avg_pool3d", "_adaptive_avg_pool3d"),
}  # fmt: skip

WITHOUT_DERIVATIVE |= {
    "sign", "floor", "ceil", "round", "trunc", "heaviside", "zeros_like", "ones_like", "empty_like",
    "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_empty_strided", "argmax", "argmin", "argsort", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset",
    "is_same_size", "size", "stride", "is_contiguous", "device", "layout", "dtype", "isnan", "isinf", "isfinite",
}  # fmt: skip


# Pointwise operations -------------------------------------------------------------------------------------------------

_SLOPES: dict[str, Callable[..., Tensor]] = {
    # From the argument x, the value y and the further arguments.
    "relu": lambda x, y: (y > 0).to(x.dtype),
    "sigmoid": lambda x, y: y * (1 - y),
    "tanh": lambda x, y: torch.addcmul(torch.ones((), dtype=y.dtype, device=y.device), y, y, value=-1),
    "exp": lambda x, y: y.clone(),
    "log": lambda x, y: x.reciprocal(),
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y**3,
    "reciprocal": lambda x, y: -y * y,
    "abs": lambda x, y: x.sign(),
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "erf": lambda x, y: (-x * x).exp() * (2 / math.sqrt(math.pi)),
    "silu": lambda x, y: aten.silu_backward(torch.ones_like(x), x),
    "mish": lambda x, y: aten.mish_backward(torch.ones_like(x), x),
    "hardswish": lambda x, y: aten.hardswish_backward(torch.ones_like(x), x),
    "hardsigmoid": lambda x, y: aten.hardsigmoid_backward(torch.ones_like(x), x),
    "gelu": lambda x, y, approximate="none": aten.gelu_backward(torch.ones_like(x), x, approximate=approximate),
    "leaky_relu": lambda x, y, slope=0.01: aten.leaky_relu_backward(torch.ones_like(x), x, slope, False),
    "hardtanh": lambda x, y, low=-1, high=1: aten.hardtanh_backward(torch.ones_like(x), x, low, high),
    "softplus": lambda x, y, beta=1, threshold=20: aten.softplus_backward(torch.ones_like(x), x, beta, threshold),
}

_POINTWISE = ("elu", "pow", "clamp", "clamp_min", "clamp_max", "log1p", "expm1", "log2", "square", "atan", "threshold")


def _pointwise(func: Any, args: tuple, kwargs: dict) -> Any:
    """A pointwise function multiplies every tangent by one derivative."""
    if not _only_first(args, kwargs) or any(isinstance(arg, Tensor) and arg.ndim for arg in args[1:]):
        return NotImplemented
    dual, rest = args[0], args[1:]
    value = dual.value
    if not value.is_floating_point():
        return NotImplemented  # the derivative of a complex function need not be one number
    slope = _SLOPES.get(func._overloadpacket.__name__)
    if slope is not None:
        result = func(value, *rest, **kwargs)
        return wrap(result, _times(dual, result, slope(value, result, *rest, **kwargs)))
    with above():
        result, derivative = cast(
            tuple[Tensor, Tensor],
            torch.func.jvp(
                lambda v: func(v, *rest, **kwargs), (value.contiguous(),), (torch.ones_like(value).contiguous(),)
            ),
        )
    return wrap(result, _times(dual, result, derivative))


def _times(dual: Dual, value: Tensor, factor: Tensor | float) -> Tangents:
    """Tangents times a factor, later if that is possible; ``value`` is the result, ``factor`` nobody else's."""
    kept = value.shape == dual.shape and value.dtype == dual.moving.raw.dtype
    if kept and (not isinstance(factor, Tensor) or factor.dtype == value.dtype):
        return dual.moving.scaled(factor)
    tangents = _aligned(dual, value.ndim) * factor
    return Tangents(tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _lasting(factor: Any, value: Tensor) -> Any:
    """A factor of the function's as a number or a tensor that nobody can change, or None if its copy costs too much."""
    if isinstance(factor, Tensor):
        return factor.clone() if 4 * factor.numel() <= value.numel() else None
    return factor if isinstance(factor, (int, float)) else None


def _aligned(dual: Dual, axes: int) -> Tensor:
    """Tangents with as many axes, behind the first, as a result with which they are broadcast."""
    tangents = dual.tangents
    missing = axes - (tangents.ndim - 1)
    return tangents.reshape(tangents.shape[0], *[1] * missing, *tangents.shape[1:]) if missing else tangents


# Arithmetic -----------------------------------------------------------------------------------------------------------


def _sum(func: Any, args: tuple, kwargs: dict, into: Tangents | None = None, sign: int = 1) -> Any:
    """A sum; the tangents of its first argument are ``into`` if they are no longer needed."""
    first, second = args[:2]
    value = func(plain(first), plain(second), *args[2:], **kwargs)
    factor = sign * (args[2] if len(args) > 2 else kwargs.get("alpha", 1))
    if isinstance(first, Dual) and isinstance(second, Dual):
        if first.moving is second.moving and value.dtype == first.moving.raw.dtype:
            return wrap(value, first.moving.scaled(1 + factor))
        return wrap(value, _sum_of_both(first, second, value, factor, into))
    dual, factor = (first, 1) if isinstance(first, Dual) else (second, factor)
    if dual.shape == value.shape and dual.moving.raw.dtype == value.dtype:
        return wrap(value, dual.moving.scaled(None if factor == 1 else factor))
    tangents = _aligned(dual, value.ndim)
    tangents = tangents if factor == 1 else factor * tangents
    return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype), (dual,))


def _sum_of_both(first: Dual, second: Dual, value: Tensor, factor: float, into: Tangents | None) -> Tensor:
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


def _difference(func: Any, args: tuple, kwargs: dict, into: Tangents | None = None) -> Any:
    return _sum(func, args, kwargs, into, sign=-1)


def _reversed_difference(func: Any, args: tuple, kwargs: dict) -> Any:
    """``other - alpha * x``."""
    dual, other = args[:2]
    if len(args) > 2 or kwargs or not _only_first(args, kwargs) or isinstance(other, Tensor):
        return NotImplemented
    value = func(dual.value, other)
    return wrap(value, _times(dual, value, -1))


def _product(func: Any, args: tuple, kwargs: dict) -> Any:
    first, second = args
    a, b = plain(first), plain(second)
    value = func(a, b)
    if isinstance(first, Dual) and isinstance(second, Dual):
        if first.shape != value.shape:
            (first, a), (second, b) = (second, b), (first, a)
        one = first.moving
        if first.shape == value.shape and one.raw.dtype == second.moving.raw.dtype == value.dtype:
            tangents = one.raw * (b if one.factor is None else one.factor * b)
            return wrap(value, tangents.addcmul_(_aligned(second, value.ndim), a))
        tangents = torch.addcmul(_aligned(first, value.ndim) * b, _aligned(second, value.ndim), a)
        return wrap(value, tangents.to(value.dtype))
    dual, factor = (first, b) if isinstance(first, Dual) else (second, a)
    lasting = _lasting(factor, value)
    if lasting is not None:
        return wrap(value, _times(dual, value, lasting), (dual,))
    tangents = _aligned(dual, value.ndim) * factor
    return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _quotient(func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs or not _only_first(args, kwargs):
        return NotImplemented  # also where it rounds
    dual, divisor = args
    value = func(dual.value, divisor)
    if isinstance(divisor, (int, float)) and divisor:
        return wrap(value, _times(dual, value, 1 / divisor), (dual,))
    tangents = _aligned(dual, value.ndim) / divisor
    return wrap(value, tangents.expand(tangents.shape[0], *value.shape).to(value.dtype))


def _negative(func: Any, args: tuple, kwargs: dict) -> Any:
    value = func(args[0].value)
    return wrap(value, _times(args[0], value, -1), args)


# Products of matrices, convolutions -----------------------------------------------------------------------------------


def _matrix_product(first: Any, second: Any) -> Tensor:
    """Tangents of the product of two matrices, or of two batches of them, of which at least one moves."""
    tangents = None
    if isinstance(first, Dual):
        moved = first.tangents
        if moved.ndim == 3:  # one larger matrix
            tangents = (moved.flatten(0, 1) @ plain(second)).unflatten(0, moved.shape[:2])
        else:
            tangents = moved @ plain(second)
    if isinstance(second, Dual):
        matrix = plain(first)
        if matrix.layout == torch.strided:
            other = matrix @ second.tangents
        else:  # sparse matrices have no batches: the columns of all tangents are one matrix
            moved = second.tangents
            other = (matrix @ moved.transpose(0, 1).flatten(1)).unflatten(1, moved.shape[::2]).transpose(0, 1)
        tangents = other if tangents is None else tangents.add_(other)
    return cast(Tensor, tangents)


def _matmul(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    return wrap(func(plain(args[0]), plain(args[1])), _matrix_product(*args))


def _matmul_with_addition(func: Any, args: tuple, kwargs: dict) -> Any:
    added, first, second = args
    if isinstance(added, Dual) or kwargs:
        return NotImplemented
    return wrap(func(added, plain(first), plain(second)), _matrix_product(first, second))


def _sparse_product(func: Any, args: tuple, kwargs: dict) -> Any:
    """A sparse matrix, which does not move, times a dense one, and something that is at rest besides."""
    added, matrix, dense = args
    if isinstance(added, Dual) or isinstance(matrix, Dual):
        return NotImplemented
    value = func(added, matrix, dense.value, **kwargs)
    return wrap(value, kwargs.get("alpha", 1) * _matrix_product(matrix, dense))


def _convolution(func: Any, args: tuple, kwargs: dict) -> Any:
    """The tangents are a larger batch, without the bias."""
    dual, weight, bias, *rest = args
    if isinstance(weight, Dual) or isinstance(bias, Dual):
        return NotImplemented
    value = func(dual.value, weight, bias, *rest)
    tangents = func(dual.tangents.flatten(0, 1), weight, None, *rest)
    return wrap(value, tangents.unflatten(0, (_count(dual), len(dual))))


def _linear(func: Any, args: tuple, kwargs: dict) -> Any:
    """A linear layer as a whole: the tangents are a larger batch, without the bias."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    dual, weight, bias = given["input"], given["weight"], given.get("bias")
    if type(dual) is not Dual or isinstance(weight, Dual) or isinstance(bias, Dual) or torch.is_grad_enabled():
        return NotImplemented
    return wrap(func(dual.value, weight, bias), func(dual.tangents, weight, None))


# Normalisation and attention ------------------------------------------------------------------------------------------


def _layer_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """Normalisation has the symmetric Jacobian r (1 - 11ᵀ/n - yyᵀ/n), which its backward kernel applies in one pass."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    dual = given.pop("input")
    if type(dual) is not Dual or any(map(_holds_dual, given.values())) or torch.is_grad_enabled():
        return NotImplemented
    shape, weight, bias = list(given["normalized_shape"]), given.get("weight"), given.get("bias")
    given_value = dual.value.contiguous()
    value, mean, rstd = torch.native_layer_norm(given_value, shape, weight, bias, given.get("eps", 1e-5))
    tangents = torch.empty(dual.tangents.shape, dtype=value.dtype, device=value.device)
    for source, result in zip(dual.tangents, tangents, strict=True):
        moved, _, _ = aten.native_layer_norm_backward(
            source.contiguous(), given_value, shape, mean, rstd, None, None, [True, False, False]
        )
        if weight is None:
            result.copy_(moved)
        else:
            torch.mul(moved, weight, out=result)
    return wrap(value, tangents)


def _softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    """The Jacobian of softmax, diag(p) - ppᵀ, is symmetric: its backward kernel applies it, in one pass."""
    dual, axis = args[:2]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype:
        return NotImplemented
    return wrap(value, torch.stack([aten._softmax_backward_data(t, value, axis, value.dtype) for t in dual.tangents]))


def _log_softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    dual, axis = args[:2]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype or dual.ndim == 0:
        return NotImplemented
    tangents = dual.tangents
    return wrap(value, tangents - (tangents * value.exp()).sum(_behind(axis), keepdim=True))


def _attention(func: Any, args: tuple, kwargs: dict) -> Any:
    r"""Scaled dot-product attention by its formula, with dP = J_softmax · scale · (dQ Kᵀ + Q dKᵀ)."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")
    if (
        not all(type(entry) is Dual for entry in (q, k, v))
        or isinstance(mask, Dual)
        or given.get("is_causal")
        or given.get("dropout_p")
        or given.get("enable_gqa")
        or len({entry.shape[:-2] for entry in (q, k, v)}) > 1
        or q.ndim != 4
        or torch.is_grad_enabled()
    ):
        return NotImplemented
    scale = 1 / math.sqrt(q.shape[-1]) if given.get("scale") is None else given["scale"]
    heads = q.shape[:2]
    queries, keys, values = (entry.value.flatten(0, 1).contiguous() for entry in (q, k, v))
    queries = queries * scale
    scores = torch.bmm(queries, keys.mT)
    if mask is not None:
        apart = scores.unflatten(0, heads)
        apart = apart.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else apart + mask
        scores = apart.flatten(0, 1)
    # A row that is masked as a whole is zero.
    weights = scores.softmax(-1) if mask is None else aten._safe_softmax(scores, -1)
    # One tangent at a time, in memory used again: the scores of all of them would be the largest tensor of the model.
    change, pulled = scores, torch.empty_like(weights)
    moved = values.new_empty((_count(q), len(values), queries.shape[1], values.shape[2]))
    for dq, dk, dv, result in zip(q.tangents, k.tangents, v.tangents, moved, strict=True):
        torch.bmm((dq * scale).flatten(0, 1), keys.mT, out=change)
        change.baddbmm_(queries, dk.flatten(0, 1).contiguous().mT)
        aten._softmax_backward_data.out(change, weights, -1, weights.dtype, grad_input=pulled)
        torch.bmm(pulled, values, out=result)
        result.baddbmm_(weights, dv.flatten(0, 1).contiguous())
    return wrap(torch.bmm(weights, values).unflatten(0, heads), moved.unflatten(1, heads))


def _dropout(func: Any, args: tuple, kwargs: dict) -> Any:
    """Value and tangents are multiplied by one and the same draw."""
    dual, probability, training = args
    if training is False or not probability:
        return _copy(aten.clone.default, (dual,), {}), torch.ones_like(dual.value, dtype=torch.bool)
    value, mask = func(dual.value, probability, training)
    factor = mask.to(value.dtype)
    if probability < 1:
        factor = factor / (1 - probability)
    return wrap(value, _times(dual, value, factor)), mask


IN_PLACE.update({"add": _sum, "sub": _difference})

FUSED.update({F.scaled_dot_product_attention: _attention, F.linear: _linear, F.layer_norm: _layer_norm})

RULES.update({
    **dict.fromkeys(_SAME_ORDER, _same_order),
    **dict.fromkeys(_COPY, _copy),
    **dict.fromkeys(_LINEAR, _linear_in_first),
    **{name: _folded(axes) for axes, names in _FOLDED.items() for name in names},
    **dict.fromkeys((*_SLOPES, *_POINTWISE), _pointwise),
    **dict.fromkeys(("slice", "select", "unbind"), _along(1)),
    **dict.fromkeys(("split", "split_with_sizes"), _along(2)),
    **dict.fromkeys(("unsafe_split", "unsafe_split_with_sizes"), _apart),
    **dict.fromkeys(("mean", "sum"), _reduction),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _along(1)),
    "transpose": _along(1, 2),
    "diagonal": _along(2, 3),
    **dict.fromkeys(("mm", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _matmul_with_addition),
    "_sparse_addmm": _sparse_product,
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("masked_scatter", "masked_scatter_backward"), _one_by_one),
    **dict.fromkeys(("_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _pooled),
    **dict.fromkeys(("fill", "zero"), _constant),
    **dict.fromkeys(("_conj", "_neg_view"), _flipped),
    **dict.fromkeys(("view_as_real", "view_as_complex"), _other_numbers),
    "expand": _expand,
    "t": _transpose,
    "permute": _permute,
    "as_strided": _as_strided,
    "constant_pad_nd": _padding,
    "where": _where,
    "masked_fill": _masked_fill,
    "index_fill": _index_fill,
    "copy": _written_over,
    "add": _sum,
    "sub": _difference,
    "rsub": _reversed_difference,
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
    "convolution": _convolution,
    "_log_softmax": _log_softmax,
    "native_dropout": _dropout,
})  # fmt: skip
