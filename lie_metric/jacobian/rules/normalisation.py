"""Normalisation, softmax, attention and dropout.

Normalisation and softmax have symmetric Jacobians, which are the fused kernels of their backward passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import Dual, Rule, motionless, wrap
from lie_metric.jacobian.memory import Unknown
from lie_metric.jacobian.rules.arguments import at_once, behind, count_of, holds_dual, only_first
from lie_metric.jacobian.rules.pointwise import times
from lie_metric.jacobian.rules.views import copy

__all__ = ["attention", "dropout", "group_norm", "layer_norm", "log_softmax", "softmax"]


aten = torch.ops.aten


def _unseen(rule: Rule) -> Rule:
    """A rule for a torch function as a whole, of whose own calls modes of torch functions see nothing."""

    @functools.wraps(rule)
    def called(func: Any, args: tuple, kwargs: dict) -> Any:
        with torch._C.DisableTorchFunction():
            return rule(func, args, kwargs)

    return called


@_unseen
def layer_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """Normalisation has the symmetric Jacobian r (1 - 11ᵀ/n - yyᵀ/n), which its backward kernel applies in one pass."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    dual = given.pop("input")
    if type(dual) is not Dual or any(map(holds_dual, given.values())) or torch.is_grad_enabled():
        return NotImplemented
    shape, weight, bias = list(given["normalized_shape"]), given.get("weight"), given.get("bias")
    x = dual.value.contiguous()
    value, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, given.get("eps", 1e-5))

    def pulled(moved: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        found = aten.native_layer_norm_backward(moved, x, shape, mean, rstd, None, None, [True, False, False])
        return cast(Tensor, found[0])

    tangents = _normalised(pulled, dual.tangents, (x, mean, rstd), weight)
    return wrap(value, tangents)


def _normalised(
    pulled: Callable[..., Tensor], moved: Tensor, shared: tuple[Tensor, ...], weight: Tensor | None
) -> Tensor:
    """Tangents through a backward kernel, all at once or one by one, times a weight."""
    count = len(moved)
    if at_once(shared[0], count):
        found = pulled(moved.contiguous(), *(one.expand(count, *one.shape).contiguous() for one in shared))
        return found if weight is None else found.mul_(weight)
    tangents = torch.empty(moved.shape, dtype=moved.dtype, device=moved.device)
    for source, result in zip(moved, tangents, strict=True):
        found = pulled(source.contiguous(), *shared)
        if weight is None:
            result.copy_(found)
        else:
            torch.mul(found, weight, out=result)
    return tangents


def group_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """As for layers; of the means and deviations that it gives besides no derivative is known."""
    if not only_first(args, kwargs) or torch.is_grad_enabled():
        return NotImplemented
    dual, weight, _, _, channels, positions, groups = args[:7]
    value, mean, rstd = func(dual.value, *args[1:])
    x = dual.value.contiguous()

    def pulled(moved: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        # Groups are rows of their own: weights, which differ from channel to channel, come behind.
        batch, wanted = mean.numel() // groups, [True, False, False]
        found = aten.native_group_norm_backward(moved, x, mean, rstd, None, batch, channels, positions, groups, wanted)
        return cast(Tensor, found[0])

    factor = None if weight is None else weight.view(-1, *[1] * (dual.ndim - 2))
    try:
        tangents = _normalised(pulled, dual.tangents, (x, mean, rstd), factor)
    except NotImplementedError:
        return NotImplemented  # a device without this kernel
    sides = [wrap(side, Unknown(motionless(side, count_of(dual)), str(func))) for side in (mean, rstd)]
    return wrap(value, tangents), *sides


def softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    """The Jacobian of softmax, diag(p) - ppᵀ, is symmetric: its backward kernel applies it, in one pass."""
    dual, axis = args[:2]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype:
        return NotImplemented
    if dual.ndim and at_once(value, count_of(dual)):
        moved = dual.tangents
        return wrap(value, aten._softmax_backward_data(moved, value.expand_as(moved), behind(axis), value.dtype))
    return wrap(value, torch.stack([aten._softmax_backward_data(t, value, axis, value.dtype) for t in dual.tangents]))


def log_softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    """Less the logarithm of the sum of exponentials."""
    dual, axis = args[:2]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype or dual.ndim == 0:
        return NotImplemented
    tangents = dual.tangents
    return wrap(value, tangents - (tangents * value.exp()).sum(behind(axis), keepdim=True))


@_unseen
def attention(func: Any, args: tuple, kwargs: dict) -> Any:
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
    count, rows = count_of(q), queries.shape[1]
    if at_once(weights, count):
        # Rows of all tangents stand below one another, head by head.
        dq, dk, dv = (entry.tangents.flatten(1, 2).transpose(0, 1) for entry in (q, k, v))
        change = torch.bmm((dq * scale).flatten(1, 2), keys.mT).unflatten(1, (count, rows)).flatten(0, 1)
        repeated = queries[:, None].expand(-1, count, -1, -1).flatten(0, 1)
        change.baddbmm_(repeated, dk.flatten(0, 1).mT)
        repeated = weights[:, None].expand(-1, count, -1, -1).flatten(0, 1)
        change = aten._softmax_backward_data(change, repeated, -1, weights.dtype)
        change = change.unflatten(0, (len(values), count)).flatten(1, 2)
        found = torch.bmm(change, values).unflatten(1, (count, rows)).flatten(0, 1)
        moved = found.baddbmm_(repeated, dv.flatten(0, 1)).unflatten(0, (len(values), count)).transpose(0, 1)
        return wrap(torch.bmm(weights, values).unflatten(0, heads), moved.unflatten(1, heads))
    # One tangent at a time, in memory used again: the scores of all of them would be the largest tensor of the model.
    change, pulled = scores, torch.empty_like(weights)
    moved = values.new_empty((count, len(values), rows, values.shape[2]))
    for dq, dk, dv, result in zip(q.tangents, k.tangents, v.tangents, moved, strict=True):
        torch.bmm((dq * scale).flatten(0, 1), keys.mT, out=change)
        change.baddbmm_(queries, dk.flatten(0, 1).contiguous().mT)
        aten._softmax_backward_data.out(change, weights, -1, weights.dtype, grad_input=pulled)
        torch.bmm(pulled, values, out=result)
        result.baddbmm_(weights, dv.flatten(0, 1).contiguous())
    return wrap(torch.bmm(weights, values).unflatten(0, heads), moved.unflatten(1, heads))


def dropout(func: Any, args: tuple, kwargs: dict) -> Any:
    """Value and tangents are multiplied by one and the same draw."""
    dual, probability, training = args
    if training is False or not probability:
        return copy(aten.clone.default, (dual,), {}), torch.ones_like(dual.value, dtype=torch.bool)
    value, mask = func(dual.value, probability, training)
    factor = mask.to(value.dtype)
    if probability < 1:
        factor = factor / (1 - probability)
    return wrap(value, times(dual, value, factor)), mask
