"""API keys: what lets a caller in. Only their SHA-256 is kept, which nobody can turn back into 256 random bits."""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from raysd import database as sql
from raysd.database import Clock, Database
from raysd.errors import NotFound, RequestError
from raysd.patience import Patient
from raysd.serve.tables import KeyRow
from raysd.words import shown

Role = Literal["generate", "feedback", "train", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
PREFIX = "raysd_"
KNOWN_FOR = 3.0
"""Seconds for which a checker trusts what it read: a revoked key is refused after that at the latest."""
UNKNOWN_FOR = 1.0
"""Seconds after which an unknown key is looked for again: wrong keys cannot make it read more often."""


@dataclass(frozen=True)
class Limits:
    """What a key may ask for; None is no limit. `limits.enforce` holds requests against it."""

    requests_per_minute: int | None = None
    pictures_per_day: int | None = None
    in_flight: int | None = None
    """Predictions that have not ended."""


@dataclass(frozen=True)
class Key:
    """A key without its secret. `owner` is who holds it; times are epoch seconds."""

    id: str
    owner: str
    roles: tuple[Role, ...]
    limits: Limits
    created: float
    revoked: float | None

    def may(self, role: Role) -> bool:
        """Whether it has the role; `admin` has all."""
        return role in self.roles or "admin" in self.roles


class Keys:
    """The keys in a database. Waits for a database that is away, as `Queue` does."""

    def __init__(self, database: Database, *, clock: Clock = sql.now) -> None:
        self._patient = Patient(database, clock)

    def create(self, owner: str, roles: Collection[str], limits: Limits = Limits()) -> tuple[Key, str]:
        """A new key and its secret, which is never seen again. Raises RequestError naming what is wrong."""
        _check(owner, roles, limits)
        id, secret = sql.new_id(), PREFIX + secrets.token_urlsafe(32)

        def work(session: Session, now: float) -> Key:
            row = session.get(KeyRow, id)  # there if the answer to its commit was lost
            if row is None:
                row = KeyRow(id=id, digest=_digest(secret), owner=owner, created=now, **vars(limits))
                row.roles = [role for role in ROLES if role in roles]
                session.add(row)
            return _key(row)

        return self._patient.write(work), secret

    def list(self) -> list[Key]:
        """All keys, the newest first, also the revoked ones."""
        newest = select(KeyRow).order_by(KeyRow.created.desc(), KeyRow.id)
        return self._patient.read(lambda session: [_key(row) for row in session.scalars(newest)])

    def revoke(self, id: str) -> Key:
        """Refuse a key from now on, for good. Again does nothing. Raises NotFound."""

        def work(session: Session, now: float) -> Key:
            row = session.get(KeyRow, id, with_for_update=True) if sql.storable(id) else None
            if row is None:
                raise NotFound(f"key {shown(id)}: there is none of that id; raysd keys list shows them")
            row.revoked = row.revoked or now
            return _key(row)

        return self._patient.write(work)

    def live(self) -> dict[str, Key]:
        """The keys that are not revoked, by digest."""
        valid = select(KeyRow).where(KeyRow.revoked.is_(None))
        return self._patient.read(lambda session: {row.digest: _key(row) for row in session.scalars(valid)})


class Checker:
    """Says whose a key is. May be shared by threads; reads all live keys every few seconds, however many it checks."""

    def __init__(self, keys: Keys, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock, self._lock = keys, clock, threading.Lock()
        self._known: Mapping[str, tuple[str, Key]] = {}
        self._read_at = float("-inf")

    def check(self, secret: str) -> Key | None:
        """The key, or None where it is unknown or revoked. Raises StorageError where the database stays away."""
        digest = _digest(secret)
        return self._match(digest, KNOWN_FOR) or self._match(digest, UNKNOWN_FOR)

    def _match(self, digest: str, oldest: float) -> Key | None:
        found = self._fresh(oldest).get(digest[:16])
        return found[1] if found is not None and hmac.compare_digest(found[0], digest) else None

    def _fresh(self, oldest: float) -> Mapping[str, tuple[str, Key]]:
        """The keys by the beginning of their digest, as they were at most `oldest` seconds ago."""
        with self._lock:
            now = self._clock()
            if now - self._read_at > oldest:
                self._known = {digest[:16]: (digest, key) for digest, key in self._keys.live().items()}
                self._read_at = now
            return self._known


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _check(owner: str, roles: Collection[str], limits: Limits) -> None:
    if not 1 <= len(owner.strip()) <= 100 or not owner.isprintable():
        raise RequestError("owner: 1 to 100 printable characters that say who holds the key")
    unknown = sorted(set(roles) - set(ROLES))
    if unknown or not roles:
        raise RequestError(f"role {shown(', '.join(unknown)) or 'missing'}: one or more of {', '.join(ROLES)}")
    for name, value in vars(limits).items():
        if value is not None and not 1 <= value < 2**31:
            raise RequestError(f"{name}: {value}: a number from 1, or none for no limit")


def _key(row: KeyRow) -> Key:
    roles = tuple(role for role in ROLES if role in row.roles)
    limits = Limits(row.requests_per_minute, row.pictures_per_day, row.in_flight)
    return Key(row.id, row.owner, roles, limits, row.created, row.revoked)
