"""The ways to multiply with a Jacobian: forward mode in three forms, reverse mode, and double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import Unsupported, push_forward

__all__ = ["METHODS", "reverse"]


def _forward(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Forward mode; tensors carry their tangents, those of a chunk share one primal pass."""
    if torch.is_grad_enabled():
        raise Unsupported("the fused rules have no derivatives of their own")
    try:
        return _in_chunks(lambda part: push_forward(function, inputs, part), function, inputs, tangents, chunk)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever a model does that these tensors cannot stand, plain ones can; its own faults are met again there.
        raise Unsupported(str(error)) from error


def _forward_vmap(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Forward mode; the tangents of a chunk are vectorised over one primal pass."""

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], torch.func.jvp(function, (inputs,), (tangent,)))

    out_dims: Any = (None, 0)
    # Random operations that are active in evaluation mode draw once for all tangents.
    vectorised = torch.vmap(push, out_dims=out_dims, randomness="same")
    return _in_chunks(vectorised, function, inputs, tangents, chunk)


def _in_chunks(
    push: Callable[[Tensor], tuple[Tensor, Tensor]],
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    tangents: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    if len(tangents) == 0:
        output = function(inputs)
        return output, output.new_zeros((0, *output.shape))
    parts = [push(part) for part in tangents.split(chunk)]
    return parts[0][0], torch.cat([product for _, product in parts])


def _forward_loop(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Forward mode, one tangent at a time, for operations without a batching rule."""

    def push(part: Tensor) -> tuple[Tensor, Tensor]:
        output, product = cast(tuple[Tensor, Tensor], torch.func.jvp(function, (inputs,), (part[0],)))
        return output, product[None]

    return _in_chunks(push, function, inputs, tangents, 1)


def reverse(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """One backward pass for each output element of an image gives its row of the Jacobian for every image."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        point = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        output = function(point)
        if not output.requires_grad:
            return output, output.new_zeros((len(tangents), *output.shape))
        if output.shape[:1] != inputs.shape[:1]:
            raise ValueError(
                f"`method` must not be 'reverse' for an output of shape {tuple(output.shape)} from "
                f"{len(inputs)} images: it needs one row of outputs for each image. Use method='forward'."
            )
        columns = []
        for column in output.flatten(1).unbind(1) if output.ndim > 1 else (output,):
            (row,) = torch.autograd.grad(
                column.sum(), point, retain_graph=True, create_graph=keep, materialize_grads=True
            )
            columns.append((tangents * row).flatten(2).sum(2))
    return output if keep else output.detach(), torch.stack(columns, dim=-1).reshape(len(tangents), *output.shape)


def _double_backward(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The derivative of the vector-Jacobian product with respect to its vector is the Jacobian-vector product."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        point = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        output = function(point)
        if not output.requires_grad:
            return output, output.new_zeros((len(tangents), *output.shape))
        cotangent = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, point, cotangent, create_graph=True, materialize_grads=True)
        products = [
            torch.autograd.grad(
                pulled, cotangent, tangent, retain_graph=True, create_graph=keep, materialize_grads=True
            )[0]
            for tangent in tangents
        ]
    stacked = torch.stack(products) if products else output.new_zeros((0, *output.shape))
    return output if keep else output.detach(), stacked


METHODS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward": _forward,
    "forward vmap": _forward_vmap,
    "forward loop": _forward_loop,
    "reverse": reverse,
    "double_backward": _double_backward,
}
