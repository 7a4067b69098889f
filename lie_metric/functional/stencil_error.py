"""What a stencil gets wrong of this model on these images: the floor under its Lie derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lie_metric.algebra import Generator, spanning_set
from lie_metric.binding import off_grid, resolve_for
from lie_metric.functional.sums import Sums, defined, grouped, moments, spread, totals
from lie_metric.lie import Generators, linearise
from lie_metric.measured import described, validate_inputs
from lie_metric.options import Options
from lie_metric.representations import Representation
from lie_metric.resampling import PAPER, Resampling, coordinate_dtype, working_precision
from lie_metric.warning import warn

__all__ = [
    "other_stencil",
    "stencil_error",
    "stencil_error_compute",
    "stencil_error_statistic",
    "stencil_error_update",
    "stencil_error_validate",
    "tell_of_rough_stencil",
]


def other_stencil(resampling: Resampling) -> Resampling:
    """The stencil that tells how far one can be trusted: Fourier, with the same border where it has one.

    Args:
        resampling: A stencil.

    Returns:
        Another one.

    Example:
        >>> str(other_stencil(Resampling())), str(other_stencil(Resampling("fourier")))
        ('fourier, reflection, pixel areas', 'bspline, circular, pixel areas')
    """
    if resampling.interpolation == "fourier":
        return replace(resampling, interpolation="bspline")
    circular = resampling.padding == "circular"
    return replace(resampling, interpolation="fourier", padding="circular" if circular else "reflection")


def tell_of_rough_stencil(
    images: Tensor, carrier: Representation, generators: Sequence[Generator], resampling: Resampling
) -> None:
    """Says how far the tangents of a stencil that is right for smooth images alone are from another one's.

    The paper's one-sided slopes, and waves that go on at the opposite border, are off by more than the tangents
    themselves on photographs; on smooth or periodic images they are not.

    Args:
        images: Shape (B, ...).
        carrier: How they are laid out.
        generators: What moves them.
        resampling: The stencil.

    Warns:
        UserWarning: If such a stencil is off by more than half of the norm for a generator.
    """
    one_sided = resampling.interpolation == "bilinear"
    if not one_sided and (resampling.interpolation, resampling.padding) != ("fourier", "circular"):
        return
    other = Resampling(padding="reflection")
    with torch.no_grad():
        x = working_precision(images)
        given, wanted = (carrier.tangents(x, generators, stencil).flatten(1) for stencil in (resampling, other))
        off = (given - wanted).norm(dim=1) / wanted.norm(dim=1)
    rough = [f"{g.name} {part:.2g}" for g, part in zip(generators, off.tolist(), strict=True) if part > _ROUGH]
    if rough:
        warn(
            f"On these images the stencil {resampling} is far from {other}: off by parts of the change itself, "
            f"{', '.join(rough)}. Values are bound to it, and `lie_metric.StencilError` tells what it does to the "
            "model's. " + ("It is the paper's." if resampling == PAPER else "Leave `resampling` out for photographs.")
        )


_ROUGH = 0.5


def stencil_error_update(
    model: Callable[..., Any],
    images: Tensor,
    options: Options,
    *,
    generators: Sequence[Generator],
    indices: Sequence[int],
    known: str | None = None,
) -> tuple[dict[str, Tensor], str]:
    """The sums of a batch, and what is measured in words; a method that is known to be right is not checked."""
    carrier = validate_inputs(model, images, options.input_representation, options.function)
    resampling = options.stencil
    other = other_stencil(resampling)
    with torch.no_grad():
        x = working_precision(images)
        basis, matrix = spanning_set(generators)
        apart = carrier.tangents(x, basis, resampling) - carrier.tangents(x, basis, other)
        result = linearise(model, images, (), options, directions=apart, known=known, verify=known is None)
        f, representation = result.output, result.representation
        moved = representation.tangents(f, basis, resampling) - representation.tangents(f, basis, other)
        wide = coordinate_dtype(f.device)
        error = torch.tensordot(matrix.to(f.device, wide), (result.products - moved).to(wide), 1)
        error = error.reshape(len(generators), len(f), -1).square().sum(2).T
        sums = grouped({"error": error} | moments(f, representation), indices)
        sums["rounding"] = torch.tensor(torch.finfo(f.dtype).eps, dtype=wide, device=f.device)
    told = described(f, representation, options.output_representation, options.output)
    return sums, told


def stencil_error_statistic(sums: Sums) -> Tensor:
    """The errors of all generators, (..., K)."""
    return (sums["error"] / spread(sums)[..., None]).sqrt()


def stencil_error_compute(sums: Sums, names: Sequence[str]) -> dict[str, Tensor]:
    """The error of each generator from the sums."""
    total = totals(sums)
    reason = "the output does not vary over the images (one alone never does), or not by more than rounding"
    value = defined(stencil_error_statistic(total), "stencil_error", names, reason, total)
    return dict(zip(names, value.unbind(), strict=True))


def stencil_error_validate(generators: Generators, options: Options) -> tuple[Generator, ...]:
    """The generators asked for, if there is a stencil that moves the inputs."""
    layout = options.input_representation
    if off_grid(layout):
        raise ValueError(
            f"`input_representation` must be one of grids, got {layout!r}: there is no stencil, and its derivatives "
            "are exact to rounding."
        )
    return resolve_for(generators, layout)


def stencil_error(
    model: Callable[..., Any], images: Tensor, generators: Generators = "affine", **options: Any
) -> dict[str, Tensor]:
    r"""What two stencils make of the same images and the same model, in the units of :func:`relative`: a floor.

    .. math:: \sqrt{ \frac{1}{n} \sum_i \| \hat L_X f(x_i) - \hat L'_X f(x_i) \|^2 \Big/
        \frac{1}{n - 1} \sum_i \|f(x_i) - E f\|^2 }

    :math:`\hat L` is by the stencil given and :math:`\hat L'` by the Fourier stencil (by the B-spline where Fourier is
    given): Lie derivatives, exact but for the tangents that go in. Where both are off in their own way, as for the high
    frequencies of photographs, their difference is about the error of either. A value of ``relative`` at or below it
    cannot be told from 0, and a larger one is uncertain by as much.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W), at least two.
        generators: As in :func:`lie_metric.lie_derivative`.
        options: ``output``, ``function``, ``input_representation``, ``output_representation``, ``resampling``,
            ``method``, ``chunk_size`` as in :func:`lie_metric.lie_derivative`.

    Returns:
        For each generator's name a number of no axes; NaN, with a warning, where the output does not vary.

    Example:
        >>> import torch, lie_metric as lm
        >>> images = torch.rand(4, 1, 16, 16)
        >>> paper = stencil_error(lambda x: x.flatten(1), images, "translation_x", resampling=lm.PAPER)["translation_x"]
        >>> bool(stencil_error(lambda x: x.flatten(1), images, "translation_x")["translation_x"] < paper)
        True
    """
    chosen = Options.of(options)
    asked = stencil_error_validate(generators, chosen)
    indices = range(len(images)) if isinstance(images, Tensor) and images.ndim else ()
    sums, _ = stencil_error_update(model, images, chosen, generators=asked, indices=indices)
    return stencil_error_compute(sums, [generator.name for generator in asked])
