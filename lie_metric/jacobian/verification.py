"""Whether products with a Jacobian are those of the function itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """What a comparison of a method's products with the function itself found.

    Attributes:
        status: ``"agrees"``; ``"inconclusive"``, where the function itself gives no derivative to compare with, as at
            rounding level; or ``"not made"``.
        method: The method that was checked.
        difference: Norm of products less central differences, relative to the latter; NaN where there are none.
        transposition: ``|⟨u, J t⟩ - ⟨Jᵀu, t⟩|`` for random u and t, relative; NaN where there is no reverse mode.
        reason: Why it is inconclusive; empty if it is not.
    """

    status: Literal["agrees", "inconclusive", "not made"]
    method: str
    difference: float
    transposition: float
    reason: str = ""

    def __str__(self) -> str:
        if self.status == "agrees":
            return f"{self.method} agrees with central differences to {self.difference:.0e}"
        return f"{self.method} unchecked ({self.reason})" if self.reason else f"{self.method} unchecked"
