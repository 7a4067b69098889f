"""The measures of Lie derivatives as functions of sums over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lie_metric.algebra import Generator, spanning_set
from lie_metric.functional.sums import ROUNDINGS, Sums, defined, spread, totals
from lie_metric.warning import warn

__all__ = [
    "ONE_PART",
    "STATISTICS",
    "Normalise",
    "directions_of",
    "gram_and_energy",
    "gram_of",
    "local_equivariance_compute",
    "relative_of",
    "validate_normalise",
    "value_of",
]

Normalise = Literal["input"]


def _by_part(value: Tensor, sums: Sums) -> Tensor:
    """Values (..., parts, K) as one row, part after part; (..., K) stay."""
    return value.flatten(sums["images"].ndim)


def _images(sums: Sums, like: Tensor) -> Tensor:
    return sums["images"].reshape((*sums["images"].shape, *[1] * (like.ndim - sums["images"].ndim)))


def _lee(sums: Sums) -> Tensor:
    squares = sums["gram"].diagonal(dim1=-2, dim2=-1)
    return _by_part(squares / _images(sums, squares), sums)


def _rms(sums: Sums) -> Tensor:
    return _lee(sums).sqrt()


def gram_of(sums: Sums) -> Tensor:
    """The Gram matrix, (..., K, K)."""
    return sums["gram"] / _images(sums, sums["gram"])


def _energy(sums: Sums) -> Tensor:
    return sums["energy"] / _images(sums, sums["energy"])


def gram_and_energy(sums: Sums) -> Tensor:
    """The Gram matrix and that of the tangents, (2, ..., K, K)."""
    return torch.stack([gram_of(sums), _energy(sums)])


def relative_of(sums: Sums) -> Tensor:
    """The relative errors, (..., K)."""
    return _by_part((sums["violation"] / spread(sums)[..., None]).sqrt(), sums)


def _sensitivity(sums: Sums) -> Tensor:
    floor = (sums["square"] * (ROUNDINGS * sums["rounding"]) ** 2)[..., None]
    noise = torch.where(sums["noise"] > floor, sums["noise"], torch.nan)
    return _by_part((sums["violation"] / noise).sqrt(), sums)


# Input energies below this part of the largest are rounding of float32 tangents: such combinations move no image.
_UNMOVED = 1e-12


ONE_PART = (
    "`output_representation` must be of one part for the Gram matrix and its directions, got several. Units of parts "
    "differ: measure one at a time."
)


def validate_normalise(normalise: Normalise | None) -> None:
    """Refuses an unknown normalisation."""
    if normalise not in {None, "input"}:
        raise ValueError(f"`normalise` must be None or 'input', got {normalise!r}. 'input' gives gains.")


def directions_of(
    gram: Tensor, energy: Tensor, asked: Sequence[Generator], normalise: Normalise | None
) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and unit eigenvectors as rows, of G or of the pair G and E, on what the generators span."""
    # Coefficients that add up to no generator at all are left out: with the rest, every element of the span has one
    # way to be written, the one of least norm.
    span = torch.linalg.qr(spanning_set(asked)[1].to(gram)).Q
    if not bool(torch.isfinite(gram).all()):
        return span.new_full(span.shape[1:], torch.nan), torch.full_like(span.mT, torch.nan)
    if normalise == "input":
        sizes, axes = torch.linalg.eigh(span.mT @ energy @ span)
        moving = sizes > _UNMOVED * energy.diagonal().sum()
        span = span @ (axes[:, moving] / sizes[moving].sqrt())
    values, vectors = torch.linalg.eigh(span.mT @ gram @ span)
    rows = torch.nn.functional.normalize((span @ vectors).mT, dim=1)
    # An eigenvector is defined up to its sign: the largest coefficient is made positive.
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * largest.sign()


STATISTICS: dict[str, Callable[[Sums], Tensor]] = {
    "relative": relative_of,
    "lee": _lee,
    "rms": _rms,
    "sensitivity": _sensitivity,
}

_UNDEFINED = {
    "relative": "the output does not vary over the images (one alone never does), or not by more than rounding",
    "sensitivity": "the output does not respond to noise, or not by more than rounding",
    "lee": "it is not finite",
    "rms": "it is not finite",
}


def local_equivariance_compute(sums: Sums, measure: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The measure of each generator from the sums."""
    return dict(zip(names, value_of(sums, STATISTICS[measure], measure, names).unbind(), strict=True))


def value_of(sums: Sums, statistic: Callable[[Sums], Tensor], measure: str, names: Sequence[str]) -> Tensor:
    """A statistic of all sums, NaN with a warning where it is not defined."""
    total = totals(sums)
    value = statistic(total)
    if not bool(torch.isfinite(total["square"]).all()) or not bool(torch.isfinite(total["violation"]).all()):
        warn(f"`{measure}` is NaN: the model's outputs or derivatives are not finite.")
        return torch.full_like(value, torch.nan)
    return defined(value, measure, names, _UNDEFINED[measure], total)
