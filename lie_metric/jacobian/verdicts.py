"""What a check of products with a Jacobian finds, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Check", "Declared", "Disagreement", "Jump", "Undefined"]


@dataclass(frozen=True)
class Check:
    """What a comparison of a method's products with the function itself found.

    Attributes:
        status: ``"agrees"``; ``"inconclusive"``, where differences do not converge; or ``"not made"``.
        method: The method that was checked.
        difference: Norm of products less central differences, relative to the latter; NaN where there are none.
        transposition: ``|⟨u, J t⟩ - ⟨Jᵀu, t⟩|`` for random u and t, relative; NaN where there is no reverse mode.
        reason: Why it is inconclusive, or what else there is to know; mostly empty.
        warning: What makes the products doubtful although they agree: ties at the image itself, or rounding.
    """

    status: Literal["agrees", "inconclusive", "not made"]
    method: str
    difference: float = float("nan")
    transposition: float = float("nan")
    reason: str = ""
    warning: str = ""

    def __str__(self) -> str:
        added = "; ".join(part for part in (self.reason, self.warning) if part)
        added = f" ({added})" if added else ""
        if self.status == "agrees":
            return f"{self.method} agrees with central differences to {self.difference:.0e}{added}"
        return f"{self.method}, check {self.status}{added}"


class Disagreement(RuntimeError):
    """A method's products are not derivatives of the function."""


class Jump(Disagreement):
    """The function jumps beside the inputs, so that no derivative says how it changes."""


class Undefined(RuntimeError):
    """Products are not finite although the function is."""


class Declared(Disagreement):
    """Forward and reverse mode of autograd agree on a derivative that is not the function's."""
