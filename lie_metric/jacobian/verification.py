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

from lie_metric.jacobian.methods import Function, central_difference, raised, size_of

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


# Relative errors that a sound method has: in float64 the rounding of differences, in float32 that of deep networks.
_TOLERANCE, _COARSE = 1e-6, 2e-2
# Below it derivatives in float32 need no second look in float64.
_CLEAR = 1e-4
# Differences that are further apart than this say nothing.
_UNSURE = 5e-2
_STEPS = (1e-6, 1e-5, 1e-4, 1e-7)
_COARSE_STEPS = (3e-3, 1e-2, 1e-3)
# A function without jumps does not change by several times its derivative within a thousandth of the image's norm,
# which is about a hundredth of a pixel: there pretrained networks are within a tenth of their first order.
_JUMP_STEP, _JUMP = 1e-3, 3.0
_OFF_KINKS, _NOISE = 1e-3, 0.3
# A number that is lost, such as a maximum taken out of torch, may be at rest along one direction.
_DIRECTIONS = 3
_OTHERWISE = "reverse mode gives another derivative: the model detaches a part, or declares its own"

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
        if _independent(function, inputs, value):
            last = slice(-1, None)
            try:
                return _Comparison(run, method, function, precise, inputs[last]).made(
                    tangents[:, last], products.detach()[:, last]
                )
            except _BatchesDiffer:
                pass  # ties that are broken otherwise in a batch, or a method that mixes images: all of them will tell
        try:
            return _Comparison(run, method, function, precise, inputs).made(tangents, products.detach())
        except _BatchesDiffer as error:
            raise Disagreement("its products are not linear in the tangent, or change from call to call") from error


class _BatchesDiffer(Exception):
    """Products of all generators at once are not those of one combination, which they are linear in."""


class _Comparison:
    """One check.

    Args:
        run: As in :func:`verify`.
        method: As in :func:`verify`.
        function: As in :func:`verify`.
        precise: As in :func:`verify`.
        inputs: The images that are used.
    """

    def __init__(self, run: Run, method: str, function: Function, precise: Function | None, inputs: Tensor) -> None:
        self.run, self.method, self.function, self.precise = run, method, function, precise
        self.x = inputs.detach()
        self.source = torch.Generator().manual_seed(0)

    def made(self, tangents: Tensor, products: Tensor) -> Check:
        """The check of these products."""
        sizes = [float(t.norm()) for t in tangents]
        drawn = torch.randn(len(tangents), dtype=torch.float64, generator=self.source).tolist()
        weights = [w / size if size > 0 else 0.0 for w, size in zip(drawn, sizes, strict=True)]
        x = self.x
        t = sum((w * t for w, t in zip(weights, tangents, strict=True)), torch.zeros_like(x))
        found = sum((w * p for w, p in zip(weights, products, strict=True)), torch.zeros_like(products[0]))
        along = self._along(x, t)
        value, (again, product) = self.run(self.function, x, torch.stack([t, along]))
        if not _alike(value, self.function(x)):
            raise Disagreement("its values are not those of the function")
        gain = float(product.norm() / along.norm())
        # The same sums in another order.
        tolerance = 1e-6 if found.dtype == torch.float64 else 1e-3
        if bool((found - again).norm() > tolerance * max(float(again.norm()), gain)):
            raise _BatchesDiffer
        return self._at_once(x, along, product) or self._at_length(t)

    def _along(self, x: Tensor, t: Tensor) -> Tensor:
        """A combination of t and noise, of the size of x."""
        return size_of(x) * (_unit(t, x) + _NOISE * _unit(self._noise(x), x))

    def _noise(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=torch.float64, generator=self.source)

    def _at_once(self, x: Tensor, along: Tensor, product: Tensor) -> Check | None:
        """What most models pass: one difference in float64 at the inputs; None where more has to be looked at."""
        wide = product.dtype == x.dtype == torch.float64
        if x.dtype == torch.float64:
            exact, point = self.function, x
        elif x.device.type == "mps":
            return None
        else:
            exact, point = self.precise or self.function, x.double()
        try:
            difference = central_difference(exact, point, along.to(point), _STEPS[0])
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None  # weights that stay in float32
        error = _relative(product.to(difference), difference)
        if not error <= (_TOLERANCE if wide else _CLEAR) or difference.dtype != torch.float64:
            return None
        self._refuse_jumps(self.function, x, along, product)
        transposition, why = _by_transposition(self.function, x, along, product)
        if transposition > (1e-6 if wide else _COARSE):
            why = _OTHERWISE
        return Check("agrees", self.method, error, transposition, why)

    def _at_length(self, t: Tensor) -> Check:
        """Differences of several steps, beside the inputs, where ties and kinks are no longer."""
        function, point, _ = raised(self.function, self.precise, self.x)
        near = point + _OFF_KINKS * size_of(point) * _unit(self._noise(point), point)
        if bool(torch.isfinite(function(near)).all()):
            point = near
        try:
            self.run(function, point, t.to(point)[None])
        except Exception:
            if function is self.function:
                raise
            function, point = self.function, self.x
        made = [self._along_one(function, point, self._along(point, t.to(point))) for _ in range(_DIRECTIONS)]
        return max(made, key=lambda check: (check.status != "agrees", check.difference))

    def _along_one(self, function: Function, point: Tensor, along: Tensor) -> Check:
        product = self.run(function, point, along[None])[1][0]
        wide = product.dtype == point.dtype == torch.float64
        status, error = self._compared(function, point, along, product, wide)
        transposition, why = _by_transposition(function, point, along, product)
        limit = 1e-6 if wide else _COARSE
        if status == "differs" or (status == "inconclusive" and transposition > _COARSE):
            raise Disagreement(_what_differs(product, transposition <= limit))
        if status == "inconclusive":
            return Check("inconclusive", self.method, error, transposition, "central differences do not converge")
        if wide:
            self._refuse_jumps(function, point, along, product)
        return Check("agrees", self.method, error, transposition, _OTHERWISE if transposition > limit else why)

    def _compared(
        self, function: Function, x: Tensor, along: Tensor, product: Tensor, wide: bool
    ) -> tuple[Literal["agrees", "inconclusive", "differs"], float]:
        """Whether the product is among the differences of several steps, and how far the nearest is."""
        steps = _STEPS if wide else _COARSE_STEPS
        found = [central_difference(function, x, along, step).to(product) for step in steps]
        best = min(_relative(product, part) for part in found)
        if best <= (_TOLERANCE if wide else _COARSE):
            return "agrees", best
        # What the rounding of the two values makes of a difference, and what differences of other steps make of it.
        rounding = torch.finfo(x.dtype).eps * float(function(x).norm()) / max(steps)
        unsure = max(rounding / max(float(found[0].norm()), 1e-300), _spread(found))
        if not unsure <= _UNSURE:
            return "inconclusive", best
        return ("differs" if best > 10 * unsure else "agrees"), best

    def _refuse_jumps(self, function: Function, x: Tensor, along: Tensor, product: Tensor) -> None:
        change = (central_difference(function, x, along, _JUMP_STEP) - product).norm()
        if not bool(change > _JUMP * product.norm()):
            return
        rounding = 1e4 * torch.finfo(x.dtype).eps * function(x).norm()
        if bool(change * _JUMP_STEP > rounding):
            raise Disagreement(
                "the function jumps (it rounds, quantises, or picks by argmax or top-k), or a part of it is detached: "
                "its derivative says nothing of the changes that it makes"
                if bool(product.any())
                else _what_differs(product, False)
            )


def _what_differs(product: Tensor, sound: bool) -> str:
    if not bool(product.any()):
        return (
            "the derivative is exactly zero while the output moves with the input: a tensor is detached, or leaves "
            "torch (`.item()`, `.numpy()`)"
        )
    if sound:
        return (
            "the derivative that autograd gives is not that of the function: has it a straight-through estimator, a "
            "detached branch, or a backward pass of its own?"
        )
    return "a part of the derivative is lost or changed"


def _unit(direction: Tensor, like: Tensor) -> Tensor:
    direction = direction.to(like)
    return direction / direction.norm().clamp(min=torch.finfo(like.dtype).tiny)


def _independent(function: Function, inputs: Tensor, value: Tensor) -> bool:
    """Whether the first and the last image alone have the values that they have among the others.

    One of them would not do: by its maximum, say, it may be the one that the others depend on.
    """
    if len(inputs) < 2 or value.shape[:1] != inputs.shape[:1]:
        return False
    try:
        return all(_alike(function(inputs[row]), value[row]) for row in (slice(-1, None), slice(1)))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False  # a model may insist on the size of a batch


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two values differ by rounding alone."""
    if one.shape != other.shape:
        return False
    return bool((one - other).norm() <= 1e4 * torch.finfo(other.dtype).eps * other.norm())


def _spread(found: list[Tensor]) -> float:
    return min(_relative(a, b) for i, a in enumerate(found) for b in found[:i])


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
