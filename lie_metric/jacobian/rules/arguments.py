"""Which arguments of an operation carry tangents, and where the axes of those are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lie_metric.jacobian.carrying import Dual

__all__ = ["aligned", "at_once", "behind", "count_of", "holds_dual", "only_first"]


# Elements up to which all tangents are one larger batch, for which what they share is copied: beyond it one tangent
# after the other takes less time and memory. Accelerators wait for calls rather than for memory.
_FEW, _FEW_ELSEWHERE = 2**17, 2**24


def only_first(args: tuple, kwargs: dict) -> bool:
    """Whether the first argument is dual, and no other.

    Args:
        args: The arguments.
        kwargs: The keyword arguments.

    Returns:
        Whether that is so.
    """
    return (
        isinstance(args[0], Dual) and not any(map(holds_dual, args[1:])) and not any(map(holds_dual, kwargs.values()))
    )


def holds_dual(value: Any) -> bool:
    """Whether an argument is dual, or a list or tuple in which something is.

    Args:
        value: The argument.

    Returns:
        Whether it is.
    """
    return isinstance(value, Dual) or (isinstance(value, (list, tuple)) and any(map(holds_dual, value)))


def count_of(dual: Dual) -> int:
    """How many tangents a tensor carries.

    Args:
        dual: The tensor.

    Returns:
        The number.
    """
    return len(dual.moving.raw)


def at_once(tensor: Tensor, count: int) -> bool:
    """Whether copies of a tensor for all tangents are cheaper than calls for one tangent after the other.

    Args:
        tensor: What is copied.
        count: How many tangents there are.

    Returns:
        Whether they are.
    """
    return count * tensor.numel() <= (_FEW if tensor.device.type == "cpu" else _FEW_ELSEWHERE)


def behind(axis: int) -> int:
    """The place of an axis behind that of the tangents.

    Args:
        axis: The place among the axes of the value.

    Returns:
        The place.
    """
    return axis if axis < 0 else axis + 1


def aligned(dual: Dual, axes: int) -> Tensor:
    """Tangents with as many axes, behind the first, as a result with which they are broadcast.

    Args:
        dual: The tensor.
        axes: How many axes the result has.

    Returns:
        The tangents, as a view.
    """
    tangents = dual.tangents
    missing = axes - (tangents.ndim - 1)
    return tangents.reshape(tangents.shape[0], *[1] * missing, *tangents.shape[1:]) if missing else tangents
