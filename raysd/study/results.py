"""What the reviewers of a study found: how often each version won, how surely, and whether they agree."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from sqlalchemy import select

from raysd.database import Database
from raysd.evaluate.intervals import wilson
from raysd.study.studies import find
from raysd.study.tables import Pair, Side, Study, Vote
from raysd.words import shown

SIDES: tuple[Side, Side] = ("first", "second")


def results(database: Database, name: str) -> dict[str, Any]:
    """The results of a study, as plain values. Raises NotFound.

    A win rate is (wins + ties / 2) / votes, in [0, 1], with its Wilson 95% interval over votes, which are taken as
    independent; both are None without votes. `alpha` is None where it is undefined. `left_rate` is the share of the
    left side among the votes that were no ties: far from 1/2, a reviewer did not look.
    """
    study, pairs = find(database, name)
    with database.reading() as session:
        votes = session.scalars(select(Vote).join(Pair).where(Pair.study_id == study.id)).all()
    by_pair: dict[int, list[str]] = {}
    for vote in votes:
        by_pair.setdefault(vote.pair_id, []).append(vote.choice)
    return {
        "study": study.name,
        "pairs": len(pairs),
        "votes": len(votes),
        "ties": sum(vote.choice == "tie" for vote in votes),
        "versions": [_version(study, side, votes) for side in SIDES],
        "reviewers": _reviewers(votes),
        "agreement": {
            "alpha": krippendorff_alpha(by_pair.values()),
            "pairs": sum(len(choices) > 1 for choices in by_pair.values()),
        },
    }


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Agreement of any number of raters on nominal values: 1 complete, 0 as by chance, below 0 worse.

    `units` are the values given to each unit, in any order; a unit with fewer than two does not count. None where no
    unit has two, or all values are the same: chance would agree then too. With o_ck the coincidences of values c and k
    and n_c their sums, alpha = 1 - (n - 1) * sum(o_ck) / sum(n_c * n_k), both over c != k (Krippendorff 2011,
    Computing Krippendorff's Alpha-Reliability, section C).
    """
    totals: Counter[Hashable] = Counter()
    disagreement = 0.0
    for values in units:
        if len(values) < 2:
            continue
        counts = Counter(values)
        totals.update(counts)
        disagreement += sum(n * (len(values) - n) for n in counts.values()) / (len(values) - 1)
    n = totals.total()
    expected = sum(count * (n - count) for count in totals.values())
    return 1 - (n - 1) * disagreement / expected if expected else None


def table(body: dict[str, Any]) -> RenderableType:
    """Results for a terminal. Names are text in it, never markup or escape codes."""
    versions = Table("version", "wins", "losses", "ties", "win rate", "95% interval", box=None)
    for row in body["versions"]:
        counts = (str(row[field]) for field in ("wins", "losses", "ties"))
        interval = "" if row["interval"] is None else "{:.1%} to {:.1%}".format(*row["interval"])
        versions.add_row(Text(shown(row["ref"], 200)), *counts, _percent(row["win_rate"]), interval)
    reviewers = Table("reviewer", "votes", "for first", "for second", "ties", "left side", box=None)
    for row in body["reviewers"]:
        counts = (str(row[field]) for field in ("votes", "first", "second", "ties"))
        reviewers.add_row(Text(shown(row["reviewer"])), *counts, _percent(row["left_rate"]))
    alpha, common = body["agreement"]["alpha"], body["agreement"]["pairs"]
    agreement = "undefined" if alpha is None else f"{alpha:.3f}"
    title = Text(f"{body['study']}: {body['votes']} votes on {body['pairs']} pairs")
    last = Text(f"agreement (Krippendorff's alpha) {agreement}, over {common} pairs with two votes or more")
    return Group(title, Text(), versions, Text(), reviewers, Text(), last)


def _version(study: Study, side: Side, votes: Sequence[Vote]) -> dict[str, Any]:
    counts = Counter(vote.choice for vote in votes)
    wins, ties, losses = counts[side], counts["tie"], counts[SIDES[side == "first"]]
    score = wins + ties / 2
    return {
        "ref": getattr(study, f"{side}_ref"),
        "digest": getattr(study, f"{side}_digest"),
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "win_rate": score / len(votes) if votes else None,
        "interval": _interval(score, len(votes)) if votes else None,
    }


def _interval(score: float, votes: int) -> list[float]:
    found = wilson(score, votes)
    return [found.low, found.high]


def _reviewers(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    rows = []
    for name in sorted({vote.reviewer for vote in votes}):
        own = [vote for vote in votes if vote.reviewer == name]
        counts = Counter(vote.choice for vote in own)
        decided = len(own) - counts["tie"]
        left = sum(vote.choice == vote.shown_left for vote in own)
        row = {"reviewer": name, "votes": len(own), "first": counts["first"], "second": counts["second"]}
        rows.append({**row, "ties": counts["tie"], "left_rate": left / decided if decided else None})
    return rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
