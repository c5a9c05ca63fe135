"""What an API key may ask for, counted in the database: it holds over any number of ingresses."""

from typing import Any

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from raysd.database import take_turns
from raysd.errors import RequestError, TooMany
from raysd.serve.predictions import LIVE
from raysd.serve.tables import KeyRequestRow, KeyRow, PredictionRow

MINUTE, DAY = 60.0, 86400.0
SOON = 2.0
"""Seconds after which a prediction in flight may well have ended."""


def enforce(session: Session, now: float, key: str, pictures: int, requests: int = 1) -> None:
    """Hold requests for so many pictures together against the key's limits.

    Raises TooMany, and RequestError for what the key may never have.

    Requests of one key take turns until their transaction ends, so that many at once pass no limit. Windows slide: the
    last 60 seconds, the last 24 hours. All that was accepted counts, however it ended.
    """
    limits = session.get(KeyRow, key)
    if limits is None:
        return
    take_turns(session, f"limits {key}")
    if limits.in_flight is not None:
        _refuse_for_ever("requests in flight", limits.in_flight, requests)
        if in_flight(session, key) + requests > limits.in_flight:
            raise TooMany(f"requests in flight: this key may have {limits.in_flight}; wait for one to end", SOON)
    _hold_requests(session, now, limits, requests)
    if limits.pictures_per_day is not None:
        _refuse_for_ever("pictures in 24 hours", limits.pictures_per_day, pictures)
        drawn, oldest = _since(session, now - DAY, key, func.sum(PredictionRow.count))
        if drawn + pictures > limits.pictures_per_day:
            raise TooMany(
                f"pictures: this key may ask for {limits.pictures_per_day} in 24 hours and did for {drawn}",
                oldest + DAY - now,
            )


def count(session: Session, now: float, key: str, id: str) -> None:
    """Write down a request that draws nothing, as `id`, if the key may make it. Raises TooMany."""
    limits = session.get(KeyRow, key)
    if limits is None or limits.requests_per_minute is None:
        return
    take_turns(session, f"limits {key}")
    if session.get(KeyRequestRow, id) is not None:  # the answer to its commit was lost
        return
    _hold_requests(session, now, limits)
    session.execute(delete(KeyRequestRow).where(KeyRequestRow.key == key, KeyRequestRow.created <= now - MINUTE))
    session.add(KeyRequestRow(id=id, key=key, created=now))


def in_flight(session: Session, key: str) -> int:
    """Predictions of the key that have not ended."""
    return session.scalar(select(func.count()).where(_of(key), PredictionRow.status.in_(LIVE))) or 0


def _refuse_for_ever(what: str, most: int, wanted: int) -> None:
    if wanted > most:
        raise RequestError(f"{what}: this key may have {most}, and this asks for {wanted} at once")


def _hold_requests(session: Session, now: float, limits: KeyRow, requests: int = 1) -> None:
    if limits.requests_per_minute is None:
        return
    _refuse_for_ever("requests a minute", limits.requests_per_minute, requests)
    lately = (KeyRequestRow.key == limits.id) & (KeyRequestRow.created > now - MINUTE)
    others, first = session.execute(select(func.count(), func.min(KeyRequestRow.created)).where(lately)).one()
    drawn, oldest = _since(session, now - MINUTE, limits.id, func.count())
    if drawn + others + requests > limits.requests_per_minute:
        oldest = min(oldest if drawn else now, now if first is None else first)
        raise TooMany(f"requests: this key may make {limits.requests_per_minute} a minute", oldest + MINUTE - now)


def _since(session: Session, start: float, key: str, number: ColumnElement[Any]) -> tuple[int, float]:
    """The number over the predictions since `start`, and when the oldest of them was made."""
    oldest = func.min(PredictionRow.created)
    counted, first = session.execute(select(number, oldest).where(_of(key), PredictionRow.created > start)).one()
    return int(counted or 0), float(start if first is None else first)


def _of(key: str) -> ColumnElement[bool]:
    return (PredictionRow.owner == key) & PredictionRow.shadow_of.is_(None)
