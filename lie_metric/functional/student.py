"""Student's t distribution: what its quantiles and tail probabilities are, without a library of statistics."""

from __future__ import annotations

import functools
import math

__all__ = ["quantile", "two_sided"]


def two_sided(t: float, freedom: float) -> float:
    r"""The probability that Student's t is farther from 0 than a number.

    .. math:: P(|T| > |t|) = I_{\nu / (\nu + t^2)}(\nu / 2, 1 / 2)

    with the regularised incomplete beta function (Abramowitz & Stegun 26.7.1 and 26.5.8).

    Args:
        t: The number.
        freedom: Degrees of freedom ν; infinite for the normal distribution.

    Returns:
        The probability; NaN if either is, or there is no degree of freedom.

    Example:
        >>> round(two_sided(12.706, 1), 5), round(two_sided(1.959964, math.inf), 5)
        (0.05, 0.05)
    """
    if math.isnan(t) or not freedom > 0:
        return math.nan
    if math.isinf(freedom):
        return math.erfc(abs(t) / math.sqrt(2))
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(freedom / (freedom + square), square / (freedom + square), freedom / 2, 0.5)


@functools.lru_cache(maxsize=256)
def quantile(level: float, freedom: float) -> float:
    """How many standard errors on either side an interval needs.

    Args:
        level: Probability that Student's t is within, between 0 and 1.
        freedom: Degrees of freedom.

    Returns:
        The number q with P(-q < T < q) = level; NaN if there is no degree of freedom, or no level.

    Example:
        >>> round(quantile(0.95, 63), 4), round(quantile(0.95, 2), 4), round(quantile(0.95, math.inf), 4)
        (1.9983, 4.3027, 1.96)
    """
    if not freedom > 0 or not 0 < level < 1:
        return math.nan
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 1 - level:
        high *= 2
    for _ in range(100):  # halved until nothing is between
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b) for x + rest = 1 by its continued fraction, on the side where it converges fast (modified Lentz)."""
    if x <= 0 or rest <= 0:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(rest, x, b, a)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            change *= c * d
        fraction *= change
        if abs(change - 1) < 1e-15:
            break
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    return math.exp(scale) * fraction / a
