"""Tangents of one tensor, and who else uses their memory.

Memory decides the speed: writing K tangents to fresh memory costs up to seven times as much as changing them where they
are. So a diagonal Jacobian is kept as a factor of the size of one tangent, which the next one multiplies, and which is
applied when the tangents are needed: in place if no other tensor can still see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from lie_metric.jacobian.refusals import Unsupported

__all__ = ["Tangents", "Unknown", "same_memory"]


class Tangents:
    """Tangents of shape (K, *S), still to be multiplied by one factor for all of them.

    Attributes:
        raw: Shape (K, *S).
        factor: What broadcasts to S without changing it, or None for 1.
        sharing: All tangents, this one included, that may use the memory of ``raw``; one list that they have in common.
    """

    __slots__ = ("__weakref__", "factor", "raw", "sharing")

    def __init__(self, raw: Tensor, factor: Tensor | float | None = None) -> None:
        self.raw, self.factor = raw, factor
        self.sharing: list[Callable[[], object]] = [weakref.ref(self)]

    def share(self, other: Tangents) -> None:
        """Joins those that use the same memory as another one."""
        group = other.sharing
        if group is not self.sharing:
            group[:] = [member for member in group if member() is not None]
            group.extend(self.sharing)
            for member in self.sharing:
                joined = member()
                if isinstance(joined, Tangents):
                    joined.sharing = group

    def scaled(self, factor: Tensor | float | None = None) -> Tangents:
        """The same tangents times a factor."""
        if factor is None:
            factor = self.factor
        elif self.factor is not None:
            factor = self.factor * factor
        result = Tangents(self.raw, factor)
        result.share(self)
        return result

    def alone(self) -> bool:
        """Whether nobody else can see the memory, and no two entries are at one place."""
        others = (other() for other in self.sharing)
        return all(other is None or other is self for other in others) and _is_dense(self.raw)

    def get(self) -> Tensor:
        """The tangents, after the factor. Not to be written into."""
        if self.factor is not None:
            factor, self.factor = self.factor, None
            if self.alone():
                self.raw.mul_(factor)
            else:
                self.replace(self.raw * factor)
        return self.raw

    def replace(self, raw: Tensor) -> None:
        """Turns to memory of its own."""
        mine = [other for other in self.sharing if other() is self]
        self.sharing[:] = [other for other in self.sharing if other() is not self]
        self.raw, self.sharing = raw, mine


class Unknown(Tangents):
    """Tangents that are not known, of a tensor that is mostly not used: to use it is refused."""

    __slots__ = ("source",)

    def __init__(self, raw: Tensor, source: str) -> None:
        super().__init__(raw)
        self.source = source

    def get(self) -> Tensor:
        """Refuses.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported(f"a side result of {self.source} is used, of which torch knows no derivative")

    def scaled(self, factor: Tensor | float | None = None) -> Tangents:
        """As unknown.

        Returns:
            Itself.
        """
        return self


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are stored in the same memory.

    Args:
        first: A tensor.
        second: Another one.

    Returns:
        Whether they share a storage, be it at different places of it.
    """
    return first is second or first.untyped_storage()._cdata == second.untyped_storage()._cdata


def _is_dense(value: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
