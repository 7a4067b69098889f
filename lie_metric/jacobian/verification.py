r"""Whether products with a Jacobian are those of the function itself.

Two independent ways: central differences of the function, in float64 where it runs so, and transposition,
:math:`\langle u, Jt\rangle = \langle J^T u, t\rangle`, in reverse mode. A difference is decisive where it converges.
Both are taken at a point near the inputs, because ties and kinks are common at the inputs themselves (images with black
areas), and along a random combination of all tangents and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lie_metric.jacobian.methods import Function, central_difference, raised

__all__ = ["Check", "Disagreement", "verify"]


@dataclass(frozen=True)
class Check:
    """What a comparison of a method's products with the function itself found.

    Attributes:
        status: ``"agrees"``; ``"inconclusive"``, where differences do not converge; or ``"not made"``.
        method: The method that was checked.
        difference: Norm of products less central differences, relative to the latter; NaN where there are none.
        transposition: ``|⟨u, J t⟩ - ⟨Jᵀu, t⟩|`` for random u and t, relative; NaN where there is no reverse mode.
        reason: Why it is inconclusive, or what else there is to know; mostly empty.
    """

    status: Literal["agrees", "inconclusive", "not made"]
    method: str
    difference: float = float("nan")
    transposition: float = float("nan")
    reason: str = ""

    def __str__(self) -> str:
        added = f" ({self.reason})" if self.reason else ""
        if self.status == "agrees":
            return f"{self.method} agrees with central differences to {self.difference:.0e}{added}"
        return f"{self.method}, check {self.status}{added}"


class Disagreement(RuntimeError):
    """A method's products are not derivatives of the function."""


# Relative errors that a sound method has: in float64 at the rounding of a difference, in float32 that of deep networks.
_TOLERANCE = {torch.float64: 1e-5}
_COARSE = 2e-2
# A difference whose neighbours are further apart than this says nothing.
_UNSURE = 5e-2
_STEPS = {torch.float64: (1e-6, 1e-5, 1e-4, 1e-7)}
_COARSE_STEPS = (3e-3, 1e-2, 1e-3)
# A function without jumps does not change by several times its derivative within a thousandth of the image's norm,
# which is about a hundredth of a pixel: there pretrained networks are within a tenth of their first order.
_JUMP_STEP, _JUMP = 1e-3, 3.0
_OFF_KINKS, _NOISE = 1e-3, 0.3

Run = Callable[[Function, Tensor, Tensor], tuple[Tensor, Tensor]]


def verify(
    run: Run,
    method: str,
    function: Function,
    precise: Function | None,
    inputs: Tensor,
    tangents: Tensor,
    value: Tensor,
    products: Tensor,
) -> Check:
    """Compares products with the function itself, on one image where images do not influence one another.

    Args:
        run: The method: from a function, inputs and tangents to values and products.
        method: Its name.
        function: The function.
        precise: The same in float64, if there is a way to have it.
        inputs: Shape (B, ...).
        tangents: Shape (K, B, ...).
        value: f(inputs).
        products: Shape (K, ...), what the method gave.

    Returns:
        What was found.

    Raises:
        Disagreement: If the products are not derivatives of the function.
    """
    if len(tangents) == 0 or products.numel() == 0:
        return Check("not made", method, reason="there is nothing to compare")
    if not bool(torch.isfinite(products).all() & torch.isfinite(value).all()):
        return Check("not made", method, reason="outputs or derivatives are not finite")
    with torch.no_grad():
        source = torch.Generator().manual_seed(0)
        rows = _independent_rows(function, inputs, value)
        x = inputs[:rows].detach()
        whole = rows == len(inputs)
        weights = torch.randn(len(tangents), dtype=torch.float64, generator=source).tolist()
        sizes = [float(t[:rows].norm()) for t in tangents]
        weights = [w / size if size > 0 else 0.0 for w, size in zip(weights, sizes, strict=True)]
        t = sum((w * t[:rows] for w, t in zip(weights, tangents, strict=True)), torch.zeros_like(x))
        given = products.detach() if whole else products.detach()[:, :rows]
        found = sum((w * p for w, p in zip(weights, given, strict=True)), torch.zeros_like(given[0]))

        point_function, point, _ = raised(function, precise, x)
        size = point.norm().clamp(min=1e-12)
        near = point + _OFF_KINKS * size * _unit(torch.randn(point.shape, dtype=torch.float64, generator=source), point)
        if bool(torch.isfinite(point_function(near)).all()):
            point = near
        noise = _unit(torch.randn(point.shape, dtype=torch.float64, generator=source), point)
        along = size * (_unit(t, point) + _NOISE * noise)
        try:
            product = run(point_function, point, along[None])[1][0]
        except Exception:
            if point_function is function:
                raise
            point_function, point, along = function, x, along.to(x.dtype)
            product = run(function, x, along[None])[1][0]
        gain = float(product.norm() / along.norm())
        again = run(function, x, t[None])[1][0]
        _compare_rows(run, function, inputs, tangents, weights, found, again, products, gain, whole)

        check = _by_difference(point_function, point, along, product, method)
        transposition, why = _by_transposition(point_function, point, along, product)
        sound = transposition <= (1e-6 if product.dtype == torch.float64 else _COARSE)
    if check is None or check.status == "inconclusive":
        if check is None or transposition > _COARSE:
            raise Disagreement(
                "the derivative that autograd gives is not that of the function: has it a straight-through estimator, "
                "a detached branch, or a backward pass of its own?"
                if sound
                else f"method {method!r} loses or changes a part of the derivative"
            )
        return Check("inconclusive", method, check.difference, transposition, check.reason)
    note = why or (
        "" if sound else "reverse mode gives another derivative: the model detaches a part, or declares its own"
    )
    return Check("agrees", method, check.difference, transposition, note)


def _unit(direction: Tensor, like: Tensor) -> Tensor:
    direction = direction.to(like)
    return direction / direction.norm().clamp(min=torch.finfo(like.dtype).tiny)


def _independent_rows(function: Function, inputs: Tensor, value: Tensor) -> int:
    """One, if the first image alone has the value that it has among the others; all of them otherwise."""
    if len(inputs) > 1 and value.shape[:1] == inputs.shape[:1]:
        try:
            alone = function(inputs[:1])
        except Exception:
            return len(inputs)  # a model may insist on the size of a batch
        if alone.shape == value[:1].shape:
            error, size = (alone - value[:1]).norm(), value[:1].norm()
            if bool(error <= 1e4 * torch.finfo(value.dtype).eps * size):
                return 1
    return len(inputs)


def _compare_rows(
    run: Run,
    function: Function,
    inputs: Tensor,
    tangents: Tensor,
    weights: list[float],
    found: Tensor,
    again: Tensor,
    products: Tensor,
    gain: float,
    whole: bool,
) -> None:
    """Products of all generators and images against those of one combination, which they are linear in."""
    tolerance = _COARSE if products.dtype != torch.float64 else 1e-6

    def differ(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).norm() > tolerance * max(float(other.norm()), gain))

    if not differ(found, again):
        return
    if not whole:  # Ties that are broken otherwise in a batch: the comparison is made on all images.
        t = sum((w * t for w, t in zip(weights, tangents, strict=True)), torch.zeros_like(inputs))
        found = sum((w * p for w, p in zip(weights, products.detach(), strict=True)), torch.zeros_like(products[0]))
        again = run(function, inputs.detach(), t[None])[1][0]
        if not differ(found, again):
            return
    raise Disagreement("its products are not linear in the tangent, or change from call to call")


def _by_difference(function: Function, x: Tensor, along: Tensor, product: Tensor, method: str) -> Check | None:
    """The check by central differences; None if they contradict the product."""
    wide = product.dtype == torch.float64 and x.dtype == torch.float64
    steps, tolerance = (_STEPS[torch.float64], _TOLERANCE[torch.float64]) if wide else (_COARSE_STEPS, _COARSE)
    found: list[Tensor] = []
    errors: list[float] = []
    for step in steps:
        found.append(central_difference(function, x, along, step).to(product.dtype))
        errors.append(_relative(product, found[-1]))
        if errors[-1] <= tolerance:
            break
    best = min(errors)
    if best > tolerance:
        spread = min(_relative(a, b) for i, a in enumerate(found) for b in found[:i])
        if spread > _UNSURE or spread != spread:
            return Check("inconclusive", method, best, reason="central differences do not converge")
        if best > 10 * spread:
            return None
    if wide:
        jump = central_difference(function, x, along, _JUMP_STEP) - product
        if bool(jump.norm() > _JUMP * max(product.norm(), found[errors.index(best)].norm())) and bool(
            jump.norm() * _JUMP_STEP > 1e-9 * function(x).norm()
        ):
            raise Disagreement(
                "the function jumps (it rounds, quantises, or picks by argmax or top-k): its derivative says nothing "
                "of the changes that it makes"
            )
    return Check("agrees", method, best)


def _relative(one: Tensor, other: Tensor) -> float:
    size = float(torch.maximum(one.norm(), other.norm()))
    return float((one - other).norm()) / size if size > 0 else 0.0


def _by_transposition(function: Function, x: Tensor, along: Tensor, product: Tensor) -> tuple[float, str]:
    """How far ⟨u, J t⟩ is from ⟨Jᵀu, t⟩, relative to ‖J t‖², and why it could not be told."""
    size = product.norm()
    if not bool(size > 0):
        return float("nan"), ""
    source = torch.Generator().manual_seed(1)
    u = product / size + _unit(torch.randn(product.shape, dtype=torch.float64, generator=source), product)
    try:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            value = function(leaf)
            if not value.requires_grad:
                return float("nan"), ""
            (pulled,) = torch.autograd.grad(value, leaf, u.to(value.dtype), materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return float(
            "nan"
        ), f"no reverse mode: {str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__}"
    return float(((u * product).sum() - (pulled * along).sum()).abs() / size), ""
