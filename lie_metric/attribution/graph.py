"""The calls of a model as a graph: operations, the tensors between them, and the ways of tensors into operations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lie_metric.representations import Representation

__all__ = ["Flow", "Operation", "Variable"]


@dataclass(frozen=True)
class Operation:
    """One recorded torch function call.

    Attributes:
        path: Path of the innermost module it was called in; "" is the model itself.
        function: Name of the torch function.
        kind: Its type in the sense of ``by("type")``.
        shape: Shape of its (first) output.
        representation: The action its output was assumed to carry.
        commutes: Whether it is one that moves with its input, so that its Lie derivative is zero by construction.
    """

    path: str
    function: str
    kind: str
    shape: tuple[int, ...]
    representation: str
    commutes: bool = False


@dataclass(eq=False)
class Variable:
    """A tensor of the forward pass that depends on the input.

    Attributes:
        value: The tensor as it was then, even if it was written to later.
        representation: The action it is assumed to carry.
        producer: Index of the operation it comes from; None for the input.
        version: How often the memory of ``value`` had been written to.
    """

    value: Tensor
    representation: Representation
    producer: int | None
    version: int


@dataclass(eq=False)
class Flow:
    """A tensor's way into one operation.

    Attributes:
        variable: The tensor.
        operation: Index of the operation.
        sockets: Nodes of autograd's graph and the places of their ``next_functions`` by which the tensor enters; the
            gradients that leave there add up to the tensor's gradient through this operation alone.
    """

    variable: Variable
    operation: int
    sockets: list[tuple[Any, int]] = field(default_factory=list)
