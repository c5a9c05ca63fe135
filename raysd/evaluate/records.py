"""What an evaluation found, as values, and where it is kept.

evaluations/<model>/<album>/<key>.json    <key> stands for the spec, the data and the other model
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from raysd.evaluate.judging import Score
from raysd.evaluate.losses import Losses
from raysd.evaluate.prompts import Prompt


@dataclass(frozen=True)
class Neighbour:
    """A picture and the training picture most like it: cosine similarity of their features."""

    picture: int
    """Number of the picture in its album."""
    name: str
    path: str
    """Where the training picture lay: a local path or a URL."""
    similarity: float


@dataclass(frozen=True)
class Judged:
    """What was found of one model. `album` is the folder of its pictures in the storage."""

    ref: str
    digest: str
    album: str
    scores: tuple[Score, ...]
    losses: Losses | None
    nearest: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation whole. `differences` are of `model` minus `against`."""

    key: str
    created: str
    code: str
    spec: dict[str, Any]
    features: str
    matcher: str
    prompts: tuple[Prompt, ...]
    data: dict[str, Any] | None
    model: Judged
    against: Judged | None
    differences: tuple[Score, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an end of an interval that is infinite is null."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
