"""The one door to SQL: the engine, sessions, and migrations that run by themselves. SQLite by default, PostgreSQL by URL.

Tables are declared on `Base` by the module whose subject they are; each change of them is a file in raysd/migrations.
"""

import base64
import fcntl
import hashlib
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.orm import DeclarativeBase, Session

from raysd.errors import RequestError, StorageError
from raysd.storage import Storage
from raysd.storage.failures import explained

MIGRATIONS = Path(__file__).parent / "migrations"
FILE = "raysd.db"
BUSY = 30.0
"""Seconds for which a writer waits for another one on SQLite."""
SILENT = {
    "connect_timeout": 10,
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""How long PostgreSQL may say nothing (libpq's words: milliseconds, else seconds) where the URL does not say: a host that
is cut off closes no connection."""
MIGRATION_LOCK = 0x7261797364
"""The advisory lock on PostgreSQL that a migration holds: "raysd" in ASCII."""
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
Clock = Callable[[Session], float]
"""Epoch seconds, asked within a transaction."""
REMEDY = "set RAYSD_DATABASE to sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME"


class Base(DeclarativeBase):
    """What every table is declared on. Constraints have names, so that a migration can change them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class Database:
    """One database: `url`, or RAYSD_DATABASE, or the file raysd.db in the root of a local storage.

    May be shared by threads. Raises RequestError where there is no URL and the storage is remote, or the URL is not
    one of SQLite or PostgreSQL; StorageError where the database cannot be reached. No message holds the password.
    """

    def __init__(self, url: str | None, storage: Storage) -> None:
        self._url = _parsed(url or os.environ.get("RAYSD_DATABASE") or _beside(storage))
        self._engine = _engine(self._url)
        self._writer = self._engine.execution_options(raysd_write=True)

    def __repr__(self) -> str:
        return f"Database({self.name!r})"

    @property
    def name(self) -> str:
        """The file, or the URL as it may be shown: without password and options."""
        if self._url.get_backend_name() == "sqlite":
            return str(self._url.database)
        return self._url.set(query={}).render_as_string(hide_password=True)

    def migrate(self) -> None:
        """Bring the tables to what this code expects, in one transaction. Processes that start at once take turns.

        Raises RequestError where the database is newer than this code.
        """
        with self._failures(DBAPIError), self._turn(), self._writer.begin() as connection:
            if self._url.get_backend_name() == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            self._upgrade(connection)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for queries alone."""
        with self._failures(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that is committed at the end, or rolled back by an exception. On SQLite writers take turns."""
        with self._failures(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._engine.dispose()

    def _upgrade(self, connection: Connection) -> None:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise RequestError(
                f"database {self.name}: not of this version of raysd ({error}): upgrade raysd, or {REMEDY}"
            ) from None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """On SQLite, the lock file beside the database. Changing to WAL fails at once where another is at it."""
        if self._url.get_backend_name() != "sqlite":
            yield
            return
        path = Path(f"{self._url.database}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise explained(error, str(path), str(path.parent)) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with closing(self._engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA journal_mode=WAL")
            yield

    @contextmanager
    def _failures(self, every: type[DBAPIError] = OperationalError) -> Iterator[None]:
        """Failures of the database itself leave as StorageError, with `every` further kind; the rest as they are."""
        try:
            yield
        except (DBAPIError, sqlite3.Error, NoConnection) as error:
            kinds = (OperationalError, InterfaceError, sqlite3.Error, NoConnection, every)
            if isinstance(error, kinds) or type(error) is DatabaseError:
                raise StorageError(f"database {self.name}: {self._reason(error)}: {REMEDY}") from error
            raise

    def _reason(self, error: DBAPIError | sqlite3.Error | NoConnection) -> str:
        cause = error.orig if isinstance(error, DBAPIError) else error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        secrets = (self._url.password, *_texts(self._url.query.get("password")))
        for secret in (str(value) for value in secrets if value):
            reason = reason.replace(secret, "***")
        return reason


def upsert(session: Session, table: type[Base], values: Mapping[str, Any], key: Sequence[str]) -> None:
    """Insert a row, or set `values` in the one that has the same `key` (columns under a unique constraint)."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values)
    changed = {name: statement.excluded[name] for name in values if name not in key}
    session.execute(statement.on_conflict_do_update(index_elements=list(key), set_=changed))


def take_turns(session: Session, name: str) -> None:
    """Wait for other transactions that named the same, and hold them up until this one ends. SQLite's writers do so anyway."""
    if session.get_bind().dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def now(session: Session) -> float:
    """Epoch seconds by the clock that all who use the database share: its own, or on SQLite this machine's."""
    if session.get_bind().dialect.name != "postgresql":
        return time.time()
    return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def storable(text: str) -> bool:
    """Whether both databases hold it: no NUL and no half characters, which JSON can spell."""
    return _UNSTORABLE.search(text) is None


def new_id() -> str:
    """26 characters of a-z and 2-7 that nobody guesses: 128 random bits."""
    return base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


def _beside(storage: Storage) -> str:
    path = storage.local_path(FILE)
    if path is None:
        raise RequestError(f"{storage.url}: a database cannot lie in this store: {REMEDY}")
    return URL.create("sqlite", database=str(path)).render_as_string()


def _parsed(given: str) -> URL:
    """The URL with its driver. What cannot be read is not repeated: it may hold a password."""
    try:
        url = make_url(given)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise RequestError(f"RAYSD_DATABASE: not a URL: {REMEDY}") from None
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or url.database in (None, "", ":memory:"):
        raise RequestError(f"RAYSD_DATABASE: neither a file of SQLite nor PostgreSQL: {REMEDY}")
    assert url.database is not None
    return url.set(drivername="sqlite+pysqlite", database=str(Path(url.database).expanduser().absolute()))


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY})
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
        return engine
    try:
        silent = {name: value for name, value in SILENT.items() if name not in url.query}
        # A server that was restarted is noticed before the query.
        return create_engine(url, pool_pre_ping=True, connect_args=silent)
    except ModuleNotFoundError:
        raise RequestError("PostgreSQL needs its driver: pip install 'raysd[postgres]'") from None


def _on_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # else the driver begins transactions when it likes, and not before DDL
    connection.execute("PRAGMA foreign_keys=ON")


def _on_begin(connection: Connection) -> None:
    """A writer takes its lock at once: one that read first would be refused, not made to wait, if another wrote."""
    writes = connection.get_execution_options().get("raysd_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _texts(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else (value or [])
