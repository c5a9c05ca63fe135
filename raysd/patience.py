"""Waiting for a database that is away for a moment, as PostgreSQL is while it restarts."""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from raysd.database import Clock, Database, now
from raysd.errors import StorageError

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds for which a call is made again while the database cannot be reached."""
PASSING = ("08", "40", "53300", "57P")
"""Beginnings of SQLSTATEs that pass: no connection, a deadlock, too many connections, a server that stops or starts."""


class Patient:
    """Transactions of a database, made again while it cannot be reached. `work` must be harmless to repeat."""

    def __init__(self, database: Database, clock: Clock = now) -> None:
        self._database, self._clock = database, clock

    def read(self, work: Callable[[Session], T]) -> T:
        """What `work` returns for a session of queries alone."""

        def attempt() -> T:
            with self._database.reading() as session:
                return work(session)

        return patiently(attempt)

    def write(self, work: Callable[[Session, float], T]) -> T:
        """What `work` returns for a session that is committed, and the time in epoch seconds."""

        def attempt() -> T:
            with self._database.writing() as session:
                return work(session, self._clock(session))

        return patiently(attempt)


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, made again with growing pauses while the database cannot be reached. Raises its last error.

    A commit whose answer was lost is made again too, so `call` must be harmless to repeat.
    """
    end, pause = time.monotonic() + PATIENCE, 0.05
    while True:
        try:
            return call()
        except StorageError as error:
            wait = pause * random.uniform(0.5, 1.5)
            if not passing(error) or time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        pause = min(2 * pause, 1.0)


def passing(error: StorageError) -> bool:
    """Whether the database may be there again in a moment. SQLite has waited for its lock already, and has no server."""
    cause: Any = error.__cause__.orig if isinstance(error.__cause__, DBAPIError) else None
    if not hasattr(cause, "sqlstate"):
        return False
    state = cause.sqlstate
    return state is None or state.startswith(PASSING)
