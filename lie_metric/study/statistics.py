"""Rank correlation with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Correlation", "spearman"]

FEWEST = 5
"""Below so many points there is no interval: resamples of four points take only a handful of values."""


class Correlation(NamedTuple):
    """A rank correlation.

    Attributes:
        rho: Spearman's coefficient, ties with their mean rank; NaN for fewer than three points or a constant.
        low: Lower end of the 95 % percentile interval; NaN for fewer than five points.
        high: Upper end.
        points: Number of points.
    """

    rho: float
    low: float
    high: float
    points: int


def spearman(x: Sequence[float], y: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Correlation:
    """Spearman's rank correlation and its bootstrap interval, points resampled with replacement.

    Args:
        x: Numbers; a pair that is not finite is left out.
        y: Numbers, as many.
        resamples: Bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The coefficient, the ends of its 95 % interval, the number of pairs.

    Raises:
        ValueError: If there are not as many of one as of the other.

    Example:
        >>> spearman([1, 2, 3, 4, 5], [1, 4, 9, 16, 25])
        Correlation(rho=1.0, low=1.0, high=1.0, points=5)
    """
    if len(x) != len(y):
        raise ValueError(f"`y` must hold as many numbers as `x`, got {len(y)} and {len(x)}.")
    pairs = np.array([x, y], dtype=float)
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    count = pairs.shape[1]
    if count < 3:
        return Correlation(math.nan, math.nan, math.nan, count)
    rho = float(_weighted(pairs, np.ones((1, count)))[0])
    if count < FEWEST or math.isnan(rho):
        return Correlation(rho, math.nan, math.nan, count)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    found = _weighted(pairs, weights.astype(float))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Correlation(rho, float(low), float(high), count)


def _weighted(pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The coefficient of each resample, given by how often each point is in it, shape (resamples, points)."""
    total = weights.sum(1, keepdims=True)
    centred = []
    for values in pairs:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        starts = np.cumsum(counts) - counts
        grouped = np.add.reduceat(weights[:, np.argsort(values, kind="stable")], starts, axis=1)
        # Points that are equal share the mean of their ranks, copies of a point too.
        ranks = (np.cumsum(grouped, 1) - grouped / 2)[:, inverse]
        centred.append(ranks - (weights * ranks).sum(1, keepdims=True) / total)
    a, b = centred
    scale = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    product = (weights * a * b).sum(1)
    # Rounded to where summation ends, so that perfect agreement is 1.
    return np.round(np.divide(product, scale, out=np.full(len(scale), np.nan), where=scale > 0), 12)
