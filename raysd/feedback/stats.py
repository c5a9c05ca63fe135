"""What users think of each version, and how surely: thumbs, stars, and how often it was preferred."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from sqlalchemy import func, select

from raysd.database import Database
from raysd.evaluate.intervals import Interval, bootstrap_mean, wilson
from raysd.feedback.opinions import Opinion, by_id, opinions, preferences
from raysd.feedback.tables import GenerationRow
from raysd.words import shown

Version = tuple[str, str, str]
"""Model, reference, digest."""


@dataclass
class _Found:
    generations: int = 0
    opinions: list[Opinion] = field(default_factory=list)
    wins: int = 0
    losses: int = 0
    ties: int = 0


def stats(database: Database, model: str | None = None) -> list[dict[str, Any]]:
    """A row a version, as plain values, of a model or of all.

    `thumbs.share` is that of thumbs up, with its Wilson 95% interval; `stars.mean` has a bootstrap interval, null with
    fewer than two; `pairs.win_rate` is (wins + ties / 2) / pairs against all other versions, with a Wilson interval. What is
    computed from nothing is null. Opinions of one user on several generations are taken as independent.
    """
    found: dict[Version, _Found] = {}
    with database.reading() as session:
        version = (GenerationRow.model, GenerationRow.ref, GenerationRow.digest)
        drawn = select(*version, func.count()).where(GenerationRow.shadow_of.is_(None)).group_by(*version)
        if model is not None:
            drawn = drawn.where(GenerationRow.model == model)
        for name, ref, digest, count in session.execute(drawn):
            found[name, ref, digest] = _Found(count)
        said, chosen = opinions(session, model), preferences(session, model)
        ids = [*said, *(id for pair in chosen for id in (pair.left, pair.right))]
        versions = {id: (row.model, row.ref, row.digest) for id, row in by_id(session, ids).items()}
    for id, given in said.items():
        found.setdefault(versions[id], _Found()).opinions += given
    for pair in chosen:
        sides = versions[pair.left], versions[pair.right]
        if sides[0] == sides[1]:
            continue
        for id, side in zip((pair.left, pair.right), sides, strict=True):
            entry = found.setdefault(side, _Found())
            entry.ties += pair.chosen is None
            entry.wins += pair.chosen == id
            entry.losses += pair.chosen not in (None, id)
    return [_row(version, found[version]) for version in sorted(found)]


def table(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """Statistics for a terminal. Names are text in it, never markup or escape codes."""
    body = Table(
        "version", "drawn", "up", "down", "share up", "stars", "mean", "pairs", "win rate", "reports", box=None
    )
    for row in rows:
        thumbs, stars, pairs = row["thumbs"], row["stars"], row["pairs"]
        body.add_row(
            Text(shown(row["ref"], 60)),
            *(str(number) for number in (row["generations"], thumbs["up"], thumbs["down"])),
            _said(thumbs["share"], thumbs["interval"], "{:.0%}"),
            str(stars["n"]),
            _said(stars["mean"], stars["interval"], "{:.2f}"),
            str(pairs["wins"] + pairs["losses"] + pairs["ties"]),
            _said(pairs["win_rate"], pairs["interval"], "{:.0%}"),
            str(row["reports"]),
        )
    return Group(body, Text("in brackets: 95% intervals"))


def _row(version: Version, found: _Found) -> dict[str, Any]:
    thumbs = Counter(opinion.thumb for opinion in found.opinions if opinion.thumb is not None)
    stars = [opinion.stars for opinion in found.opinions if opinion.stars is not None]
    pairs = found.wins + found.losses + found.ties
    share = wilson(thumbs["up"], thumbs.total()) if thumbs else None
    mean = bootstrap_mean(stars) if stars else None
    rate = wilson(found.wins + found.ties / 2, pairs) if pairs else None
    model, ref, digest = version
    won = {"wins": found.wins, "losses": found.losses, "ties": found.ties}
    tags = Counter(tag for opinion in found.opinions for tag in opinion.tags)
    return {
        "model": model,
        "ref": ref,
        "digest": digest,
        "generations": found.generations,
        "thumbs": {
            "up": thumbs["up"],
            "down": thumbs["down"],
            "share": share and share.value,
            "interval": _ends(share),
        },
        "stars": {"n": len(stars), "mean": mean and mean.value, "interval": _ends(mean)},
        "pairs": {**won, "win_rate": rate and rate.value, "interval": _ends(rate)},
        "tags": dict(tags.most_common()),
        "reports": sum(opinion.reported for opinion in found.opinions),
    }


def _ends(interval: Interval | None) -> list[float] | None:
    if interval is None or math.isinf(interval.low):
        return None
    return [interval.low, interval.high]


def _said(value: float | None, interval: list[float] | None, form: str) -> str:
    if value is None:
        return ""
    ends = "" if interval is None else " [{}, {}]".format(*(form.format(end) for end in interval))
    return form.format(value) + ends
