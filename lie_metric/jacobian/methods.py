"""The ways to multiply with a Jacobian: forward mode in three forms, reverse mode, double backward, and differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from lie_metric.jacobian import rules  # noqa: F401  # they register themselves
from lie_metric.jacobian.precision import coarsest
from lie_metric.jacobian.pushing import push_forward
from lie_metric.jacobian.refusals import Unsupported
from lie_metric.running.gradients import GraphsKept
from lie_metric.warning import warn

__all__ = ["METHODS", "Function", "alone", "central_difference", "difference", "raised", "size_of"]

Function = Callable[[Tensor], Tensor]


_GRADIENTS = "gradients are enabled, and its results could not be differentiated again; measure under `torch.no_grad()`"


def _forward(function: Function, inputs: Tensor, tangents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Forward mode; tensors carry their tangents, those of a chunk share one primal pass."""
    if torch.is_grad_enabled():
        raise Unsupported(_GRADIENTS)
    return _in_chunks(lambda part: push_forward(function, inputs, part), function, inputs, tangents, chunk)


def _forward_created(function: Function, inputs: Tensor, tangents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The same, where moving tensors are written into such as the function creates."""
    if torch.is_grad_enabled():
        raise Unsupported(_GRADIENTS)
    return _in_chunks(lambda part: push_forward(function, inputs, part, True), function, inputs, tangents, chunk)


def _forward_vmap(function: Function, inputs: Tensor, tangents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Forward mode; the tangents of a chunk are vectorised over one primal pass."""

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], torch.func.jvp(function, (inputs,), (tangent,)))

    out_dims: Any = (None, 0)
    # Random operations that are active in evaluation mode draw once for all tangents.
    vectorised = torch.vmap(push, out_dims=out_dims, randomness="same")
    return _in_chunks(vectorised, function, inputs, tangents, chunk)


def _forward_loop(function: Function, inputs: Tensor, tangents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Forward mode, one tangent at a time, for operations without a batching rule."""

    def push(part: Tensor) -> tuple[Tensor, Tensor]:
        output, product = cast(tuple[Tensor, Tensor], torch.func.jvp(function, (inputs,), (part[0],)))
        return output, product[None]

    return _in_chunks(push, function, inputs, tangents, 1)


def _in_chunks(
    push: Callable[[Tensor], tuple[Tensor, Tensor]], function: Function, inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    if len(tangents) == 0:
        output = function(inputs)
        return output, output.new_zeros((0, *output.shape))
    parts = [push(part) for part in tangents.split(chunk)]
    return parts[0][0], torch.cat([product for _, product in parts])


def _reverse(function: Function, inputs: Tensor, tangents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """One backward pass for each output element of an image gives its row of the Jacobian for every image."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        point = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        with GraphsKept():
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


def _double_backward(function: Function, inputs: Tensor, tangents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The derivative of the vector-Jacobian product with respect to its vector is the Jacobian-vector product."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        point = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        with GraphsKept():
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


METHODS: dict[str, Callable[[Function, Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "forward": _forward,
    "forward created": _forward_created,
    "forward vmap": _forward_vmap,
    "forward loop": _forward_loop,
    "reverse": _reverse,
    "double_backward": _double_backward,
}
"""By automatic differentiation: from a function, inputs, tangents and how many of them to push at a time."""


def alone(function: Function, image: Tensor) -> Tensor:
    """A function of one image, which says nothing of its own if it is one of batches.

    Args:
        function: The function.
        image: Shape (1, ...).

    Returns:
        Its value.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(std|var)\w*\(\): degrees of freedom")
        return function(image)


def raised(function: Function, precise: Function | None, inputs: Tensor) -> tuple[Function, Tensor, Tensor]:
    """A function in float64 where it runs so, and as it is where it does not.

    Args:
        function: The function.
        precise: The same in float64, if there is a way to have it.
        inputs: Where it is evaluated.

    Returns:
        The function, the inputs in its precision, and its value there.
    """
    if inputs.dtype != torch.float64 and inputs.device.type != "mps":
        try:
            wide = inputs.double()
            value = (precise or function)(wide)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            pass  # such as weights that stay in float32: there is nothing to tell, the other way is as usual
        else:
            if value.dtype == torch.float64:
                return precise or function, wide, value
    return function, inputs, function(inputs)


def size_of(inputs: Tensor) -> Tensor:
    """The norm of inputs, of which steps are parts; that of ones if they are all zero, as black images are.

    Args:
        inputs: Any shape.

    Returns:
        A positive number.

    Example:
        >>> size_of(torch.zeros(4)).item()
        2.0
    """
    size = inputs.norm()
    return torch.where(size > 0, size, torch.ones_like(inputs).norm())


def central_difference(function: Function, inputs: Tensor, tangent: Tensor, step: float) -> Tensor:
    """(f(x + h t) - f(x - h t)) / 2h.

    Args:
        function: f.
        inputs: x.
        tangent: t, of the shape of x.
        step: h.

    Returns:
        The difference, of the shape of f(x).

    Example:
        >>> x = torch.tensor([1.0], dtype=torch.float64)
        >>> round(central_difference(torch.exp, x, x, 1e-4).item(), 6)
        2.718282
    """
    return (function(inputs + step * tangent) - function(inputs - step * tangent)) / (2 * step)


_LARGEST_STEP = 1e-2
_STEPS = {torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}
_FEW_STEPS = (1e-2, 3e-3, 1e-3)
# Differences of neighbouring steps that are as near as this have converged.
_CONVERGED = 1e-2
# Where differences of two steps are as near as this, the narrower is a hundred times nearer to a smooth derivative.
_CLOSE = 1e-5
# Differences of small and large steps that are further apart are those of different functions.
_APART = 1e-2


def _nearest(found: list[Tensor]) -> tuple[int, float]:
    """Which difference is nearest to that of the step before, and how far the two are apart, relatively."""
    moves = any(bool(part.any()) for part in found)
    apart = [
        float((a - b).norm() / b.norm()) if bool(b.any()) else (torch.inf if moves else 0.0) for a, b in pairwise(found)
    ]
    best = min(range(len(apart)), key=lambda index: apart[index])
    return best + 1, apart[best]


def difference(
    function: Function, precise: Function | None, inputs: Tensor, tangents: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Central differences, in float64 where the function runs so.

    Steps are parts of ‖x‖ / ‖t‖. The one is taken whose difference along a sum of all tangents is nearest to that of
    its neighbour, and in float64 another for a tangent along which these two are not near; differences that vanish for
    small steps alone have not converged: the function jumps.

    Args:
        function: The function.
        precise: The same in float64, if there is a way to have it.
        inputs: Shape (B, ...).
        tangents: Shape (K, B, ...).

    Returns:
        The value, the derivatives (K, ...), and the step.

    Warns:
        UserWarning: If no step gives a difference that has converged; then the largest is taken.
    """
    with torch.no_grad():
        chosen, points, value = raised(function, precise, inputs)
        moved = tangents.to(points.dtype)
        sizes = [size_of(points) / t.norm() for t in moved]
        total = sum((t * s for t, s in zip(moved, sizes, strict=True) if bool(t.any())), torch.zeros_like(points))
        steps = _STEPS.get(value.dtype, _FEW_STEPS)
        found = [central_difference(chosen, points, total, step) for step in steps]
        if len(steps) > len(_FEW_STEPS) and coarsest(chosen, points) > torch.finfo(torch.float64).eps:
            # What is computed in float32 on the way, or leaves torch and comes back so, is at rest for small steps.
            large = [central_difference(chosen, points, total, step) for step in _FEW_STEPS]
            if max(float((part - large[-1]).norm()) for part in found[3:]) > _APART * float(large[-1].norm()):
                steps, found = _FEW_STEPS, large
        best, gap = _nearest(found)
        step = steps[best]
        if not gap <= _CONVERGED:
            step = _LARGEST_STEP
            warn(
                f"No step gives central differences that have converged: the function jumps, or is too noisy. Those of "
                f"a step of {step:g} of the norm of the inputs are given; they hold for changes of that size alone."
            )
        wider = steps[best - 1] if gap <= _CONVERGED and len(steps) > len(_FEW_STEPS) else None

        def along(t: Tensor) -> Tensor:
            taken = central_difference(chosen, points, t, step)
            if wider is None:
                return taken
            other = central_difference(chosen, points, t, wider)
            apart = (taken - other).norm()
            rounding = 10 * torch.finfo(value.dtype).eps / step * value.norm()
            if bool(apart <= torch.maximum(_CLOSE * taken.norm(), rounding)):
                return taken
            # It bends more along this tangent than along the sum.
            own = [central_difference(chosen, points, t, each) for each in steps]
            gaps = [float((a - b).norm()) if bool(b.any()) else torch.inf for a, b in pairwise(own)]
            return own[1 + gaps.index(min(gaps))] if min(gaps) < torch.inf else taken

        products = [
            along(t * s) / s if bool(t.any()) else torch.zeros_like(value) for t, s in zip(moved, sizes, strict=True)
        ]
        stacked = torch.stack(products) if products else value.new_zeros((0, *value.shape))
        output = value if value.dtype == inputs.dtype else function(inputs)
        return output, stacked.to(output.dtype), step
