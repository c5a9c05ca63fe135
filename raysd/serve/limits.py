"""What an API key may ask for, counted over the predictions in the database: it holds over any number of ingresses."""

from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from raysd.database import take_turns
from raysd.errors import TooMany
from raysd.serve.predictions import LIVE
from raysd.serve.tables import KeyRow, PredictionRow

MINUTE, DAY = 60.0, 86400.0
SOON = 2.0
"""Seconds after which a prediction in flight may well have ended."""


def enforce(session: Session, now: float, key: str, pictures: int) -> None:
    """Hold a request for so many pictures against the key's limits. Raises TooMany.

    Requests of one key take turns until their transaction ends, so that many at once pass no limit. Windows slide: the
    last 60 seconds, the last 24 hours. All that was accepted counts, however it ended.
    """
    limits = session.get(KeyRow, key)
    if limits is None:
        return
    take_turns(session, f"limits {key}")
    if limits.in_flight is not None and in_flight(session, key) >= limits.in_flight:
        raise TooMany(f"requests in flight: this key may have {limits.in_flight}; wait for one to end", SOON)
    if limits.requests_per_minute is not None:
        requests, oldest = _since(session, now - MINUTE, key, func.count())
        if requests >= limits.requests_per_minute:
            raise TooMany(f"requests: this key may make {limits.requests_per_minute} a minute", oldest + MINUTE - now)
    if limits.pictures_per_day is not None:
        drawn, oldest = _since(session, now - DAY, key, func.sum(PredictionRow.count))
        if drawn + pictures > limits.pictures_per_day:
            raise TooMany(
                f"pictures: this key may ask for {limits.pictures_per_day} in 24 hours and did for {drawn}",
                oldest + DAY - now,
            )


def in_flight(session: Session, key: str) -> int:
    """Predictions of the key that have not ended."""
    return session.scalar(select(func.count()).where(_of(key), PredictionRow.status.in_(LIVE))) or 0


def _since(session: Session, start: float, key: str, number: ColumnElement[Any]) -> tuple[int, float]:
    """The number over the predictions since `start`, and when the oldest of them was made."""
    oldest = func.min(PredictionRow.created)
    counted, first = session.execute(select(number, oldest).where(_of(key), PredictionRow.created > start)).one()
    return int(counted or 0), float(start if first is None else first)


def _of(key: str) -> ColumnElement[bool]:
    return (PredictionRow.owner == key) & PredictionRow.shadow_of.is_(None)
