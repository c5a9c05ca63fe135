"""Scores against computations of their own, written here with NumPy and SciPy from the papers' formulas."""

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.spatial.distance import cdist

from raysd.evaluate import scores


@pytest.fixture
def sets():
    """Two sets of correlated features whose means and covariances differ. [300, 24], [260, 24]"""
    rng = np.random.default_rng(5)
    real = rng.normal(size=(300, 24)) @ rng.normal(size=(24, 24)) + 0.3
    generated = rng.normal(size=(260, 24)) @ rng.normal(size=(24, 24)) * 1.1
    return torch.from_numpy(real), torch.from_numpy(generated)


def fid_by_square_root(one, two):
    """The trace of the matrix square root, by SciPy."""
    root = linalg.sqrtm(np.cov(one, rowvar=False) @ np.cov(two, rowvar=False)).real
    apart = one.mean(0) - two.mean(0)
    return apart @ apart + np.trace(np.cov(one, rowvar=False) + np.cov(two, rowvar=False) - 2 * root)


def test_fid_against_the_matrix_square_root(sets):
    one, two = sets
    assert scores.fid(one, two) == pytest.approx(fid_by_square_root(one.numpy(), two.numpy()), rel=1e-8)
    assert scores.fid(one.float(), two.float()) == pytest.approx(scores.fid(one, two), rel=1e-4)
    assert scores.fid(one, one) == pytest.approx(0, abs=1e-8)


def test_fid_agrees_with_torchmetrics(sets):
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=scores._Identity(24))
    metric.update(sets[0], real=True)
    metric.update(sets[1], real=False)
    assert scores.fid(*sets) == pytest.approx(float(metric.compute()), rel=1e-8)


def test_fid_with_fewer_pictures_than_features(sets):
    one, two = sets[0][:10], sets[1][:7]
    assert scores.fid(one, two) == pytest.approx(fid_by_square_root(one.numpy(), two.numpy()), rel=1e-4)
    with pytest.raises(ValueError, match="two pictures"):
        scores.fid(one[:1], two)


def kid_by_sums(one, two):
    """Bińkowski et al. 2018, eq. 4, with the cubic kernel, term by term."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(one), len(two)
    within = (kernel(one, one).sum() - np.trace(kernel(one, one))) / (n * (n - 1))
    within += (kernel(two, two).sum() - np.trace(kernel(two, two))) / (m * (m - 1))
    return within - 2 * kernel(one, two).mean()


def test_kid_of_whole_sets_against_the_sums(sets):
    one, two = sets[0][:120], sets[1][:120]
    mean, deviation = scores.kid(one, two, size=120)
    assert mean == pytest.approx(kid_by_sums(one.numpy(), two.numpy()), rel=1e-9)
    assert deviation is None, "each subset is the whole"


def test_kid_of_subsets_is_their_mean_and_deviation(sets):
    one, two = sets
    torch.manual_seed(3)  # the order in which torchmetrics draws: real, then generated, for each subset
    values = []
    for _ in range(10):
        chosen = torch.randperm(300)[:50], torch.randperm(260)[:50]
        values.append(kid_by_sums(one[chosen[0]].numpy(), two[chosen[1]].numpy()))
    assert scores.kid(one, two, seed=3, size=50, subsets=10) == pytest.approx(
        (np.mean(values), np.std(values)), rel=1e-9
    )
    state = torch.random.get_rng_state()
    scores.kid(one, two, seed=3, size=50, subsets=10)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are untouched"


def test_kid_of_small_sets_has_a_spread(sets):
    assert scores.kid(sets[0][:40], sets[1][:40])[1] > 0
    assert scores.kid(sets[0][:2], sets[1][:2])[1] is None, "there is one subset"
    with pytest.raises(ValueError, match="two pictures"):
        scores.kid(sets[0][:1], sets[1])


def test_inception_score_against_the_sums():
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(100, 12)) * 2)
    torch.manual_seed(4)
    shuffled = logits[torch.randperm(100)].numpy()
    values = []
    for part in np.split(shuffled, 10):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        values.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert scores.inception_score(logits, seed=4) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-9)


def test_the_inception_score_of_one_split_has_no_spread():
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(20, 12)))
    assert scores.inception_score(logits)[1] > 0
    assert scores.inception_score(logits[:19])[1] is None


def test_inception_score_knows_the_best_and_the_worst():
    certain = torch.eye(10).repeat(1, 1) * 1000
    assert scores.inception_score(certain)[0] == pytest.approx(10)
    assert scores.inception_score(torch.zeros(30, 10))[0] == pytest.approx(1)


def test_clip_score_by_hand():
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    texts = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [5.0, 0.0]])
    assert scores.clip_scores(images, texts) == pytest.approx([96.0, 0.0, 100 / 2**0.5])


@pytest.mark.parametrize("rows", [7, 512])
def test_precision_and_recall_against_the_definition(sets, rows, monkeypatch):
    """Whatever part of the distances is in memory at once."""
    monkeypatch.setattr(scores, "ROWS", rows)
    one, two = sets[0][:90].numpy(), (sets[1][:70] * 0.5).numpy()

    def inside(points, balls):
        radii = np.sort(cdist(balls, balls), axis=1)[:, 3]
        return np.array([any(cdist([point], balls)[0] <= radii) for point in points])

    precision, recall = scores.precision_recall(torch.from_numpy(one), torch.from_numpy(two))
    assert (precision == inside(two, one)).all()
    assert (recall == inside(one, two)).all()
    assert 0 < precision.mean() + recall.mean() < 2
    with pytest.raises(ValueError, match="more than 3"):
        scores.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_diversity_is_within_a_prompt():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    found = scores.diversity(features, [0, 0, 1, 1, 2])  # prompt 2 has one picture, and no pair
    assert found == pytest.approx([1.0, 0.0])


def test_nearest_finds_the_copy():
    training = torch.from_numpy(np.random.default_rng(1).normal(size=(20, 8)))
    places, similarity = scores.nearest(training[[7, 3]] * 5, training)
    assert places.tolist() == [7, 3]
    assert similarity == pytest.approx([1, 1])
    assert scores.fidelity(training[:1], training[[0, 0]]) == pytest.approx([1])


def test_the_null_band_holds_equal_distributions_and_not_others():
    rng = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 8, generator=rng)
    low, high = scores.null_band(reference, 100, scores.fid)
    same, other = torch.randn(100, 8, generator=rng), torch.randn(100, 8, generator=rng) + 1
    assert 0 < low < high
    assert low * 0.5 < scores.fid(reference[:100], same) < high * 1.5
    assert scores.fid(reference[:100], other) > 2 * high
    assert scores.null_band(reference, 100, scores.fid) == (low, high)
    with pytest.raises(ValueError, match="needs 402 reference pictures, there are 400"):
        scores.null_band(reference, 201, scores.fid)
