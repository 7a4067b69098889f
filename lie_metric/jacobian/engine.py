"""Products of a function's Jacobian with tangents: which method takes them, and in how many parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lie_metric.jacobian.methods import METHODS, reverse

__all__ = ["Method", "push"]

Method = Literal["auto", "forward", "reverse", "double_backward", "difference"]

# Reverse and forward mode agree to a few thousand roundings in any sound model; a wrong rule is off by far more.
_AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-6}

_ORDER: dict[str, tuple[str, ...]] = {
    "forward": ("forward", "forward vmap", "forward loop"),
    "auto": ("forward", "forward vmap", "forward loop", "double_backward"),
}
"""What a method tries in turn. The finer names are those that a result reports, and may be asked for again."""


def push(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, method: str, chunk_size: int | None
) -> tuple[Tensor, Tensor, str]:
    """The value of a function, its derivatives along tangents, and the method that gave them.

    Args:
        function: A function of one tensor; if inputs have several rows, so have its values.
        inputs: Shape (B, ...).
        tangents: Shape (K, B, ...).
        method: One of :data:`Method`, or the method of an earlier result.
        chunk_size: How many tangents to push at a time, or None.

    Returns:
        The value, the derivatives (K, ...) and the method.

    Raises:
        RuntimeError: If the function cannot be differentiated.
    """
    chunk = chunk_size or max(len(tangents), 1)
    # With gradients on, what two parts save would be kept for the backward pass all the same.
    free = chunk_size is None and len(tangents) >= 4 and not torch.is_grad_enabled()
    survey = _survey(function, inputs) if len(inputs) > 1 and method == "auto" else None
    if free and survey is not None and len(tangents) * len(inputs) * survey.largest > _LARGE:
        # A second pass of the images is a seventh of the time for six tangents, and saves nearly half of the memory.
        chunk = (len(tangents) + 1) // 2
    # A backward pass costs about what a tangent does; the check against forward mode costs two.
    narrow = survey is not None and survey.elements + 2 < len(tangents)
    while True:
        try:
            output, products, used = _choose(function, inputs, tangents, method, chunk, narrow)
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk = (chunk + 1) // 2
            warnings.warn(
                f"Out of memory: repeated with `chunk_size={chunk}`; set it to save the attempt.", stacklevel=4
            )
            continue
        _refuse_detached(function, inputs, tangents, output, products)
        return output, products, used


def _choose(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    tangents: Tensor,
    method: str,
    chunk: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, str]:
    if narrow:
        try:
            output, products = reverse(function, inputs, tangents, chunk)
            check = _choose(function, inputs, tangents[:1], "forward", 1, False)[1]
        except (RuntimeError, NotImplementedError):
            pass  # the order below finds out whether it was the method or the model
        else:
            error, size = (products[:1] - check).norm(), check.norm()
            if bool(error <= _AGREEMENT.get(products.dtype, 1e-2) * size):
                return output, products, "reverse"
            warnings.warn(
                f"Reverse mode differs from forward mode by {float(error / size):.1e} of it on this model, whose "
                "images influence one another or which has an operation with a wrong rule; forward mode is used.",
                stacklevel=5,
            )
    reasons: dict[str, str] = {}
    for name in _ORDER.get(method, (method,)):
        try:
            output, products = METHODS[name](function, inputs, tangents, chunk)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if name != "forward" and not set(reasons) - {"forward"}:
                with torch.no_grad():
                    function(inputs)  # a fault of the model itself is shown as it is
            reasons[name] = str(error).strip().split("\n")[0][:200]
            continue
        # Whether tensors carry their tangents or `vmap` does is a matter of speed alone.
        if set(reasons) - {"forward"}:
            warnings.warn(
                f"Method {name!r} is used, because an operation lacks a rule ({_told(reasons)}).", stacklevel=5
            )
        return output, products, name
    raise RuntimeError(
        f"`model` must be differentiable by method {method!r}, but an operation lacks a rule ({_told(reasons)}). "
        "Replace it, or choose another method."
    )


def _told(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{tried}: {reason}" for tried, reason in reasons.items())


class _Survey(TorchFunctionMode):
    """What one image makes of a model, at a fraction of a pass.

    Attributes:
        elements: How many elements its output has.
        largest: The size in bytes of the largest tensor on the way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.nbytes)
        return result


# Bytes of all tangents of one tensor above which they go through the model in two parts.
_LARGE = 128 * 2**20


def _survey(function: Callable[[Tensor], Tensor], inputs: Tensor) -> _Survey | None:
    survey = _Survey()
    try:
        with torch.no_grad(), survey:
            first = function(inputs[:1])
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    survey.elements = first.numel()
    return survey if first.shape[:1] == (1,) else None


def _refuse_detached(
    function: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Tensor, output: Tensor, products: Tensor
) -> None:
    """A derivative of exactly zero is doubted: a detached tensor gives zero although the output moves."""
    if products.numel() == 0 or bool(products.any()) or not bool(tangents.any()):
        return
    size = tangents.flatten(1).norm(dim=1).argmax()
    with torch.no_grad():
        step = 1e-2 * inputs.norm() / tangents[size].norm()
        change = function(inputs + step * tangents[size]) - output
    rounding = 1e3 * torch.finfo(output.dtype).eps
    if bool(change.norm() > rounding * output.norm()) and bool(torch.isfinite(change).all()):
        raise RuntimeError(
            "`model` must be differentiable, but its derivative is exactly zero while its output moves with the input. "
            "It detaches a tensor, leaves torch (`.detach()`, `.item()`, `.numpy()`), or rounds: remove that."
        )
