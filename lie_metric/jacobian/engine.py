"""Products of a function's Jacobian with tangents: which method, in how many parts, and whether they are right."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lie_metric.jacobian.methods import METHODS, Function, alone, difference
from lie_metric.jacobian.pushing import first_undefined
from lie_metric.jacobian.refusals import Unsupported, WrittenInto
from lie_metric.jacobian.verdicts import Check, Declared, Disagreement, Jump, Undefined
from lie_metric.jacobian.verification import verify
from lie_metric.warning import warn

__all__ = ["Method", "Products", "push"]

Method = Literal["auto", "forward", "reverse", "double_backward", "difference"]

_ORDER: dict[str, tuple[str, ...]] = {
    "forward": ("forward", "forward created", "forward vmap", "forward loop"),
    "auto": ("forward", "forward created", "forward vmap", "forward loop", "double_backward", "reverse"),
}
"""What a method tries in turn. The finer names are those that a result reports, and may be asked for again."""


_CARRYING = {"forward", "forward created"}


class Products(NamedTuple):
    """What :func:`push` gives.

    Attributes:
        value: f(x), shape (B, ...).
        products: Shape (K, B, ...).
        method: The method that gave them.
        check: How they compare with the function itself.
    """

    value: Tensor
    products: Tensor
    method: str
    check: Check


def push(
    function: Function,
    inputs: Tensor,
    tangents: Tensor,
    method: str = "auto",
    chunk_size: int | None = None,
    *,
    precise: Function | None = None,
    verified: bool = True,
) -> Products:
    """The value of a function and its derivatives along tangents.

    Args:
        function: A function of one tensor; if inputs have several rows, so have its values.
        inputs: Shape (B, ...).
        tangents: Shape (K, B, ...).
        method: One of :data:`Method`, or the method of an earlier result.
        chunk_size: How many tangents to push at a time, or None.
        precise: The function in float64, for the check and for differences, if there is a way to have it.
        verified: Whether the products are checked against the function itself; a method that fails the check gives way
            to the next.

    Returns:
        The value, the derivatives, the method and the check.

    Raises:
        RuntimeError: If no method can differentiate the function, or none agrees with it.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> push(torch.square, x, torch.ones(1, 1, 2).double()).products.tolist()
        [[[2.0, 4.0]]]
    """
    function, precise = _on_a_copy(function), None if precise is None else _on_a_copy(precise)
    if method == "difference":
        if torch.is_grad_enabled() and _has_graph(function, inputs):
            raise RuntimeError(
                "`method` must not be 'difference' where gradients are to flow, got enabled gradients. Measure under "
                "`torch.no_grad()`, or choose another method for a penalty."
            )
        value, products, step = difference(function, precise, inputs, tangents)
        made = Check("not made", "difference", reason=f"steps of {step:g} of the norm of the inputs")
        return Products(value, products, "difference", made)
    chunk = chunk_size or max(len(tangents), 1)
    large = len(tangents) * inputs.nbytes > _LARGE / _GROWTH and method in _CARRYING
    survey = _survey(function, inputs) if len(inputs) > 1 and (method == "auto" or large) else None
    # With gradients on, what two parts save would be kept for the backward pass all the same.
    free = chunk_size is None and len(tangents) >= 4 and not torch.is_grad_enabled()
    if free and survey is not None and len(tangents) * len(inputs) * survey.largest > _LARGE:
        # A second pass of the images is a seventh of the time for six tangents, and saves nearly half of the memory.
        chunk = (len(tangents) + 1) // 2
    names = _ORDER.get(method, (method,))
    # A backward pass costs about what a tangent does.
    if method == "auto" and survey is not None and survey.elements + 2 < len(tangents):
        names = ("reverse", *names[:-1])
    return _first_that_works(names, function, precise, inputs, tangents, chunk, verified, method)


def _on_a_copy(function: Function) -> Function:
    """The function, which may change what it is given in place."""
    return lambda x: function(x.clone())


def _has_graph(function: Function, inputs: Tensor) -> bool:
    return inputs.requires_grad or function(inputs).requires_grad


def _first_that_works(
    names: tuple[str, ...],
    function: Function,
    precise: Function | None,
    inputs: Tensor,
    tangents: Tensor,
    chunk: int,
    verified: bool,
    asked: str,
) -> Products:
    reasons: dict[str, str] = {}
    wrong: dict[str, str] = {}
    written = declared = undefined = False
    for name in names:
        if name == "forward created" and not written and "forward" in names:
            continue
        if declared and name not in _CARRYING:
            continue  # it has the same from autograd
        try:
            value, products = _within_memory(name, function, inputs, tangents, chunk)
            made = Check("not made", name, reason="checked before")
            if verified:
                made = _check(name, function, precise, inputs, tangents, value, products)
            elif not torch.is_grad_enabled() and not _is_finite(products) and _is_finite(value):
                warn(f"Derivatives of the model are NaN or infinite. {_cause(function, inputs, tangents)}")
        except torch.OutOfMemoryError:
            raise
        except Disagreement as error:
            wrong[name] = str(error)
            if isinstance(error, Jump):
                break  # that is so by whatever method
            declared = declared or isinstance(error, Declared)
            continue
        except Undefined as error:
            undefined = True
            reasons[name] = str(error)
            continue
        except Exception as error:
            written = isinstance(error, WrittenInto)
            if not isinstance(error, Unsupported):
                _fault_of_the_function(function, inputs)
            if len(names) == 1 and isinstance(error, ValueError):
                raise  # the method itself says what it needs
            if _is_defect(error):
                warn(
                    f"A rule of forward mode failed ({type(error).__name__}: {_line(error)}); another method is used. "
                    "Please report it with the model."
                )
            reasons[name] = _line(error)
            continue
        if made.status == "inconclusive" and (wrong or (reasons and not torch.is_grad_enabled())):
            # What autograd declares is not taken on trust where following the function failed.
            wrong[name] = f"whether it gives derivatives of the function itself could not be told: {made.reason}"
            continue
        if made.status == "not made" and verified and not _is_finite(value):
            warn(f"The outputs of the model are not finite, and their derivatives say nothing. {_ADVICE}")
        if made.warning:
            warn(f"The derivatives of the model are doubtful: {made.warning}.")
        if made.status == "inconclusive":
            warn(
                f"Whether method {name!r} gives derivatives of the function itself could not be told: {made.reason}. "
                "Compare with `method='difference'`."
            )
        # Whether tensors carry their tangents or `vmap` does is a matter of speed alone.
        if asked == "auto" and (wrong or set(reasons) - _CARRYING):
            why = "others do not agree with the function" if wrong else "an operation lacks a rule"
            warn(f"Method {name!r} is used, because {why} ({_told(reasons | wrong)}).")
        return Products(value, products, name, made)
    lost = {tried: reason for tried, reason in reasons.items() if "out of torch" in reason or "its address" in reason}
    if wrong:
        raise RuntimeError(
            f"`model` must have a derivative that agrees with its own central differences, but by method {asked!r} "
            f"none does ({_told(lost | wrong | reasons)}). Mend what is named, or pass `method='difference'`, which "
            "measures the function as it is, without gradients."
        )
    if undefined:
        raise RuntimeError(
            f"`model` must have finite derivatives where it is finite, got NaN or infinity "
            f"({_told(reasons)}). {_cause(function, inputs, tangents)}"
        )
    raise RuntimeError(
        f"`model` must be differentiable by method {asked!r}, but none could be used ({_told(reasons)}). "
        "Replace it, choose another method, or pass `method='difference'`."
    )


def _within_memory(
    name: str, function: Function, inputs: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    while True:
        try:
            return METHODS[name](function, inputs, tangents, chunk)
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk = (chunk + 1) // 2
            warn(f"Out of memory: repeated with `chunk_size={chunk}`; set it to save the attempt.")


def _check(
    name: str,
    function: Function,
    precise: Function | None,
    inputs: Tensor,
    tangents: Tensor,
    value: Tensor,
    products: Tensor,
) -> Check:
    def run(f: Function, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return METHODS[name](f, x, t, len(t))

    # Without carried tangents a number that leaves torch is lost in silence.
    return verify(run, name, function, precise, inputs, tangents, value, products, name not in _CARRYING)


def _fault_of_the_function(function: Function, inputs: Tensor) -> None:
    """A function that fails by itself is shown as it fails."""
    with torch.no_grad():
        function(inputs)


def _cause(function: Function, inputs: Tensor, tangents: Tensor) -> str:
    """Where derivatives are lost to NaN, and what to do."""
    name = first_undefined(function, inputs, tangents)
    what = f"The first are those of `{name}`. " if name else ""
    return f"{what}{_ADVICE} `method='difference'` measures the function as it is."


_ADVICE = (
    "Roots, powers, norms, angles and logarithms have no derivative at 0 (or ±1), as where a point meets itself or "
    "padding lies: leave those entries out before (`torch.where(mask, x, 1.0)`, no self pairs), or add a small number "
    "beneath the root."
)


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _is_defect(error: Exception) -> bool:
    """Whether it is neither a refusal nor something that torch cannot do, but came from this package."""
    if isinstance(error, (Unsupported, NotImplementedError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename) if frames else None
    return last is not None and (last in _CARRYING_FILES or last.parent == _HERE / "rules")


_HERE = Path(__file__).parent
_CARRYING_FILES = {_HERE / name for name in ("carrying.py", "memory.py", "pushing.py")}


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _told(reasons: Mapping[str, str]) -> str:
    """Reasons by method, each once."""
    grouped: dict[str, list[str]] = {}
    for tried, reason in reasons.items():
        grouped.setdefault(reason, []).append(tried)
    return "; ".join(f"{', '.join(tried)}: {reason}" for reason, tried in grouped.items())


class _Survey(TorchFunctionMode):
    """What one image makes of a function, at a fraction of a pass.

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


# Bytes of all tangents of one tensor above which they go through the function in two parts.
_LARGE = 128 * 2**20
# How many times as large as the images the largest tensor of a network is, before it is looked at.
_GROWTH = 24


def _survey(function: Function, inputs: Tensor) -> _Survey | None:
    survey = _Survey()
    try:
        with torch.no_grad(), survey:
            first = alone(function, inputs[:1])
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None  # one image alone need not make a batch
    survey.elements = first.numel()
    return survey if first.shape[:1] == (1,) else None
