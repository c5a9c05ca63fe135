"""Messages to webhooks, kept in the database until they are taken: whoever dies meanwhile, another process tells them."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from raysd.database import Clock, Database, now
from raysd.patience import Patient
from raysd.serve.http.tables import MessageRow
from raysd.serve.predictions import LIVE
from raysd.serve.tables import PredictionRow

LEASE = 60.0
"""Seconds for which a message is left to the process that took it: longer than one try lasts."""


class Message(NamedTuple):
    """What is to be told. `id` is the same at every try; `tries` counts this one."""

    id: str
    prediction_id: str
    event: str
    base: str
    tries: int


class Outbox:
    """The messages in a database. May be shared by threads, and by processes."""

    def __init__(self, database: Database, clock: Clock = now) -> None:
        self._patient = Patient(database, clock)

    def add(self, prediction_id: str, events: Sequence[str], base: str) -> None:
        """Have these events told when they happen. Again does nothing."""

        def work(session: Session, now: float) -> None:
            for event in events:
                id = f"msg_{prediction_id}_{event}"
                if session.get(MessageRow, id) is None:
                    row = MessageRow(id=id, prediction_id=prediction_id, event=event, base=base, tries=0, due=now)
                    session.add(row)

        self._patient.write(work)

    def take(self, most: int) -> list[Message]:
        """Messages whose event has happened and whose time has come. Nobody else gets them for a minute."""

        def work(session: Session, now: float) -> list[Message]:
            due = select(MessageRow).join(PredictionRow, MessageRow.prediction_id == PredictionRow.id)
            due = due.where(MessageRow.due <= now, _happened()).order_by(MessageRow.due).limit(most)
            rows = session.scalars(due.with_for_update(skip_locked=True, of=MessageRow)).all()
            for row in rows:
                row.tries, row.due = row.tries + 1, now + LEASE
            return [Message(row.id, row.prediction_id, row.event, row.base, row.tries) for row in rows]

        return self._patient.write(work)

    def put_off(self, id: str, pause: float | None) -> None:
        """Try it again after so many seconds; None: no more."""

        def work(session: Session, now: float) -> None:
            row = session.get(MessageRow, id)
            if row is not None:
                row.due = None if pause is None else now + pause

        self._patient.write(work)


def _happened() -> ColumnElement[bool]:
    began = and_(MessageRow.event == "start", PredictionRow.status != "starting")
    return or_(began, PredictionRow.status.not_in(LIVE))
