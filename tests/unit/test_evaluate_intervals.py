"""Intervals hold what they promise, over many simulated samples."""

import numpy as np
import pytest

from raysd.evaluate.intervals import bootstrap_difference, bootstrap_mean, wilson

SAMPLES = 500


@pytest.mark.parametrize("kind", ["normal", "few", "skewed"])
def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says(kind):
    rng = np.random.default_rng(7)
    hits = 0
    for number in range(SAMPLES):
        sample = rng.gamma(4.0, 1.0, 150) if kind == "skewed" else rng.normal(4.0, 2.0, 80 if kind == "normal" else 15)
        found = bootstrap_mean(sample, resamples=500, seed=number)
        hits += found.low <= 4.0 <= found.high
    assert 0.92 <= hits / SAMPLES <= 0.98


def test_a_difference_covers_the_true_one():
    rng = np.random.default_rng(8)
    hits = 0
    for number in range(SAMPLES):
        found = bootstrap_difference(rng.normal(2, 1, 60), rng.normal(1, 3, 90), resamples=500, seed=number)
        hits += found.low <= 1.0 <= found.high
    assert 0.92 <= hits / SAMPLES <= 0.98


@pytest.mark.parametrize("n", [2, 3, 5, 9, 10])
def test_intervals_of_few_observations_cover_as_often_as_they_say(n):
    rng = np.random.default_rng(n)
    samples = rng.normal(4, 2, (3000 if n < 10 else SAMPLES, n))
    found = [bootstrap_mean(sample, resamples=500) for sample in samples]
    assert 0.93 <= np.mean([interval.low <= 4 <= interval.high for interval in found]) <= 0.97


@pytest.mark.parametrize(("one", "two"), [(2, 2), (2, 10), (3, 50), (5, 5)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_differences_of_few_observations_are_covered_no_less(one, two, spread):
    rng = np.random.default_rng(one * two)
    pairs = zip(rng.normal(2, 1, (2000, one)), rng.normal(1, spread, (2000, two)), strict=True)
    found = [bootstrap_difference(*pair) for pair in pairs]
    assert np.mean([interval.low <= 1 <= interval.high for interval in found]) >= 0.935


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_wilson_covers_a_share_as_often_as_it_says(share):
    rng = np.random.default_rng(9)
    found = [wilson(int(wins), 40) for wins in rng.binomial(40, share, 3000)]
    assert 0.92 <= np.mean([interval.low <= share <= interval.high for interval in found]) <= 0.98


def test_wilson_by_hand():
    found = wilson(8, 10)  # z = 1.959964: (0.8 + 0.19207) / 1.384146 -+ 0.22660
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 1.0
    with pytest.raises(ValueError, match="6 wins of 5"):
        wilson(6, 5)


def test_the_same_seed_gives_the_same_interval_and_memory_does_not_matter(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    first = bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) == first
    assert bootstrap_mean(values, seed=4) != first
    monkeypatch.setattr("raysd.evaluate.intervals._CELLS", 120)
    assert bootstrap_mean(values, seed=3) == first


def test_one_observation_says_nothing_of_its_spread():
    found = bootstrap_mean([2.5])
    assert (found.value, found.low, found.high) == (2.5, -np.inf, np.inf)
    with pytest.raises(ValueError, match="no observations"):
        bootstrap_mean([])
