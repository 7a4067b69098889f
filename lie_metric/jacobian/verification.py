r"""Whether products with a Jacobian are those of the function itself.

Two independent ways: central differences of the function, in float64 where it runs so, and transposition,
:math:`\langle u, Jt\rangle = \langle J^T u, t\rangle`, in reverse mode. A difference is decisive where it converges.
Both are taken at a point near the inputs, because ties and kinks are common at the inputs themselves (images with black
areas), and along a random combination of all tangents and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lie_metric.jacobian.differences import (
    DOUBTFUL,
    LEVELS,
    Level,
    Line,
    compared,
    finite,
    kinks,
    level_of,
    relative,
)
from lie_metric.jacobian.methods import Function, alone, raised, size_of
from lie_metric.jacobian.verdicts import Check, Declared, Disagreement, Jump, Undefined
from lie_metric.running.gradients import GraphsKept

__all__ = ["verify"]

# Below it derivatives in float32 need no second look in float64.
_CLEAR = 1e-4
# A transposition that is off by more is no rounding.
_COARSE = 2e-2
# A change that is off the derivative by half of it within a thousandth of the image's norm is looked at for jumps: that
# is about a hundredth of a pixel, where pretrained networks are within a tenth of their first order.
_JUMP_STEP, _JUMP = 1e-3, 0.5
# Where the derivative is zero, whether the function is at rest for longer is of interest.
_FAR = 0.1
_OFF_KINKS, _NOISE = 1e-3, 0.3
# Part of the way to the middle of the range of an image's values that leaves room for all steps in float64.
_INWARDS = 5e-2
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
    thorough: bool = False,
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
        thorough: Whether large steps are compared as well, as for methods that lose what leaves torch without a word.

    Returns:
        What was found.

    Raises:
        Disagreement: If the products are not derivatives of the function; a :class:`Jump` if none are, and
            :class:`Declared` if those of autograd are not.
        Undefined: If they are not finite although the value is.
    """
    if len(tangents) == 0 or products.numel() == 0:
        return Check("not made", method, reason="there is nothing to compare")
    if not finite(value):
        return Check("not made", method, reason="outputs are not finite")
    if not finite(products):
        raise Undefined("its derivatives are not finite")
    with torch.no_grad():
        apart = _value_apart(function, inputs, value)
        if apart is not None:
            last = slice(-1, None)
            try:
                return _Comparison(run, method, function, precise, inputs[last], True, thorough).made(
                    tangents[:, last], products.detach()[:, last], apart
                )
            except _BatchesDiffer:
                pass  # ties that are broken otherwise in a batch, or images that are mixed: all of them will tell
        comparison = _Comparison(run, method, function, precise, inputs, False, thorough)
        try:
            return comparison.made(tangents, products.detach(), function(inputs))
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
        alone: Whether that is one image, and images do not influence one another.
        thorough: As in :func:`verify`.
    """

    def __init__(
        self,
        run: Run,
        method: str,
        function: Function,
        precise: Function | None,
        inputs: Tensor,
        alone: bool,
        thorough: bool,
    ) -> None:
        self.run, self.method, self.function, self.precise = run, method, function, precise
        self.x, self.alone, self.thorough = inputs.detach(), alone, thorough
        self.source = torch.Generator().manual_seed(0)

    def made(self, tangents: Tensor, products: Tensor, expected: Tensor) -> Check:
        """The check of these products, for a function that has the value expected."""
        sizes = torch.stack([t.norm() for t in tangents]).tolist()
        drawn = torch.randn(len(tangents), dtype=torch.float64, generator=self.source).tolist()
        weights = [w / size if size > 0 else 0.0 for w, size in zip(drawn, sizes, strict=True)]
        x = self.x
        t = sum((w * t for w, t in zip(weights, tangents, strict=True)), torch.zeros_like(x))
        found = sum((w * p for w, p in zip(weights, products, strict=True)), torch.zeros_like(products[0]))
        along = self._along(x, t)
        value, (again, product) = self.run(self.function, x, torch.stack([t, along]))
        if not _alike(value, expected):
            raise Disagreement("its values are not those of the function, which may change from call to call")
        scale = max(float(again.norm()), float(product.norm() / along.norm()))
        apart = float((found - again).norm()) - 1e3 * torch.finfo(value.dtype).eps * float(value.norm() / size_of(x))
        # The same sums in another order.
        if apart > (1e-6 if found.dtype == torch.float64 else 1e-3) * scale:
            level = level_of(self.function, x)
            if level is LEVELS[0] or apart > 30 * level.eps * scale:
                raise _BatchesDiffer
        try:
            return self._at_once(x, along, product) or self._at_length(t, again)
        except (Disagreement, torch.OutOfMemoryError):
            raise
        except Exception:
            try:
                Line(self.function, x, along, False).differences(*LEVELS[0].steps[:1], _JUMP_STEP)
            except Exception as error:
                return self._within(t, error)
            raise

    def _within(self, t: Tensor, error: Exception) -> Check:
        """For functions that refuse inputs beside the images, as those that check a range: nearer to its middle."""
        low, high = self.x.min(), self.x.max()
        here, self.x = self.x, self.x + _INWARDS * ((low + high) / 2 - self.x)
        try:
            _, (product,) = self.run(self.function, self.x, t[None])
            return self._at_length(t, product)
        except (Disagreement, torch.OutOfMemoryError):
            raise
        except Exception:
            told = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            why = f"it cannot be run beside the images ({told})"
            return Check("inconclusive", self.method, reason=why)
        finally:
            self.x = here

    def _along(self, x: Tensor, t: Tensor) -> Tensor:
        """A combination of t and noise, of the size of x."""
        return size_of(x) * (_unit(t, x) + _NOISE * _unit(self._noise(x), x))

    def _noise(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=torch.float64, generator=self.source)

    def _at_once(self, x: Tensor, along: Tensor, product: Tensor) -> Check | None:
        """What most models pass: differences in float64 at the inputs; None where more has to be looked at."""
        wide = product.dtype == x.dtype == torch.float64
        if self.thorough or (x.dtype != torch.float64 and x.device.type == "mps"):
            return None
        exact, point = (self.function, x) if x.dtype == torch.float64 else (self.precise or self.function, x.double())
        try:
            near, far = Line(exact, point, along.to(point), self.alone).differences(LEVELS[0].steps[0], _JUMP_STEP)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None  # weights that stay in float32
        error = relative(product.to(near), near)
        if not error <= (LEVELS[0].tolerance if wide else _CLEAR) or near.dtype != torch.float64:
            return None
        if not bool(product.any()) or bool((far - product).norm() > _JUMP * product.norm()):
            return None
        transposition, why = _by_transposition(self.function, x, along, product)
        if transposition > LEVELS[0 if wide else 1].tolerance:
            return None
        return Check("agrees", self.method, error, transposition, why)

    def _at_length(self, t: Tensor, given: Tensor) -> Check:
        """Differences of several steps, beside the inputs, where ties and kinks are no longer."""
        function, point, _ = raised(self.function, self.precise, self.x)
        noise, size = self._noise(point), _OFF_KINKS * size_of(point)
        # The second is inside where black is on the border, as of roots and powers.
        beside = (point + size * _unit(direction, point) for direction in (noise, 1 + noise.abs()))
        near = next((place for place in beside if finite(function(place))), point)
        try:
            self.run(function, near, t.to(point)[None])
        except Exception:
            if function is self.function:
                raise
            function, point, near = self.function, self.x, self.x
        inside = level_of(function, near)
        directions = [self._along(near, t.to(near)) for _ in range(_DIRECTIONS)]
        if self.thorough:
            directions.append(size_of(near) * _unit(t, near))
        made = [self._along_one(function, near, along, inside) for along in directions]
        worst = max(made, key=lambda check: (check.status != "agrees", check.difference))
        if worst.status != "agrees":
            return worst
        rounded, warning = self._doubts(function, point, t.to(point), given, inside)
        return replace(worst, difference=max(worst.difference, rounded), warning=warning)

    def _along_one(self, function: Function, point: Tensor, along: Tensor, inside: Level) -> Check:
        product = self.run(function, point, along[None])[1][0]
        line = Line(function, point, along, self.alone)
        size = float(function(point).norm())
        for level in (each for each in LEVELS if torch.finfo(product.dtype).eps <= each.eps <= inside.eps):
            found = [part.to(product) for part in line.differences(*level.steps, _JUMP_STEP)]
            far = found.pop()
            status, error = compared(product, found, size, level)
            nearest = min(float((product - part).norm()) for part in found)
            settled = all(float((part - found[0]).norm()) < 0.3 * nearest for part in found)
            if status == "agrees" or settled:
                break
        if status == "agrees" and level is not inside:
            # A number that leaves torch and comes back in float32, say, is at rest for the small steps of float64.
            large = line.differences(*inside.steps)
            if compared(product, [part.to(product) for part in large], size, inside)[0] == "differs":
                raise _what_differs(product, False)
        transposition, why = _by_transposition(function, point, along, product)
        otherwise = transposition > level.tolerance
        places = zip((*level.steps, _JUMP_STEP), (*found, far), strict=True)
        if self._jumps(line, inside, product, list(places), size, status == "inconclusive" or otherwise):
            raise Jump(_JUMPS)
        # Differences that are unsure are none, where reverse mode says otherwise as well and neither is about rounding.
        moves = float(product.norm()) > level.rounding * level.eps * size
        unsure = status == "inconclusive" or (moves and error > max(level.tolerance, _COARSE))
        if status == "differs" or (unsure and transposition > max(level.tolerance, _COARSE)):
            raise _what_differs(product, not otherwise)
        if status == "inconclusive":
            why = "central differences do not converge, as where a network rounds" + (
                " in half precision" if inside is LEVELS[2] else " or uses a straight-through estimator"
            )
            if not any(map(finite, found)):
                why = "the function is not finite beside the inputs"
            return Check("inconclusive", self.method, error, transposition, why)
        return Check("agrees", self.method, error, transposition, _OTHERWISE if otherwise else why)

    def _jumps(
        self,
        line: Line,
        level: Level,
        product: Tensor,
        differences: list[tuple[float, Tensor]],
        size: float,
        suspected: bool,
    ) -> bool:
        """Whether the function jumps where differences are larger than the product, or something else is odd."""
        slope, resolved = float(product.norm()), level.rounding * level.eps * size
        if slope <= resolved and line.jumps(_FAR, slope, level):
            return True
        return any(
            line.jumps(step, slope, level)
            for step, part in differences
            if (suspected and step == _JUMP_STEP)
            or float((part - product).norm()) > max(_JUMP * slope, resolved / step)
        )

    def _doubts(self, function: Function, point: Tensor, t: Tensor, given: Tensor, inside: Level) -> tuple[float, str]:
        """How far the products are from precise ones at the image itself, and what makes them doubtful there.

        Args:
            function: The function, in float64 where it runs so.
            point: The inputs in its precision.
            t: A combination of the tangents.
            given: The product with it in the working precision.
            inside: The coarsest precision on the way.

        Returns:
            What rounding changes, relatively, and what is to be told, or nothing.
        """
        line = Line(function, point, size_of(point) * _unit(t, point), self.alone)
        exact = self.run(function, point, line.along[None])[1][0]
        value = function(point)
        if not _near(self.function(self.x).to(value), value):
            return 0.0, (
                "in float64 it has other values, as where it draws random numbers: what is given is the derivative of "
                "one draw"
            )
        rounded = 0.0
        if t.any() and float(exact.norm()) > LEVELS[1].eps * float(value.norm()):
            rounded = relative(given.to(exact) * (line.along.norm() / t.norm()), exact)
        if inside is LEVELS[2] or level_of(self.function, self.x) is LEVELS[2]:
            return rounded, (
                "a part of it runs in half precision whatever its weights are in (autocast within `forward`?): its "
                "derivatives hold to a few hundredths alone"
            )
        doubts = []
        if rounded > DOUBTFUL:
            doubts.append(
                f"rounding in {str(given.dtype).removeprefix('torch.')} changes its derivatives by {rounded:.0%}: "
                "measure it in float64 (`model.double()`, `images.double()`)"
            )
        if inside is LEVELS[0] and point.dtype == torch.float64:
            doubts += kinks(line, exact)
        return rounded, "; ".join(doubts)


_JUMPS = (
    "the function jumps (it rounds, quantises, or picks by argmax or top-k): its derivative says nothing of the "
    "changes that it makes, and one that is declared, as a straight-through estimator does, is not its own"
)


def _what_differs(product: Tensor, sound: bool) -> Disagreement:
    if not bool(product.any()):
        return Disagreement(
            "the derivative is exactly zero while the output moves with the input: a tensor is detached, or leaves "
            "torch (`.item()`, `.numpy()`)"
        )
    if sound:
        return Declared(
            "the derivative that autograd gives is not that of the function: has it a straight-through estimator, a "
            "detached branch, or a backward pass of its own?"
        )
    return Disagreement("a part of the derivative is lost or changed")


def _unit(direction: Tensor, like: Tensor) -> Tensor:
    direction = direction.to(like)
    return direction / direction.norm().clamp(min=torch.finfo(like.dtype).tiny)


def _value_apart(function: Function, inputs: Tensor, value: Tensor) -> Tensor | None:
    """The value of the last image alone; None if that or the first one's is another among the others.

    One of them would not do: by its maximum, say, it may be the one that the others depend on.
    """
    if len(inputs) < 2 or value.shape[:1] != inputs.shape[:1]:
        return None
    try:
        first, last = alone(function, inputs[:1]), alone(function, inputs[-1:])
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None  # a model may insist on the size of a batch
    return last if _alike(first, value[:1]) and _alike(last, value[-1:]) else None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two values differ by rounding alone."""
    if one.shape != other.shape:
        return False
    return bool((one - other).norm() <= 1e4 * torch.finfo(other.dtype).eps * other.norm())


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _COARSE * other.norm())


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
            with GraphsKept():
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
