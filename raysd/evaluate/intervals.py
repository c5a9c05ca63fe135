"""How sure a number is: intervals of means, by bootstrap or of few observations by Student's t, and intervals of shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
FEW = 10
"""Observations below which resampling sees too little of the spread."""
_CELLS = 2**22
"""Numbers drawn at once: memory stays small whatever the sample's size."""


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` observations, and where the true value lies in `confidence` of all cases."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_mean(
    values: ArrayLike, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Expanded percentile bootstrap of a mean (Hesterberg 2015, sec. 4.4). values: [N], N > 0.

    The plain percentiles are too narrow for few observations, as a normal interval is beside Student's: they are taken
    further out by what lies between the two. Below 10 observations there are too few different means for that (of two
    there are three, and the outermost of them held the true mean in half of all cases): the interval is Student's (1908),
    exact for normal values, and may reach beyond what a value can be. One observation has no spread: its interval is the
    whole line.
    """
    sample = _sample(values)
    if len(sample) < FEW:
        return _students(float(sample.mean()), [sample], confidence)
    return _interval(float(sample.mean()), resampled_means(sample, resamples, seed), confidence, len(sample))


def bootstrap_difference(
    first: ArrayLike, second: ArrayLike, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """mean(first) - mean(second) of two independent samples; n is the smaller one's. By Student's t where that is below 10."""
    one, two = _sample(first), _sample(second)
    if min(len(one), len(two)) < FEW:
        return _students(float(one.mean() - two.mean()), [one, two], confidence)
    means = resampled_means(one, resamples, seed) - resampled_means(two, resamples, seed + 1)
    return _interval(float(one.mean() - two.mean()), means, confidence, min(len(one), len(two)))


def wilson(wins: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """A share of `wins` in `n` trials (Wilson 1927); a tie may count as half a win. Raises ValueError."""
    if n < 1 or not 0 <= wins <= n:
        raise ValueError(f"{wins} wins of {n}: needs at least one trial, and no more wins than trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = wins / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    reach = z / scale * float(np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach), n)


def resampled_means(sample: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of samples drawn with replacement. [N] -> [resamples]"""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(sample))
    parts = [
        sample[rng.integers(0, len(sample), (min(rows, resamples - first), len(sample)))].mean(axis=1)
        for first in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def _sample(values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64).ravel()
    if not len(sample):
        raise ValueError("no observations")
    return sample


def _students(value: float, samples: Sequence[NDArray[np.float64]], confidence: float) -> Interval:
    """By the t distribution, of two samples with the smaller one's degrees of freedom: never too narrow (Mickey & Brown
    1966), where Welch's would hold in 89% of all cases for two observations beside ten."""
    from scipy import stats

    n = min(map(len, samples))
    if n < 2:
        return Interval(value, float("-inf"), float("inf"), n)
    variance = sum(float(sample.var(ddof=1)) / len(sample) for sample in samples)
    reach = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * variance**0.5
    return Interval(value, value - reach, value + reach, n)


def _interval(value: float, means: NDArray[np.float64], confidence: float, n: int) -> Interval:
    from scipy import stats

    reach = stats.t.ppf(0.5 + confidence / 2, n - 1) * np.sqrt(n / (n - 1))
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)
