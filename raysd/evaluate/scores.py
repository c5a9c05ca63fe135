"""Scores of sets of pictures, from features that were computed already.

Shapes: N pictures of one set, M of another, D features, K classes. All arithmetic is in fp64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

KID_SUBSETS = 100
KID_SIZE = 1000
"""As in the paper where there are so many pictures; else half of them, so that the subsets differ."""
IS_SPLITS = 10
ROWS = 512
"""Of a matrix of distances that are in memory at once."""


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two sets (Heusel et al. 2017, eq. 6). [N, D], [M, D]

    With C1 = AᵀA and C2 = BᵀB the last trace is the sum of the singular values of ABᵀ: no matrix square root, nothing
    complex, and as exact where there are fewer pictures than features. torchmetrics takes the D² eigenvalues of C1 C2
    instead: the same number (a test compares them), minutes of work for a null band of 2048 features.
    Raises ValueError for fewer than two pictures.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("FID needs at least two pictures of each kind")
    one, two = real.double(), generated.double()
    first, second = _factor(one), _factor(two)
    apart = (one.mean(0) - two.mean(0)).square().sum()
    spread = first.square().sum() + second.square().sum()
    value = apart + spread - 2 * torch.linalg.svdvals(first @ second.T).sum()
    return max(0.0, float(value))


def kid(
    real: Tensor, generated: Tensor, seed: int = 0, size: int | None = None, subsets: int = KID_SUBSETS
) -> tuple[float, float | None]:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, sec. 4), by torchmetrics.

    (mean, standard deviation) over random subsets of `size` pictures of each kind; no deviation where all subsets are
    the whole. [N, D], [M, D]. Raises ValueError for fewer than two pictures.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(real), len(generated))
    size = size or min(KID_SIZE, max(2, fewest // 2))
    if fewest < 2:
        raise ValueError("KID needs at least two pictures of each kind")
    metric = KernelInceptionDistance(feature=_Identity(real.shape[1]), subsets=subsets, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    mean, deviation = _seeded(metric.compute, seed)
    alike = subsets == 1 or size == len(real) == len(generated)
    return float(mean), None if alike else float(deviation)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float | None]:
    """exp E KL(p(y|x) | p(y)) (Salimans et al. 2016, sec. 4), by torchmetrics: (mean, deviation) over splits. [N, K]

    10 splits as usual, fewer where a split would have fewer than 10 pictures: the score grows with a split's size. One
    split, of fewer than 20 pictures, has no deviation.
    """
    from torchmetrics.image.inception import InceptionScore

    splits = max(1, min(IS_SPLITS, len(logits) // 10))
    metric = InceptionScore(feature=_Identity(logits.shape[1]), splits=splits)
    metric.update(logits.double())
    mean, deviation = _seeded(metric.compute, seed)
    return float(mean), float(deviation) if splits > 1 else None


def clip_scores(images: Tensor, texts: Tensor) -> NDArray[np.float64]:
    """100 max(cos(image, text), 0) of each picture and its own text. [N, D], [N, D] -> [N]

    As torchmetrics counts it; Hessel et al. 2021, eq. 1 has 2.5 in the place of 100. Not by torchmetrics, whose
    CLIPScore fails on what transformers 5 returns.
    """
    cosines = (normalize(images.double(), dim=-1) * normalize(texts.double(), dim=-1)).sum(-1)
    return (100 * cosines.clamp(min=0)).numpy()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2): their means are the scores.

    For each generated picture whether it lies within the k-th neighbour's distance of a real one [M], and for each real
    one whether it lies within a generated one's [N]. Raises ValueError where a set has no k-th neighbour.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} pictures of each kind")
    one, two = real.double(), generated.double()
    return _within(two, one, _radii(one, k)).numpy(), _within(one, two, _radii(two, k)).numpy()


def diversity(features: Tensor, prompts: Sequence[int]) -> NDArray[np.float64]:
    """Mean of 1 - cos over the pairs of pictures of one prompt, for each prompt that has several. [N, D], [N] -> [P]"""
    unit = normalize(features.double(), dim=-1)
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    means = []
    for members in groups.values():
        if len(members) > 1:
            cosines = unit[members] @ unit[members].T
            pairs = len(members) * (len(members) - 1)
            means.append(1 - (float(cosines.sum()) - float(cosines.trace())) / pairs)
    return np.array(means)


def nearest(samples: Tensor, training: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The training picture most like each sample, and its cosine similarity. [N, D], [M, D] -> [N], [N]"""
    similarity = normalize(samples.double(), dim=-1) @ normalize(training.double(), dim=-1).T
    values, places = similarity.max(dim=1)
    return places.numpy(), values.numpy()


def fidelity(samples: Tensor, subject: Tensor) -> NDArray[np.float64]:
    """Mean cosine similarity of each sample to the subject's pictures (Ruiz et al. 2023, sec. 4.2). [N, D], [M, D] -> [N]"""
    similarity = normalize(samples.double(), dim=-1) @ normalize(subject.double(), dim=-1).T
    return similarity.mean(dim=1).numpy()


def null_band(
    reference: Tensor, n: int, score: Callable[[Tensor, Tensor], float], repeats: int = 20, seed: int = 0
) -> tuple[float, float]:
    """What `score` says of equal distributions at `n`: lowest and highest over disjoint random parts of the reference.

    [M, D] with M >= 2n; raises ValueError otherwise.
    """
    if 2 * n > len(reference):
        raise ValueError(f"a null band at n = {n} needs {2 * n} reference pictures, there are {len(reference)}")
    chooser = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(reference), generator=chooser) for _ in range(repeats)]
    values = [score(reference[order[:n]], reference[order[n : 2 * n]]) for order in orders]
    return min(values), max(values)


class _Identity(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _factor(features: Tensor) -> Tensor:
    """A with AᵀA the covariance, of min(N, D) rows. [N, D]"""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def _distances(one: Tensor, two: Tensor) -> Tensor:
    """Not through matrix products, in which the distances of near pictures drown. [N, D], [M, D] -> [N, M]"""
    return torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each picture to its k-th neighbour; the first in the row is itself. [N]"""
    return torch.cat([_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(ROWS)])


def _within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """For each point whether it lies within the radius of some centre. [N, D], [M, D], [M] -> [N]"""
    return torch.cat([(_distances(rows, centres) <= radii).any(1) for rows in points.split(ROWS)])


def _seeded(compute: Callable[[], Any], seed: int) -> Any:
    """torchmetrics draws from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return compute()
