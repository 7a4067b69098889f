"""Relative stability: the response to smooth deformations against that to noise of the same size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lie_metric.functional.sums import Sums, defined, grouped, moments, spread, totals
from lie_metric.measured import described, evaluated, function_of, validate_inputs
from lie_metric.options import Options
from lie_metric.randomness import noise, source, validate_seed
from lie_metric.representations import map_grid, planar_size, refuse_own_action
from lie_metric.resampling import coordinate_dtype, displace, working_precision
from lie_metric.running import isolated

__all__ = [
    "deformation",
    "relative_stability",
    "stability_compute",
    "stability_statistic",
    "stability_update",
    "stability_validate",
]

NAMES = ("relative_stability", "deformation", "noise")


def deformation(
    size: tuple[int, int], indices: Sequence[int], length: float, cut: int, seed: int, device: torch.device
) -> Tensor:
    r"""Random smooth displacements of the maximum-entropy ensemble, zero on the frame.

    .. math:: u(x, y) = \sum_{i^2 + j^2 \le c^2} C_{ij} \sin(i \pi x) \sin(j \pi y), \qquad
        C_{ij} \sim N(0, T / (i^2 + j^2))

    and v alike (Petrini et al. 2021, arXiv 2105.02468), x and y in [0, 1] along the sides, with the temperature T that
    makes the expected mean square over the image that of ``length``: a mode of variance s² adds s²/4 for each of u and
    v.

    Args:
        size: Height and width.
        indices: Running numbers of N images, which fix their displacements.
        length: Root mean square length in parts of the shorter side.
        cut: The cut-off c of the frequencies.
        seed: Seed.
        device: Where the result is put.

    Returns:
        Steps (x, y) in parts of the shorter side, shape (N, H, W, 2), in the dtype of coordinates.

    Example:
        >>> steps = deformation((32, 32), range(500), 1 / 32, 3, 0, torch.device("cpu"))
        >>> round((32 * steps).square().sum(-1).mean().sqrt().item(), 1)
        1.0
    """
    dtype = coordinate_dtype(device)
    modes = [(i, j) for i in range(1, cut + 1) for j in range(1, cut + 1) if i * i + j * j <= cut * cut]
    variance = torch.tensor([1.0 / (i * i + j * j) for i, j in modes], dtype=torch.float64)
    variance *= length**2 / (variance.sum() / 2)
    waves = []
    for i, j in modes:
        x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (size[1], size[0]))
        waves.append(torch.sin(j * math.pi * y)[:, None] * torch.sin(i * math.pi * x))
    rows = []
    for index in indices:
        drawn = torch.randn(2, len(modes), dtype=torch.float64, generator=source(seed, index))
        rows.append(drawn * variance.sqrt())
    return torch.einsum("nkm,mhw->nhwk", torch.stack(rows), torch.stack(waves)).to(device, dtype)


def stability_validate(displacement: float, cut: int, seed: int) -> None:
    """Refuses options that have no meaning."""
    if isinstance(displacement, bool) or not displacement > 0 or math.isinf(displacement):
        raise ValueError(f"`displacement` must be a positive number of pixels, got {displacement!r}. 1 is usual.")
    if isinstance(cut, bool) or not isinstance(cut, int) or cut < 2:
        raise ValueError(f"`cut` must be an integer of at least 2, got {cut!r}: below there is no mode. 3 is usual.")
    validate_seed(seed)


def stability_update(
    model: Callable[..., Any],
    images: Tensor,
    options: Options,
    *,
    indices: Sequence[int],
    displacement: float = 1.0,
    cut: int = 3,
    seed: int = 0,
) -> tuple[dict[str, Tensor], str]:
    """The sums of a batch, and what is measured in words.

    ``indices`` are the images' running numbers, which fix groups, deformations and noise.
    """
    carrier = validate_inputs(model, images, options.input_representation, options.function)
    stencil = options.stencil
    shorter = min(planar_size(carrier, images, "relative_stability"))
    with torch.no_grad(), isolated(model):
        images = working_precision(images)

        def deform(image: Tensor) -> Tensor:
            size = (int(image.shape[-2]), int(image.shape[-1]))
            steps = deformation(size, indices, displacement / shorter, cut, seed, image.device)
            return displace(image, steps * min(size), stencil)

        measured = function_of(model, options.output, options.function)
        f, representation = evaluated(model, measured, images, options)
        refuse_own_action(representation, "relative_stability")
        moved = map_grid(carrier, images, deform)
        drawn = noise(images, indices, seed)
        change = (moved - images).flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
        noisy = images + drawn * change.reshape(-1, *[1] * (images.ndim - 1))
        wide = coordinate_dtype(f.device)
        wanted = map_grid(representation, f, deform)
        rows = {
            "deformed": (measured(moved) - wanted).reshape(len(f), -1).to(wide).square().sum(1),
            "noisy": (measured(noisy) - f).reshape(len(f), -1).to(wide).square().sum(1),
        }
        sums = grouped(rows | moments(f, representation), indices)
        sums["rounding"] = torch.tensor(torch.finfo(f.dtype).eps, dtype=wide, device=f.device)
    return sums, described(f, representation, options.output_representation, options.output)


def stability_statistic(sums: Sums) -> Tensor:
    """R_f, D_f and G_f, (..., 3)."""
    # Two independent images are 2 Var f apart: `spread` is n Var f.
    apart = 2 * spread(sums)
    floor = sums["square"] * (8 * sums["rounding"]) ** 2
    noisy = torch.where(sums["noisy"] > floor, sums["noisy"], torch.nan)
    return torch.stack([sums["deformed"] / noisy, sums["deformed"] / apart, sums["noisy"] / apart], -1)


def stability_compute(sums: Sums) -> dict[str, Tensor]:
    """The three numbers from the sums."""
    reason = "the output does not vary over the images or with noise, or not by more than rounding"
    total = totals(sums)
    values = defined(stability_statistic(total), "relative_stability", NAMES, reason, total)
    return dict(zip(NAMES, values.unbind(), strict=True))


def relative_stability(
    model: Callable[..., Any],
    images: Tensor,
    *,
    displacement: float = 1.0,
    cut: int = 3,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    r"""The response to smooth deformations over that to noise of the same norm (Petrini et al. 2021).

    .. math:: R_f = \frac{E\|f(\tau x) - \tau f(x)\|^2}{E\|f(x + \eta) - f(x)\|^2}, \qquad
        D_f, G_f = \frac{\text{numerator, denominator}}{E\|f(x) - f(z)\|^2}

    with τ drawn by :func:`deformation`, η Gaussian with the norm of τx - x for each image, and z another image. τ f is
    f for an invariant output; an image-valued one is deformed alike. R_f = 1: deformations count as any other change;
    below 1, the model is more stable to them.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W), at least two.
        displacement: Root mean square length of τ in pixels.
        cut: The highest frequency of τ, in half waves along a side.
        seed: Fixes deformations and noise.
        options: ``output``, ``function``, ``input_representation``, ``output_representation``, ``resampling`` as in
            :func:`lie_metric.lie_derivative`.

    Returns:
        ``{"relative_stability": R_f, "deformation": D_f, "noise": G_f}``; NaN, with a warning, where not defined.

    Example:
        >>> import torch
        >>> found = relative_stability(lambda x: x, torch.rand(4, 1, 16, 16))  # commutes with every deformation
        >>> found["relative_stability"].item()
        0.0
    """
    asked = Options.of(options, without=("method", "chunk_size"), beside=("cut", "displacement", "seed"))
    stability_validate(displacement, cut, seed)
    indices = range(len(images)) if isinstance(images, Tensor) and images.ndim else ()
    sums, _ = stability_update(model, images, asked, indices=indices, displacement=displacement, cut=cut, seed=seed)
    return stability_compute(sums)
