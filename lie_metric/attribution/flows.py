"""What flows between the operations of a model along gradients, and so what each adds to the Lie derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lie_metric.algebra import Generator
from lie_metric.attribution.graph import Flow, Variable
from lie_metric.attribution.recording import Recorder
from lie_metric.representations import Invariant, Representation
from lie_metric.resampling import Resampling

__all__ = ["contributions"]


# How many probes' gradients are kept at a time: all actions are computed anew for each such part.
_PROBES = 16


def contributions(
    recorder: Recorder,
    leaf: Tensor,
    result: Tensor,
    end: Variable | None,
    cotangents: Tensor,
    representation: Representation,
    basis: Sequence[Generator],
    resampling: Resampling,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The products of all contributions with the cotangents, by image, and how precise they are.

    What a cotangent u makes of an operation's contribution is ⟨uJ, Df[X·in]⟩ - ⟨uJ, X·out⟩: what flows in, the
    products of X·in with the gradient through the operation, less what flows out, which flows into later operations.

    Args:
        recorder: What was recorded of the model.
        leaf: The inputs that gradients are taken to.
        result: What the model returned for them.
        end: The output as the last recorded tensor; None if it does not depend on the inputs.
        cotangents: Shape (P, *result.shape).
        representation: The action on the output.
        basis: The R generators.
        resampling: The stencil.
        chunk_size: How many gradients are kept at a time.

    Returns:
        Shapes (operations, R, images, P) and (R,); the latter is the sum over images and probes of the square of one
        rounding of all that flows. Products are NaN where a tensor cannot be split into images.

    Raises:
        RuntimeError: If the model changes tensors where autograd does not follow.
    """
    images, probes = recorder.images, len(cotangents)
    balance = torch.zeros(
        len(recorder.operations), len(basis), images, probes, dtype=torch.float64, device=result.device
    )
    level = balance.new_zeros(len(basis))
    if end is None or not basis:
        return balance, level
    plain = resampling.padding != "zeros" and not any(generator.intensity for generator in basis)
    conserving = {index for index, operation in enumerate(recorder.operations) if operation.commutes and plain}
    flows = [flow for flow in recorder.flows if _acts(flow.variable)]
    known, implied = _independent(flows, conserving)

    def book(flow: Flow, amount: Tensor) -> None:
        balance[flow.operation] += amount
        if flow.variable.producer is not None:
            balance[flow.variable.producer] -= amount

    by_variable: dict[Variable, list[Flow]] = {}
    for flow in known:
        by_variable.setdefault(flow.variable, []).append(flow)
    size = chunk_size or _PROBES
    for start in range(0, len(cotangents), size):
        part = slice(start, start + size)
        gradients = _gradients(known, end, leaf, result, cotangents[part])
        with torch._C.DisableTorchFunction():  # what follows is none of the model's
            for variable, leaving in by_variable.items():
                if variable.value._version != variable.version:
                    made = "the input" if variable.producer is None else repr(recorder.operations[variable.producer])
                    raise RuntimeError(
                        f"`model` changes a tensor in place where autograd does not follow, after {made} made it, so "
                        "that its action is not known. Let it make a new tensor."
                    )
                action = _act(variable.value, variable.representation, basis, resampling).flatten(1)
                precise = torch.promote_types(action.dtype, torch.float32)
                for flow in leaving:
                    amount = torch.zeros_like(balance[0])
                    if flow in gradients:
                        # For complex tensors autograd's gradient is that of the real inner product.
                        gradient = gradients.pop(flow).to(precise)
                        amount[..., part] = _by_image(action.to(precise), gradient, images)
                        level += _rounding(action, gradient, variable.value)
                    book(flow, amount)
    wanted = representation.tangents(end.value, basis, resampling).flatten(1)
    balance[-1] -= _by_image(wanted, cotangents.flatten(1), images)
    level += _rounding(wanted, cotangents.flatten(1), end.value)
    for flow, operation in implied:
        book(flow, -balance[operation] if flow.operation == operation else balance[operation].clone())
    return balance, level


def _by_image(actions: Tensor, gradients: Tensor, images: int) -> Tensor:
    """Inner products of what each image makes of two tensors: (R, n) and (P, n) to (R, images, P)."""
    if actions.shape[1] % images:
        return actions.new_full((len(actions), images, len(gradients)), torch.nan, dtype=torch.float64)
    first, second = (one.reshape(len(one), images, -1).transpose(0, 1) for one in (actions, gradients))
    return (first @ second.mH).real.transpose(0, 1).double()


def _rounding(action: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """The square of one rounding of products of actions with gradients, summed over gradients: shape (generators,).

    Products of n elements, each off by a rounding of its own, are off by that times the norm of what is summed, which
    is that of the factors over √n.
    """
    sizes = torch.linalg.vector_norm(action, dim=1).double() * torch.linalg.vector_norm(gradient).double()
    precision = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
    return (precision * sizes).square() / action.shape[1]


def _acts(variable: Variable) -> bool:
    return variable.value.numel() > 0 and not isinstance(variable.representation, Invariant)


def _independent(flows: Sequence[Flow], conserving: set[int]) -> tuple[list[Flow], list[tuple[Flow, int]]]:
    """Which flows are to be computed, and which follow from them, in this order, as the balance of which operation.

    As much flows into an operation that commutes with the action as flows out: Kirchhoff's law, with all others as one
    ground. The flows along a spanning tree follow from the rest; the tree of the largest tensors leaves least to do.
    """
    ground = -1
    parents = {operation: operation for operation in (*conserving, ground)}

    def root(operation: int) -> int:
        while parents[operation] != operation:
            parents[operation] = operation = parents[parents[operation]]
        return operation

    known: list[Flow] = []
    tree: dict[int, list[tuple[int, Flow]]] = {operation: [] for operation in parents}
    for flow in sorted(flows, key=lambda flow: -flow.variable.value.numel()):
        producer = -1 if flow.variable.producer is None else flow.variable.producer
        ends = [operation if operation in conserving else ground for operation in (producer, flow.operation)]
        first, second = map(root, ends)
        if first == second:
            known.append(flow)
        else:
            parents[first] = second
            for here, there in (ends, ends[::-1]):
                tree[here].append((there, flow))
    implied, ahead, seen = [], [ground], {ground}
    while ahead:
        for operation, flow in tree[ahead.pop()]:
            if operation not in seen:
                seen.add(operation)
                ahead.append(operation)
                implied.append((flow, operation))
    return known, implied[::-1]


def _gradients(
    flows: Sequence[Flow], end: Variable, leaf: Tensor, result: Tensor, cotangents: Tensor
) -> dict[Flow, Tensor]:
    """The gradients by which tensors flow into operations, shape (n, elements), where there are any."""
    wanted: dict[Any, list[tuple[Flow, int]]] = {}
    for flow in flows:
        for node, place in flow.sockets:
            wanted.setdefault(node, []).append((flow, place))
    # An output that is the model's result has no gradient but the cotangent.
    found = {flow: cotangents.flatten(1) for flow in flows if flow.variable is end and not flow.sockets}
    arrived: dict[Flow, Tensor] = {}

    def listen(here: list[tuple[Flow, int]], gradients: tuple[Tensor | None, ...]) -> None:
        for flow, place in here:
            gradient = gradients[place]
            if gradient is not None:
                arrived[flow] = arrived[flow] + gradient if flow in arrived else gradient

    handles = [
        node.register_hook(lambda gradients, _, here=here: listen(here, gradients)) for node, here in wanted.items()
    ]
    try:
        for probe, cotangent in enumerate(cotangents):
            torch.autograd.grad(result, leaf, cotangent, retain_graph=True)
            while arrived:
                flow, gradient = arrived.popitem()
                if flow not in found:
                    found[flow] = gradient.new_zeros(len(cotangents), gradient.numel())
                found[flow][probe] = gradient.reshape(-1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _act(tensor: Tensor, carrier: Representation, basis: Sequence[Generator], resampling: Resampling) -> Tensor:
    with torch.no_grad():
        if tensor.is_complex():
            parts = [_act(part, carrier, basis, resampling) for part in (tensor.real, tensor.imag)]
            return torch.complex(*parts)
        moved = carrier.tangents(tensor, basis, resampling)
        # Padding by -inf ahead of a maximum, and masks of attention by -inf or the lowest of all numbers, leave slopes
        # that mean nothing: such entries carry no action.
        limit = torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).max ** 0.5
        if tensor.abs().amax() <= limit:
            return moved
        return torch.where(moved.abs() <= limit, moved, 0.0)
