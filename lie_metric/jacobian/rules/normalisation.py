"""Normalisation, softmax, attention and dropout.

Normalisation and softmax have symmetric Jacobians, which are the fused kernels of their backward passes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lie_metric.jacobian.carrying import Dual, wrap
from lie_metric.jacobian.rules.arguments import behind, count_of, holds_dual
from lie_metric.jacobian.rules.pointwise import times
from lie_metric.jacobian.rules.views import copy

__all__ = ["attention", "dropout", "layer_norm", "log_softmax", "softmax"]


aten = torch.ops.aten


def layer_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """Normalisation has the symmetric Jacobian r (1 - 11ᵀ/n - yyᵀ/n), which its backward kernel applies in one pass."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    dual = given.pop("input")
    if type(dual) is not Dual or any(map(holds_dual, given.values())) or torch.is_grad_enabled():
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


def softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    """The Jacobian of softmax, diag(p) - ppᵀ, is symmetric: its backward kernel applies it, in one pass."""
    dual, axis = args[:2]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype:
        return NotImplemented
    return wrap(value, torch.stack([aten._softmax_backward_data(t, value, axis, value.dtype) for t in dual.tangents]))


def log_softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    """Less the logarithm of the sum of exponentials."""
    dual, axis = args[:2]
    value = func(dual.value, *args[1:])
    if value.dtype != dual.dtype or dual.ndim == 0:
        return NotImplemented
    tangents = dual.tangents
    return wrap(value, tangents - (tangents * value.exp()).sum(behind(axis), keepdim=True))


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
    moved = values.new_empty((count_of(q), len(values), queries.shape[1], values.shape[2]))
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
