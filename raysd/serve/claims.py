"""How a prediction goes from hand to hand, each step within one transaction.

starting -> processing -> succeeded | failed | canceled        processing -> starting: given back
starting -> canceled | aborted                                 processing -> processing: the lease ended, another claims
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, tuple_, update
from sqlalchemy.orm import Session

from raysd.feedback.generations import bury, record
from raysd.feedback.tables import GenerationRow
from raysd.serve.predictions import LIVE, Claim, Picture, Status
from raysd.serve.rows import generation
from raysd.serve.tables import PredictionRow

LEASE = 15.0
"""Seconds for which a claim holds unless it is renewed."""
MOST_ATTEMPTS = 5
"""Claims after which a prediction that none of them ended is given up."""
AT_ONCE = 500
"""Predictions that one transaction expires."""
LATE = "its deadline passed"


def take(
    session: Session,
    now: float,
    worker: str,
    model: str,
    id: str | None,
    most: int,
    ticket: str,
    but: Collection[str] = (),
) -> Sequence[PredictionRow]:
    """Claim the oldest that are free, shadows after all others, and none of `but`.

    What was claimed with the same ticket is what is claimed: its answer was lost.
    """
    of_model = PredictionRow.model == model
    free = and_(_free(now), PredictionRow.id.not_in(but))
    mine = and_(PredictionRow.status == "processing", PredictionRow.ticket == ticket)
    if id is not None:
        wanted = select(PredictionRow).where(PredictionRow.id == id, of_model, or_(mine, free))
    else:
        rows = session.scalars(select(PredictionRow).where(of_model, mine)).all()
        if rows:
            return rows
        wanted = select(PredictionRow).where(of_model, free)
    shadows_last = PredictionRow.shadow_of.is_not(None), PredictionRow.created, PredictionRow.id
    wanted = wanted.order_by(*shadows_last).limit(most)
    rows = session.scalars(wanted.with_for_update(skip_locked=True)).all()
    for row in rows:
        if row.ticket == ticket:
            continue
        row.status, row.worker, row.ticket, row.lease_end = "processing", worker, ticket, now + LEASE
        row.token, row.attempt, row.started = row.token + 1, row.attempt + 1, row.started or now
    return rows


def oldest(session: Session, now: float, model: str) -> str | None:
    """The id of the prediction, shadows aside, that has been free for a claim longest."""
    free = select(PredictionRow.id).where(PredictionRow.model == model, _free(now), PredictionRow.shadow_of.is_(None))
    return session.scalar(free.order_by(PredictionRow.created, PredictionRow.id).limit(1))


def renew(session: Session, now: float, claims: Sequence[Claim]) -> set[str]:
    """Make the leases last; the ids of those that are still held and not asked to stop."""
    held = tuple_(PredictionRow.id, PredictionRow.token).in_([(claim.id, claim.token) for claim in claims])
    statement = update(PredictionRow).where(held, PredictionRow.status == "processing").values(lease_end=now + LEASE)
    rows = session.execute(statement.returning(PredictionRow.id, PredictionRow.cancel_requested)).all()
    return {id for id, cancel_requested in rows if not cancel_requested}


def finish(
    session: Session, now: float, claim: Claim, pictures: Sequence[Picture], metrics: dict[str, Any], keep: float | None
) -> bool:
    """Succeed with these pictures, which are kept for `keep` seconds (None: until they are deleted)."""
    row = _locked(session, claim)
    if row is None or row.status != "processing":
        return row is not None and row.status == "succeeded"
    kept_until = None if keep is None else now + keep
    drawn = [generation(row, picture, now, kept_until) for picture in pictures]
    record(session, now, drawn)
    if row.deleted is not None:
        bury(session, now, drawn)
    row.metrics = metrics
    end(row, now, "succeeded")
    if pictures:
        _drop_prompt(row)
        row.user = None  # their generations hold both, so that deleting them deletes all that there is of a person
    return True


def stop(session: Session, now: float, claim: Claim, status: Status, error: str | None = None) -> bool:
    """Fail, or cancel what the holder was asked to cancel."""
    row = _locked(session, claim)
    if row is None or row.status != "processing":
        return row is not None and row.status == status
    end(row, now, status, error)
    return True


def release(session: Session, now: float, claim: Claim, *, counts: bool = False) -> Sequence[PredictionRow]:
    """Give back what was not begun or cannot be finished: it waits again. `counts`: it was an attempt all the same.

    Returns the row if it was to be cancelled, and ended so.
    """
    row = _locked(session, claim)
    if row is None or row.status != "processing":
        return []
    if row.cancel_requested:
        end(row, now, "canceled")
        return [row]
    row.status, row.worker, row.ticket, row.lease_end = "starting", None, None, None
    row.attempt -= not counts
    return []


def cancel(session: Session, now: float, row: PredictionRow) -> Sequence[PredictionRow]:
    """Stop what has not ended, and erase its shadows, of which nobody knows. Returns the rows that this ended."""
    if row.status not in LIVE:
        return []
    shadows = _shadows(session, row)
    _erase(session, now, shadows)
    return _stop(now, [row, *shadows])


def delete(session: Session, now: float, row: PredictionRow) -> Sequence[PredictionRow]:
    """Stop it, and erase it with its shadows. Returns the rows that this ended."""
    rows = [row, *_shadows(session, row)]
    _erase(session, now, rows)
    return _stop(now, rows)


def expire(session: Session, now: float) -> Sequence[PredictionRow]:
    """End what met its deadline, what its last holder left though it was to be cancelled, and what nobody gets done."""
    late = and_(PredictionRow.status.in_(LIVE), PredictionRow.deadline <= now)
    left = and_(PredictionRow.status == "processing", PredictionRow.lease_end < now)
    hopeless = and_(left, or_(PredictionRow.cancel_requested, PredictionRow.attempt >= MOST_ATTEMPTS))
    due = select(PredictionRow).where(or_(late, hopeless)).limit(AT_ONCE).with_for_update(skip_locked=True)
    rows = session.scalars(due).all()
    for row in rows:
        _fence(row)
        if row.deadline is not None and row.deadline <= now:
            end(row, now, "aborted" if row.started is None else "canceled", LATE)
        elif row.cancel_requested:
            end(row, now, "canceled")
        else:
            end(row, now, "failed", f"given up: claimed {row.attempt} times, and nobody finished it")
    return rows


def end(row: PredictionRow, now: float, status: Status, error: str | None = None) -> None:
    row.status, row.completed, row.lease_end, row.error = status, now, None, error
    if row.withhold or row.shadow_of is not None:  # what a client sees and may delete has the prompt of its shadow
        _drop_prompt(row)


def _free(now: float) -> ColumnElement[bool]:
    waiting = PredictionRow.status == "starting"
    left = and_(
        PredictionRow.status == "processing",
        PredictionRow.lease_end < now,
        PredictionRow.attempt < MOST_ATTEMPTS,
        PredictionRow.cancel_requested.is_(False),
    )
    in_time = or_(PredictionRow.deadline.is_(None), PredictionRow.deadline > now)
    return and_(or_(waiting, left), in_time)


def _locked(session: Session, claim: Claim) -> PredictionRow | None:
    """The row of a claim, or None where another one came after it. It may have ended."""
    row = session.get(PredictionRow, claim.id, with_for_update=True)
    return row if row is not None and row.token == claim.token else None


def _shadows(session: Session, row: PredictionRow) -> Sequence[PredictionRow]:
    return session.scalars(select(PredictionRow).where(PredictionRow.shadow_of == row.id).with_for_update()).all()


def _stop(now: float, rows: Sequence[PredictionRow]) -> Sequence[PredictionRow]:
    """End at once what nobody works on, which is returned; the holders of others are asked to."""
    live = [row for row in rows if row.status in LIVE]
    for row in live:
        row.cancel_requested = True
        if row.lease_end is None or row.lease_end < now:
            _fence(row)
            end(row, now, "canceled")
    return [row for row in live if row.status not in LIVE]


def _erase(session: Session, now: float, rows: Sequence[PredictionRow]) -> None:
    """Make tombstones of predictions and of their generations. What is still drawn is buried when it is finished."""
    if not rows:
        return
    for row in rows:
        _drop_prompt(row)
        row.drawing = {**row.drawing, "image": None, "mask": None}
        row.user, row.deleted = None, row.deleted or now
    of_these = GenerationRow.prediction_id.in_([row.id for row in rows])
    bury(session, now, session.scalars(select(GenerationRow).where(of_these)).all())


def _fence(row: PredictionRow) -> None:
    """Another than its holder ends it: who held it is told so, and counts no end of his own."""
    row.token += 1


def _drop_prompt(row: PredictionRow) -> None:
    row.drawing = {**row.drawing, "prompt": "", "negative": ""}
