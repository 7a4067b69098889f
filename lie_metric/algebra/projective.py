"""Projective maps of the plane: the perspective charges of a generator, and points divided by their last coordinate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lie_metric.algebra.generator import Generator, Matrix

__all__ = [
    "PERSPECTIVE",
    "check_horizon",
    "flow_rows",
    "horizon",
    "moves",
    "only_moves",
    "projective_step",
    "refuse_perspective",
    "velocity",
]

PERSPECTIVE = ("perspective_x", "perspective_y")
"""The charges that are the last row of a generator's homogeneous matrix, along x and y."""

# Read at most a million lengths away: beyond it neither whole pixels nor parts of one have a meaning.
_NEAREST = 1e-6


def horizon(generator: Generator) -> tuple[float, ...]:
    r"""The numbers w of a projective generator of the plane; none of an affine one.

    Its homogeneous matrix is M = (A; w, 0), with the velocity :math:`A \tilde p - (w \cdot p)\, p`. Of an element
    exp(tM) the horizon are the points whose last coordinate is 0.

    Args:
        generator: Any generator.

    Returns:
        Two numbers or none.

    Raises:
        ValueError: If it has a perspective and is not of the plane.

    Example:
        >>> from lie_metric import generators
        >>> [horizon(generator) for generator in generators("rotation", "perspective_y")]
        [(), (0.0, 1.0)]
    """
    found = tuple(generator.charges.get(name, 0.0) for name in PERSPECTIVE)
    if not any(found):
        return ()
    if generator.dimension != len(PERSPECTIVE):
        raise ValueError(
            f"`generators` must be of the plane to have a perspective, got {generator.name!r} of dimension "
            f"{generator.dimension} with {[name for name in PERSPECTIVE if name in generator.charges]}. Take "
            "`generators('perspective')`, or name the charge otherwise if it is one of your own."
        )
    return found


def moves(generator: Generator) -> bool:
    """Whether a generator moves places at all.

    Args:
        generator: Any generator.

    Returns:
        Whether it has a matrix other than 0, or a perspective.

    Example:
        >>> from lie_metric import generators
        >>> [moves(generator) for generator in generators("scale", "saturation", "perspective_x")]
        [True, False, True]
    """
    return any(map(any, generator.matrix)) or bool(horizon(generator))


def only_moves(generator: Generator) -> bool:
    """Whether a generator moves places and changes nothing else: neither intensities nor what charges name.

    Args:
        generator: The generator.

    Returns:
        Whether it does.

    Example:
        >>> from lie_metric import generators
        >>> [only_moves(generator) for generator in generators("perspective_x", "saturation", "hue")]
        [True, False, False]
    """
    return moves(generator) and not generator.intensity and not set(generator.charges) - set(PERSPECTIVE)


def flow_rows(generator: Generator) -> Matrix:
    """The rows of the homogeneous matrix that say how places move: A, and of projective generators (w, 0) below it.

    Args:
        generator: Any generator of d dimensions.

    Returns:
        d rows, or 3 for projective generators of the plane.

    Example:
        >>> from lie_metric import generators
        >>> flow_rows(generators("perspective_x")[0])
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    """
    below = horizon(generator)
    return (*generator.matrix, (*below, 0.0)) if below else generator.matrix


def velocity(rows: Tensor, points: Tensor) -> Tensor:
    r"""How fast places are read elsewhere, :math:`A \tilde p - (w \cdot p)\, p`; points move by its opposite.

    Args:
        rows: Those of :func:`flow_rows`, shape (d or d + 1, d + 1).
        points: Homogeneous coordinates with a last one of 1, shape (..., d + 1).

    Returns:
        Shape (..., d).

    Example:
        >>> from lie_metric import generators
        >>> velocity(torch.tensor(flow_rows(generators("perspective_x")[0])), torch.tensor([2.0, 3.0, 1.0])).tolist()
        [-4.0, -6.0]
    """
    moved = points @ rows.mT
    if len(rows) < points.shape[-1]:
        return moved
    return moved[..., :-1] - moved[..., -1:] * points[..., :-1]


def projective_step(step: Tensor, points: Tensor) -> Tensor:
    r"""How far points move under projective maps, :math:`\varphi(p) - p`; exactly 0 under the identity.

    Args:
        step: Homogeneous matrices less the identity, shape (..., d + 1, d + 1).
        points: Homogeneous coordinates with a last one of 1, shape (..., d + 1).

    Returns:
        Shape (..., d); NaN for points on the horizon or beyond it, see :func:`check_horizon`.

    Example:
        >>> step = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
        >>> projective_step(step, torch.tensor([2.0, 1.0, 1.0])).tolist()  # to a half
        [-1.0, -0.5]
    """
    moved = (step @ points[..., None])[..., 0]
    last = 1 + moved[..., -1:]
    last = torch.where(last > _NEAREST, last, torch.nan)
    return (moved[..., :-1] - moved[..., -1:] * points[..., :-1]) / last


def check_horizon(last: Tensor, where: str, advice: str) -> None:
    """Refuses finite transforms whose horizon reaches the points that are moved.

    Args:
        last: Last homogeneous coordinates of moved points.
        where: The points in words.
        advice: What to do.

    Raises:
        ValueError: If one is not positive.
    """
    plain = last
    # Under `vmap` and the like the values are those of what is wrapped.
    while torch._C._functorch.is_functorch_wrapped_tensor(plain):
        plain = torch._C._functorch.get_unwrapped(plain)
    least = float(plain.detach().min())
    if not least > _NEAREST:
        raise ValueError(
            f"`t` must leave the horizon of a projective map outside of {where}, got a denominator of {least:.3g} "
            f"there: such places go to infinity, or lie behind the viewer. {advice}"
        )


def refuse_perspective(asked: Sequence[Generator], owner: object, remedy: str) -> None:
    """Refuses projective generators for what has no action of theirs.

    Args:
        asked: The generators.
        owner: What they were to move.
        remedy: What to do instead.

    Raises:
        ValueError: If one has a perspective.
    """
    for generator in asked:
        if horizon(generator):
            raise ValueError(
                f"`generators` must be affine to move {owner!r}, got {generator.name!r} with a perspective, which "
                f"enlarges and turns by another amount at every place. {remedy}"
            )
