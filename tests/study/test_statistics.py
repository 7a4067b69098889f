"""Rank correlation against scipy, and its interval against resampling point by point."""

import math

import numpy as np
import pytest

from lie_metric.study import spearman
from lie_metric.study.statistics import _weighted

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("ties", [False, True])
def test_coefficient(ties):
    random = np.random.default_rng(0)
    for count in (3, 5, 30):
        x, y = random.normal(size=(2, count))
        if ties:
            x, y = np.round(x), np.round(y + x)
        wanted = stats.spearmanr(x, y).statistic
        np.testing.assert_allclose(spearman(x, y, resamples=10).rho, wanted, atol=1e-11)


def test_resamples():
    random = np.random.default_rng(1)
    pairs = np.round(random.normal(size=(2, 12)), 1)
    drawn = random.integers(0, 12, (50, 12))
    weights = np.stack([np.bincount(one, minlength=12) for one in drawn]).astype(float)
    wanted = [stats.spearmanr(pairs[0, one], pairs[1, one]).statistic for one in drawn]
    np.testing.assert_allclose(_weighted(pairs, weights), wanted, atol=1e-11)


def test_interval():
    random = np.random.default_rng(2)
    x = random.normal(size=60)
    y = x + random.normal(size=60)
    rho, low, high, points = spearman(x, y)
    assert low < rho < high
    assert points == 60
    bootstrap = stats.bootstrap(
        (x, y), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False, method="percentile",
        n_resamples=500, rng=np.random.default_rng(0),
    )  # fmt: skip
    np.testing.assert_allclose([low, high], bootstrap.confidence_interval, atol=0.06)


def test_what_is_left_out():
    assert spearman([1, 2, math.nan, 4, 5], [1, 2, 3, math.inf, 5]).points == 3
    assert math.isnan(spearman([1, 2], [1, 2]).rho)
    assert math.isnan(spearman([1, 1, 1, 1, 1, 1], range(6)).rho)
    four = spearman([1, 2, 3, 4], [1, 2, 3, 4])
    assert four.rho == 1
    assert math.isnan(four.low)
    with pytest.raises(ValueError, match="`y` must hold as many numbers as `x`, got 1 and 2"):
        spearman([1, 2], [1])
