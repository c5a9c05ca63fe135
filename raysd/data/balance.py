"""Final captions, and how evenly captions and folders are represented."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

PLACE = "{caption}"


class Group(BaseModel):
    """Pictures that share a caption or a folder."""

    model_config = ConfigDict(frozen=True)
    key: str
    count: int
    weight: float
    """How often each of its pictures is to be drawn, so that all groups come up equally often; 1 on average."""


class Balance(BaseModel):
    """The groups along one axis, largest first."""

    model_config = ConfigDict(frozen=True)
    axis: Literal["caption", "folder"]
    groups: tuple[Group, ...]

    @property
    def ratio(self) -> float:
        """Pictures in the largest group over those in the smallest."""
        return self.groups[0].count / self.groups[-1].count


def is_template(prompt: str | None) -> bool:
    """Whether a prompt takes in each picture's own caption."""
    return prompt is not None and PLACE in prompt


def caption_of(own: str | None, prompt: str | None) -> str:
    """The caption that is trained: the picture's own, the prompt, or the one in the other; "" if there is none.

    A template round a missing caption loses the place for it and the comma before it.
    """
    if prompt is None:
        return own or ""
    if own or not is_template(prompt):
        return prompt.replace(PLACE, own or "").strip()
    rest = " ".join(prompt.replace(PLACE, "").split())
    return re.sub(r"(\s*,)+", ",", rest).strip(" ,;:-")


def weights(keys: Sequence[str]) -> list[float]:
    """For each picture n / (number of groups * size of its group): equal chances for groups, 1 on average."""
    counts = Counter(keys)
    return [len(keys) / (len(counts) * counts[key]) for key in keys]


def balances(captions: Sequence[str], folders: Sequence[str]) -> tuple[Balance, ...]:
    """Along captions and along folders, where there is more than one group and not each picture is its own."""
    found = (_balance("caption", captions), _balance("folder", [folder or "." for folder in folders]))
    return tuple(balance for balance in found if len(balance.groups) > 1 and balance.groups[0].count > 1)


def _balance(axis: Literal["caption", "folder"], keys: Sequence[str]) -> Balance:
    counts, weight = Counter(keys), dict(zip(keys, weights(keys), strict=True))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Balance(axis=axis, groups=tuple(Group(key=k, count=n, weight=round(weight[k], 6)) for k, n in ordered))
