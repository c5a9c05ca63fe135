"""All scores of one set of pictures, each with what is needed to believe it: n, an interval or a null band, and by whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from raysd.evaluate import scores
from raysd.evaluate.intervals import Interval, bootstrap_mean, wilson

Better = Literal["lower", "higher", ""]
BAND_REPEATS = 20


@dataclass(frozen=True)
class Score:
    """One number. `low` and `high` are a 95% interval; `null` is the band in which equal distributions of n fall."""

    name: str
    value: float
    n: int
    better: Better
    extractor: str
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    """Standard deviation over random subsets."""
    null: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Reference:
    """Features of the data, [M, D], of which the first `train` are of training pictures."""

    vectors: Tensor
    train: int


@dataclass(frozen=True)
class Drawn:
    """What is known of one model's pictures.

    features [N, D], logits [N, K] where the extractor classifies, images and texts [N, E] of the matcher, and which prompt
    each picture shows.
    """

    features: Tensor
    logits: Tensor | None
    images: Tensor
    texts: Tensor
    prompts: Sequence[int]


@dataclass(frozen=True)
class By:
    """Who computed the features, and who compared pictures with texts."""

    features: str
    matcher: str
    scale: float


def judge(drawn: Drawn, reference: Reference | None, by: By, seed: int) -> tuple[Score, ...]:
    """Every score that these pictures and this reference allow."""
    found = [_clip(drawn, by, seed), *_inception(drawn, by, seed), *_diversity(drawn, by, seed)]
    if reference is not None:
        found += _distances(drawn.features, reference, by, seed)
        found += _closeness(drawn.features, reference, by, seed)
    return tuple(found)


def difference(name: str, first: np.ndarray, second: np.ndarray, better: Better, by: str, seed: int) -> Score:
    """Mean of paired differences, first minus second: the same prompts and seeds, or the same held-out pictures."""
    return _with(
        bootstrap_mean(first - second, seed=seed), name, better, by, "paired; 0 in the interval: no difference seen"
    )


def _clip(drawn: Drawn, by: By, seed: int) -> Score:
    values = scores.clip_scores(drawn.images, drawn.texts)
    return _with(bootstrap_mean(values, seed=seed), "clip_score", "higher", by.matcher)


def _inception(drawn: Drawn, by: By, seed: int) -> list[Score]:
    """By the extractor's classes; without any, the prompts are the classes and similarity to them the logits."""
    if drawn.logits is not None:
        mean, deviation = scores.inception_score(drawn.logits, seed)
        found = Score("inception_score", mean, len(drawn.logits), "higher", by.features, deviation=deviation)
        return [found]
    classes = len(set(drawn.prompts))
    if classes < 2:
        return []
    first = [list(drawn.prompts).index(prompt) for prompt in sorted(set(drawn.prompts))]
    texts = normalize(drawn.texts[first], dim=-1)
    mean, deviation = scores.inception_score(by.scale * normalize(drawn.images, dim=-1) @ texts.T, seed)
    note = f"over the {classes} prompts as classes: compares on these prompts only"
    return [Score("inception_score", mean, len(drawn.images), "higher", by.matcher, deviation=deviation, note=note)]


def _diversity(drawn: Drawn, by: By, seed: int) -> list[Score]:
    values = scores.diversity(drawn.features, drawn.prompts)
    if not len(values):
        return []
    return [
        _with(bootstrap_mean(values, seed=seed), "diversity", "", by.features, "n prompts; 0: copies of one picture")
    ]


def _distances(features: Tensor, reference: Reference, by: By, seed: int) -> list[Score]:
    """FID at an n of which the reference has twice as many, so that its null band is at the same n."""
    found: list[Score] = []
    real = reference.vectors
    n = min(len(features), len(real) // 2)
    if n >= 2:
        chooser = torch.Generator().manual_seed(seed)
        chosen = [torch.randperm(len(each), generator=chooser)[:n] for each in (real, features)]
        value = scores.fid(real[chosen[0]], features[chosen[1]])
        null = scores.null_band(real, n, scores.fid, BAND_REPEATS, seed)
        note = f"n below the {real.shape[1]} features: read KID" if n < real.shape[1] else ""
        found.append(Score("fid", value, n, "lower", by.features, null=null, note=note))
    if min(len(features), len(real)) >= 2:
        mean, deviation = scores.kid(real, features, seed)
        kid = Score("kid", mean, min(len(features), len(real)), "lower", by.features, deviation=deviation)
        if n >= 2:
            null = scores.null_band(real, n, _whole_kid, BAND_REPEATS, seed)
            kid = replace(kid, null=null, note="" if kid.n == n else f"null band at n = {n}")
        found.append(kid)
    if min(len(features), len(real)) > 3:
        precision, recall = scores.precision_recall(real, features)
        found.append(_share(precision, "precision", by))
        found.append(_share(recall, "recall", by))
    return found


def _closeness(features: Tensor, reference: Reference, by: By, seed: int) -> list[Score]:
    train, held_out = reference.vectors[: reference.train], reference.vectors[reference.train :]
    found = [
        _with(
            bootstrap_mean(scores.fidelity(features, reference.vectors), seed=seed), "subject_fidelity", "", by.features
        )
    ]
    if len(train):
        values = scores.nearest(features, train)[1]
        note = "1: a copy"
        if len(held_out):
            note += f"; held-out pictures: {scores.nearest(held_out, train)[1].mean():.3f}"
        found.append(_with(bootstrap_mean(values, seed=seed), "nearest_training", "", by.features, note))
    return found


def _whole_kid(one: Tensor, two: Tensor) -> float:
    return scores.kid(one, two, size=len(one), subsets=1)[0]


def _share(hits: np.ndarray, name: str, by: By) -> Score:
    return _with(wilson(int(hits.sum()), len(hits)), name, "higher", by.features)


def _with(found: Interval, name: str, better: Better, extractor: str, note: str = "") -> Score:
    sure = found.n > 1
    low, high = (found.low, found.high) if sure else (None, None)
    return Score(name, found.value, found.n, better, extractor, low, high, note=note)
