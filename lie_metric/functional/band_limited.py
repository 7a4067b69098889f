r"""EQ-T, EQ-T_frac and EQ-R: how well a model commutes with shifts and rotations that keep the band of its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lie_metric import filters
from lie_metric.functional.sums import NOTHING, Sums, grouped, totals
from lie_metric.measured import described, evaluated, function_of, validate_inputs
from lie_metric.options import Options
from lie_metric.randomness import source, validate_seed
from lie_metric.representations import (
    Invariant,
    Representation,
    map_grid,
    planar_size,
    refuse_own_action,
)
from lie_metric.resampling import coordinate_dtype, working_precision
from lie_metric.running import isolated
from lie_metric.warning import warn

__all__ = [
    "BandLimited",
    "band_limited_compute",
    "band_limited_statistic",
    "band_limited_update",
    "band_limited_validate",
    "eq_r",
    "eq_t",
    "eq_t_frac",
]

BandLimited = Literal["eq_t", "eq_t_frac", "eq_r"]
Filter = Callable[[Tensor], tuple[Tensor, Tensor]]


def band_limited_validate(
    kinds: Sequence[BandLimited],
    data_range: float | None,
    max_shift: float,
    seed: int,
) -> tuple[BandLimited, ...]:
    """The measures asked for, if every option has a meaning."""
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(get_args(BandLimited)):
        raise ValueError(f"`kinds` must be a sequence of some of {get_args(BandLimited)}, got {kinds!r}.")
    if data_range is not None and (isinstance(data_range, bool) or not data_range > 0 or math.isinf(data_range)):
        raise ValueError(
            f"`data_range` must be a positive number or None, got {data_range!r}. Give the width of the interval of "
            "the output's values, e.g. 2.0 for images in [-1, 1]."
        )
    if not 0 < max_shift <= 0.5:
        raise ValueError(f"`max_shift` must be in (0, 0.5], got {max_shift!r}. 1/8 of the image is the paper's choice.")
    validate_seed(seed)
    return tuple(kinds)


def band_limited_update(
    model: Callable[..., Any],
    images: Tensor,
    options: Options,
    *,
    kinds: Sequence[BandLimited],
    indices: Sequence[int],
    data_range: float | None = None,
    max_shift: float = 0.125,
    seed: int = 0,
) -> tuple[dict[str, Tensor], str]:
    """The sums of a batch, and what is measured in words.

    ``indices`` are the images' running numbers, which fix their groups and transforms.
    """
    carrier = validate_inputs(model, images, options.input_representation, options.function)
    size = planar_size(carrier, images, kinds[0])
    with torch.no_grad(), isolated(model):
        images = working_precision(images)
        measured = function_of(model, options.output, options.function)
        f, representation = evaluated(model, measured, images, options)
        invariant = isinstance(representation, Invariant)
        if invariant != (data_range is None):
            raise ValueError(
                f"`data_range` must be {'None' if invariant else 'given'} for an output that acts as "
                f"{representation!r}, got {data_range!r}. "
                + ("Class scores have no peak to measure noise against." if invariant else "PSNR is relative to it.")
            )
        if "eq_r" in kinds:
            refuse_own_action(representation, "eq_r")
        sizes = size, None if invariant else planar_size(representation, f, kinds[0])
        drawn = torch.stack([_draw(index, seed) for index in indices]).to(images.device)
        errors, counts = [], []
        for kind in kinds:
            move, compare = _transform(kind, drawn, max_shift, sizes)
            y = measured(map_grid(carrier, images, lambda x, move=move: move(x)[0]))  # type: ignore[misc]
            ones = torch.ones_like(f)
            if invariant:
                difference, valid = y - f, ones
            else:
                (found, one), (wanted, other) = (
                    _through(representation, tensor, part) for tensor, part in zip((y, f), compare, strict=True)
                )
                difference, valid = found - wanted, one * other
            wide = coordinate_dtype(f.device)
            # Beyond the valid region values may be anything, also infinite.
            kept = torch.where(valid > 0, difference, 0).reshape(len(f), -1).to(wide)
            errors.append(kept.square().sum(1))
            counts.append(valid.reshape(len(f), -1).to(wide).sum(1))
    sums = grouped({"error": torch.stack(errors, 1), "count": torch.stack(counts, 1)}, indices)
    return sums, described(f, representation, options.output_representation, options.output)


def _through(representation: Representation, tensor: Tensor, part: Filter) -> tuple[Tensor, Tensor]:
    """A tensor after a filter of its images, and ones where it is whole, zeros elsewhere, of the tensor's shape."""
    masks: list[Tensor] = []

    def apply(image: Tensor) -> Tensor:
        result, inside = part(image)
        masks.append(inside)
        return result

    filtered = map_grid(representation, tensor, apply)
    ones = torch.ones_like(tensor)
    return filtered, map_grid(representation, ones, lambda image: masks[0][:, None].expand_as(image).to(image.dtype))


def _draw(index: int, seed: int) -> Tensor:
    """Three uniform numbers in [-1, 1): a shift along each axis and an angle; fixed by the image's number."""
    return 2 * torch.rand(3, dtype=torch.float64, generator=source(seed, index)) - 1


def _transform(
    kind: BandLimited,
    drawn: Tensor,
    max_shift: float,
    sizes: tuple[tuple[int, int], tuple[int, int] | None],
) -> tuple[Filter, tuple[Filter, Filter]]:
    """What moves the images, and what the output of these and that of the images as they are go through."""
    (height, width), grid = sizes
    h, w = grid or (height, width)
    if kind == "eq_r":
        angles = drawn[:, 2] * math.pi
        return (
            lambda x: filters.rotate(x, angles),
            (lambda y: filters.low_pass(y, angles), lambda y: filters.rotate(y, angles)),
        )
    scale = torch.tensor([w / width, h / height], dtype=torch.float64, device=drawn.device)
    size = torch.tensor([width, height], dtype=torch.float64, device=drawn.device)
    steps = drawn[:, :2] * max_shift * size
    if kind == "eq_t":
        # Whole pixels of the input and of the output's grid at once.
        unit = torch.tensor([width // math.gcd(width, w), height // math.gcd(height, h)], device=drawn.device)
        if bool((unit > max_shift * size).any()):
            raise ValueError(
                f"`max_shift` must allow for shifts that move the output of {h}×{w} by whole pixels too, got "
                f"{max_shift} for images of {height}×{width}, which needs steps of {unit[0]} pixels. Raise it, or "
                "measure 'eq_t_frac'."
            )
        steps = (steps / unit).round() * unit
        far = (steps * scale).round().long()
        return lambda x: filters.shift(x, steps.long()), (_everywhere, lambda y: filters.shift(y, far))
    return lambda x: filters.translate(x, steps), (_everywhere, lambda y: filters.translate(y, steps * scale))


def _everywhere(y: Tensor) -> tuple[Tensor, Tensor]:
    return y, torch.ones((len(y), *y.shape[-2:]), dtype=torch.bool, device=y.device)


def band_limited_statistic(data_range: float | None) -> Callable[[Sums], Tensor]:
    """From sums to decibels, or without a data range to mean squares."""

    def statistic(sums: Sums) -> Tensor:
        error = sums["error"] / sums["count"]
        return error if data_range is None else 10 * (data_range**2 / error).log10()

    return statistic


def band_limited_compute(sums: Sums, kinds: Sequence[BandLimited], data_range: float | None) -> dict[str, Tensor]:
    """Each measure from the sums."""
    total = totals(sums)
    values = band_limited_statistic(data_range)(total)
    undefined = [kind for kind, value in zip(kinds, values.isnan().tolist(), strict=True) if value]
    if undefined:
        reason = (
            "no pixel has all of its filter within the frame (filters reach over up to 8 pixels), or the outputs are "
            "not finite"
        )
        warn(f"{undefined} are NaN: {reason if bool(total['images']) else NOTHING}.")
    return dict(zip(kinds, values.unbind(), strict=True))


def _measure(
    kind: BandLimited,
    model: Callable[..., Any],
    images: Tensor,
    options: Mapping[str, Any],
    own: Mapping[str, Any],
) -> Tensor:
    asked = Options.of(options, without=("resampling", "method", "chunk_size"), beside=tuple(own))
    kinds = band_limited_validate((kind,), **own)
    indices = range(len(images)) if isinstance(images, Tensor) and images.ndim else ()
    sums, _ = band_limited_update(model, images, asked, kinds=kinds, indices=indices, **own)
    return band_limited_compute(sums, kinds, own["data_range"])[kind]


def eq_t(
    model: Callable[..., Any],
    images: Tensor,
    *,
    data_range: float | None = None,
    max_shift: float = 0.125,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    r"""Equivariance to shifts by whole pixels, in decibels (Karras et al. 2021, arXiv 2106.12423, Appendix E).

    .. math:: \mathrm{EQ\text{-}T} = 10 \log_{10} \frac{I_{max}^2}{E \left( f(t x) - t f(x) \right)^2}

    the mean being over images, channels and those pixels that stay in the frame; t shifts by whole pixels, uniform in
    ± ``max_shift`` of each side, and zeros enter. Larger is more equivariant; infinite if both agree in every bit.

    For an invariant output, class scores say, there is no peak value: :math:`E\|f(tx) - f(x)\|^2 / \dim f` is returned,
    in squared units of the output, and smaller is more invariant.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        data_range: The width I_max of the interval of the output's values, needed for image-valued outputs and not
            allowed for invariant ones.
        max_shift: Largest shift, as a part of each side.
        seed: Fixes the shifts.
        options: ``output``, ``function``, ``input_representation``, ``output_representation`` as in
            :func:`lie_metric.lie_derivative`.

    Returns:
        A number of no axes: dB, or the mean square.

    Raises:
        ValueError: If the data range is missing, or shifts cannot move the output's grid by whole pixels.

    Example:
        >>> import torch
        >>> eq_t(lambda x: 2 * x, torch.rand(2, 1, 16, 16), data_range=2.0).item()
        inf
    """
    own = {"data_range": data_range, "max_shift": max_shift, "seed": seed}
    return _measure("eq_t", model, images, options, own)


def eq_t_frac(
    model: Callable[..., Any],
    images: Tensor,
    *,
    data_range: float | None = None,
    max_shift: float = 0.125,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Equivariance to shifts by parts of pixels, as :func:`eq_t`, with Lanczos filters of a = 3.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        data_range: As in :func:`eq_t`.
        max_shift: As in :func:`eq_t`.
        seed: As in :func:`eq_t`.
        options: As in :func:`eq_t`.

    Returns:
        A number of no axes: dB, or the mean square.

    Example:
        >>> import torch
        >>> bool(eq_t_frac(lambda x: 2 * x, torch.rand(2, 1, 16, 16), data_range=2.0) > 100)
        True
    """
    own = {"data_range": data_range, "max_shift": max_shift, "seed": seed}
    return _measure("eq_t_frac", model, images, options, own)


def eq_r(
    model: Callable[..., Any],
    images: Tensor,
    *,
    data_range: float | None = None,
    max_shift: float = 0.125,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Equivariance to rotations by any angle, as :func:`eq_t`, within the band that both lattices carry.

    The rotated output is compared with the output of the rotated image, low-passed in the same way; see
    :func:`lie_metric.filters.rotate` and :func:`lie_metric.filters.low_pass`. Pixels within some 8 of the frame are
    left out. The filters are not ideal: the value of the identity is the ceiling for images of that band.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        data_range: As in :func:`eq_t`.
        max_shift: As in :func:`eq_t`.
        seed: As in :func:`eq_t`.
        options: As in :func:`eq_t`.

    Returns:
        A number of no axes: dB, or the mean square.

    Example:
        >>> import torch
        >>> smooth = torch.nn.functional.interpolate(torch.rand(2, 1, 5, 5), size=32, mode="bicubic")
        >>> bool(eq_r(lambda x: x, smooth, data_range=1.0) > 40)
        True
    """
    own = {"data_range": data_range, "max_shift": max_shift, "seed": seed}
    return _measure("eq_r", model, images, options, own)
