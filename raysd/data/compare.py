"""Pictures beside each other: duplicates, outliers, diversity. Blocks of numpy, so 20,000 pictures take seconds."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raysd.data.facts import COLOUR, TEXTURE, Facts, Floats

NEAR_BITS = 8
"""Most of the 64 bits of the perceptual hash in which near duplicates differ."""
NEAR_COLOUR = 6.0
"""Largest mean difference of their 8x8 thumbnails (0 to 255): the hash sees brightness only, a recoloured picture
is another one."""
BLOCK = 256
NEIGHBOURS = 5
OUTLIER = 7.0
"""Robust z-score from which a picture is an outlier. 3.5 is usual (Iglewicz and Hoaglin 1993); distances to
neighbours have a longer tail than a normal distribution."""
WIDTH = 0.4
"""Distance of features at which two pictures count as rather different."""
FLOOR = 0.02
FEWEST = 10
"""Below so many pictures nothing is called an outlier."""


def near_groups(facts: Sequence[Facts]) -> list[int]:
    """For each picture the smallest index of its group of exact or near duplicates (itself where it has none)."""
    group = np.arange(len(facts))
    if not len(facts):
        return []
    hashes = np.array([fact.hash for fact in facts], dtype=np.uint64)
    thumbs = np.stack([fact.thumb for fact in facts]).reshape(len(facts), -1)
    for start in range(0, len(facts), BLOCK):
        near = np.bitwise_count(hashes[start : start + BLOCK, None] ^ hashes[None, start:]) <= NEAR_BITS
        for row in range(len(near)):
            others = np.flatnonzero(near[row, row + 1 :]) + start + row + 1
            _join(group, start + row, others, thumbs)
    return group.tolist()


def _join(group: NDArray[np.intp], one: int, others: NDArray[np.intp], thumbs: NDArray[np.int16]) -> None:
    """Merge the groups of `others` with that of `one` where colours agree too; those in it already cost nothing."""
    others = others[group[others] != group[one]]
    if not len(others):
        return
    alike = others[np.abs(thumbs[others] - thumbs[one]).mean(axis=1) <= NEAR_COLOUR]
    if len(alike):
        joined = np.unique(group[[one, *alike]])
        group[np.isin(group, joined)] = joined[0]


def outlier_scores(features: Floats) -> NDArray[np.float64]:
    """[n] how odd each picture is: the larger of its robust z-scores in colour and texture. (Not in layout: a subject
    at the edge, where the others have it in the middle, is variety.)

    Each is that of the distance to the nearest neighbours: how far a picture lies from all others, in units of how far
    pictures of this set usually do. Neighbours rather than the set's centre: a set may have several themes.
    features: [n, d] of length 1. Zeros for fewer than 10 pictures.
    """
    if len(features) < FEWEST:
        return np.zeros(len(features))
    return np.max([_robust_z(_to_neighbours(features[:, part])) for part in (COLOUR, TEXTURE)], axis=0)


def _robust_z(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    middle = np.median(distance)
    # The floor: in a set of near copies any difference would else be infinitely many deviations.
    spread = max(float(np.median(np.abs(distance - middle))), FLOOR)
    return 0.6745 * (distance - middle) / spread


def _to_neighbours(part: Floats) -> NDArray[np.float64]:
    """[n] mean distance of each row to the nearest others, rows scaled to length 1."""
    n, count = len(part), min(NEIGHBOURS, len(part) - 1)
    rows = part / np.linalg.norm(part, axis=1, keepdims=True)
    distance = np.empty(n)
    for start in range(0, n, BLOCK):
        alike = rows[start : start + BLOCK] @ rows.T
        alike[np.arange(len(alike)), start + np.arange(len(alike))] = -np.inf
        nearest = np.partition(alike, n - count, axis=1)[:, n - count :]
        distance[start : start + BLOCK] = np.sqrt(np.maximum(0, 2 - 2 * nearest)).mean(axis=1)
    return distance


def diversity(features: Floats) -> float:
    """How many different pictures the set amounts to, over how many there are: near 0 for copies of one, 1 at most.

    The Vendi score (Friedman and Dieng 2023, definition 3.1) over n: the exponential of the entropy of the eigenvalues
    of K/n, with a Gaussian kernel K of width `WIDTH`. features: [n, d] of length 1, n up to a few hundred.
    """
    n = len(features)
    if n < 2:
        return float(n)
    kernel = np.exp((features @ features.T - 1).astype(np.float64) / WIDTH**2)
    values = np.linalg.eigvalsh(kernel / n)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()) / n)
