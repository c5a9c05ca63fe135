"""What users think, each counted once: of a generation, their last word; of a pair, their first."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from raysd.feedback.tables import Choice, FeedbackRow, GenerationRow, Thumb


@dataclass
class Opinion:
    """Of one user on one generation. A later thumb replaces an earlier one, later stars the earlier; tags add up."""

    thumb: Thumb | None = None
    stars: int | None = None
    tags: set[str] = field(default_factory=set)
    reported: bool = False


@dataclass(frozen=True)
class Preference:
    """Of one user on two generations, by their ids."""

    left: str
    right: str
    choice: Choice

    @property
    def chosen(self) -> str | None:
        """The generation that was found better; None for a tie."""
        return {"left": self.left, "right": self.right, "tie": None}[self.choice]


def opinions(session: Session, model: str | None = None) -> dict[str, list[Opinion]]:
    """By generation, of a model or of all."""
    rows = select(FeedbackRow).join(GenerationRow, FeedbackRow.generation_id == GenerationRow.id)
    if model is not None:
        rows = rows.where(GenerationRow.model == model)
    found: dict[str, dict[str, Opinion]] = {}
    for row in session.scalars(rows.order_by(FeedbackRow.created, FeedbackRow.id)).yield_per(1000):
        opinion = found.setdefault(str(row.generation_id), {}).setdefault(row.user, Opinion())
        opinion.thumb, opinion.stars = row.thumb or opinion.thumb, row.stars or opinion.stars
        opinion.tags.update(row.tags)
        opinion.reported |= row.report is not None
    return {generation: list(by_user.values()) for generation, by_user in found.items()}


def preferences(session: Session, model: str | None = None) -> list[Preference]:
    """In the order in which they were given. A second choice does not count: by then the user was told who drew what."""
    rows = select(FeedbackRow).join(GenerationRow, FeedbackRow.left_id == GenerationRow.id)
    if model is not None:
        rows = rows.where(GenerationRow.model == model)
    found: dict[tuple[str, frozenset[str]], Preference] = {}
    for row in session.scalars(rows.order_by(FeedbackRow.created, FeedbackRow.id)).yield_per(1000):
        if row.left_id is not None and row.right_id is not None and row.choice is not None:
            key = row.user, frozenset((row.left_id, row.right_id))
            found.setdefault(key, Preference(row.left_id, row.right_id, row.choice))
    return list(found.values())


def by_id(session: Session, ids: Iterable[str]) -> dict[str, GenerationRow]:
    """The generations of these ids."""
    wanted = sorted(set(ids))
    found: dict[str, GenerationRow] = {}
    for start in range(0, len(wanted), 500):
        part = select(GenerationRow).where(GenerationRow.id.in_(wanted[start : start + 500]))
        found.update((row.id, row) for row in session.scalars(part))
    return found
