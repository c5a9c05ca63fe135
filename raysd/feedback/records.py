"""Feedback as it is kept: once, tied to what was drawn, and no more of one user than anyone says in a day."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session, aliased

from raysd import database as sql
from raysd.database import Clock, Database
from raysd.errors import NotFound, RequestError, TooMany
from raysd.feedback.tables import FeedbackRow, GenerationRow
from raysd.feedback.wire import Feedback
from raysd.idempotency import Seal, seal
from raysd.patience import Patient

MOST_A_DAY, MOST_A_DAY_OF_KEY = 500, 50_000
"""Of one user, and of all users of an API key, in any 24 hours."""
Admit = Callable[[Session, float, str, str], None]
"""Counts a request, now, of an API key, under an id of its own. Raises TooMany."""
DAY = 86400.0


@dataclass(frozen=True)
class Kept:
    """Feedback that is kept: whether it was `new`, and for a pair the versions that drew the two."""

    id: str
    new: bool
    left: str | None = None
    right: str | None = None


class Records:
    """The feedback in a database. May be shared by threads. Waits for a database that is away, as `Queue` does."""

    def __init__(
        self,
        database: Database,
        *,
        most_a_day: int = MOST_A_DAY,
        most_of_key: int = MOST_A_DAY_OF_KEY,
        admit: Admit | None = None,
        clock: Clock = sql.now,
    ) -> None:
        self._patient, self._most, self._most_of_key = Patient(database, clock), most_a_day, most_of_key
        self._admit = admit

    def keep(self, said: Feedback, *, user: str, owner: str | None = None, key: str | None = None) -> Kept:
        """Keep what a user said; with the same `key` once. A choice ends the blindness of its two pictures.

        `user` stands for a person, `owner` is the API key's id. Raises NotFound (no such generation, or deleted),
        TooMany (the cap of the user or of the key), RequestError (a key that was used for something else; a pair never
        shown together).
        """
        mark = seal(key, said.model_dump_json(), "feedback", owner, user) if key is not None else None
        id = sql.new_id()

        def work(session: Session, now: float) -> Kept:
            sql.take_turns(session, f"feedback {user}")
            former = _former(session, id, mark)
            if former is not None:
                return Kept(former.id, former.id == id, *_versions(session, former))
            drawn = _drawn(session, said)
            _hold(session, now, FeedbackRow.user == user, self._most, "user")
            if owner is not None:
                _hold(session, now, FeedbackRow.owner == owner, self._most_of_key, "key")
                if self._admit is not None:
                    self._admit(session, now, owner, id)
            row = _row(id, said, now, drawn, mark)
            row.user, row.owner = user, owner
            session.add(row)
            if said.pair is not None:
                for generation in drawn:
                    generation.blind = False
            return Kept(id, True, *_versions(session, row))

        return self._patient.write(work)

    def find(self, model: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """The newest feedback, of a model or of all, as plain values."""
        one, left, right = aliased(GenerationRow), aliased(GenerationRow), aliased(GenerationRow)
        joined = select(FeedbackRow, one.ref, left.ref, right.ref).outerjoin(one, FeedbackRow.generation_id == one.id)
        joined = joined.outerjoin(left, FeedbackRow.left_id == left.id).outerjoin(
            right, FeedbackRow.right_id == right.id
        )
        if model is not None:
            joined = joined.where(or_(one.model == model, left.model == model, right.model == model))
        newest = joined.order_by(FeedbackRow.created.desc(), FeedbackRow.id).limit(limit)
        return self._patient.read(lambda session: [_said(*row) for row in session.execute(newest)])


def _hold(session: Session, now: float, whose: ColumnElement[bool], most: int, who: str) -> None:
    lately = whose & (FeedbackRow.created > now - DAY)
    count, oldest = session.execute(select(func.count(), func.min(FeedbackRow.created)).where(lately)).one()
    if count >= most:
        raise TooMany(f"feedback: one {who} gives at most {most} in 24 hours", oldest + DAY - now)


def _former(session: Session, id: str, mark: Seal | None) -> FeedbackRow | None:
    """What was kept for this call, or for the same key before. Raises RequestError where that was something else."""
    same = [FeedbackRow.id == id, *([FeedbackRow.seal_name == mark.name] if mark else [])]
    former = session.scalars(select(FeedbackRow).where(or_(*same))).one_or_none()
    if former is not None and mark is not None and former.seal_body != mark.body:
        raise RequestError("Idempotency-Key: was used for other feedback; give this one a key of its own")
    return former


def _drawn(session: Session, said: Feedback) -> Sequence[GenerationRow]:
    """What it is about: one generation, or the left and the right one. Held, so that none is deleted meanwhile."""
    ids = [said.pair.left, said.pair.right] if said.pair is not None else [str(said.generation)]
    found = select(GenerationRow).where(GenerationRow.id.in_(ids)).order_by(GenerationRow.id).with_for_update()
    rows = {row.id: row for row in session.scalars(found)}
    for id in ids:
        if id not in rows:
            raise NotFound(f"generation {id}: there is none of that id")
        if rows[id].deleted is not None:
            raise NotFound(f"generation {id}: was deleted")
    drawn = [rows[id] for id in ids]
    if any(row.blind for row in drawn) and len({row.comparison for row in drawn}) > 1:
        raise RequestError("pair: these two were never shown together")
    return drawn


def _row(id: str, said: Feedback, now: float, drawn: Sequence[GenerationRow], mark: Seal | None) -> FeedbackRow:
    return FeedbackRow(
        id=id,
        generation_id=said.generation,
        thumb=said.thumb,
        stars=said.stars,
        tags=sorted(set(said.tags or ())),
        text=said.text,
        report=said.report,
        left_id=said.pair and said.pair.left,
        right_id=said.pair and said.pair.right,
        choice=said.pair and said.pair.choice,
        blind=all(row.blind for row in drawn),
        seal_name=mark and mark.name,
        seal_body=mark and mark.body,
        created=now,
    )


def _versions(session: Session, row: FeedbackRow) -> tuple[str | None, str | None]:
    """Who drew left and right, where it is a choice."""
    left, right = (session.get_one(GenerationRow, id).ref if id else None for id in (row.left_id, row.right_id))
    return left, right


def _said(row: FeedbackRow, version: str | None, left: str | None, right: str | None) -> dict[str, Any]:
    told = {name: getattr(row, name) for name in ("thumb", "stars", "tags", "text", "report")}
    pair = None
    if row.choice is not None:
        sides = {"left": row.left_id, "left_version": left, "right": row.right_id, "right_version": right}
        pair = {**sides, "choice": row.choice, "blind": row.blind}
    about = {"generation": row.generation_id, "version": version}
    return {"id": row.id, "created": row.created, "user": row.user, **about, **told, "pair": pair}
