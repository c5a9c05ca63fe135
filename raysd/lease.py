"""One holder per run, with a fencing token that grows with every holder.

How two holders at once are kept out, whatever their clocks say:

- Taking, renewing and releasing are compare-and-swaps of one object, so of two that reach for it one wins.
- A holder counts from the *start* of its last successful renewal, by a clock that also runs while the machine sleeps,
  and gives up after 2/3 of the ttl. Another host may take the lease no sooner than a whole ttl after the object was
  written, both times by the *store's* clock. So the old holder has stopped before the new one starts, if its process
  runs at all.
- A process that was frozen and wakes up late has lost the token: `check_fence` refuses what it writes.
- On the holder's own host its process is looked at instead: one that is gone, or whose pid belongs to another one now,
  is succeeded at once; one that is there, be it frozen, has to be ended first.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

from raysd.errors import IntegrityError, LeaseHeld, LeaseLost, NotFound, RaysdError, Stale
from raysd.storage import Storage

TTL = 30.0
RENEWALS = 6
"""Renewals in one ttl."""
GIVE_UP = 2 / 3
"""Share of the ttl without a renewal after which the holder stops."""

_ours: set[str] = set()
"""Nonces of the leases that this process holds: whether its own pid is alive says nothing about them."""


@dataclass(frozen=True)
class Record:
    """The stored object. `machine` tells apart reboots and containers of one host name; times are epoch seconds."""

    token: int
    nonce: str
    host: str
    machine: str
    pid: int
    started: float
    ttl: float
    renewed: float
    renewals: int
    released: bool


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, or held it last. `renewed` is in epoch seconds by the store's clock."""

    host: str
    pid: int
    token: int
    renewed: float
    alive: bool


class Lease:
    """A lease that this process holds; a context manager that releases it."""

    def __init__(self, storage: Storage, path: str, record: Record, tag: str, began: float) -> None:
        # A renewal that is tried again for longer than the time between two keeps the next one waiting.
        self._storage = storage.patient(min(storage.deadline, record.ttl / RENEWALS))
        self._path, self._record, self._tag, self._began = path, record, tag, began
        self._lost: str | None = None
        self._trouble = ""  # why the last renewal failed
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @classmethod
    def acquire(cls, storage: Storage, path: str, *, ttl: float = TTL) -> "Lease":
        """Take the lease. Raises LeaseHeld naming the holder, StorageError where the store cannot compare-and-swap."""
        storage.require_swap()
        found = _read(storage, path)
        record, tag = found if found else (None, None)
        if record is not None:
            _refuse_if_held(storage, path, record)
        began = clock()
        mine = _mine(record.token + 1 if record else 1, ttl)
        _ours.add(mine.nonce)  # before another thread can find it in the store
        try:
            return cls(storage, path, mine, storage.swap(path, _pack(mine), tag), began)
        except RaysdError as error:
            _ours.discard(mine.nonce)
            if isinstance(error, Stale):
                raise _held(storage, path) from None
            raise

    @property
    def token(self) -> int:
        return self._record.token

    @property
    def nonce(self) -> str:
        """This holding's own name: tokens begin again at 1 where the lease's object was deleted."""
        return self._record.nonce

    def start(self, on_lost: Callable[[str], None]) -> None:
        """Renew in the background. When it is lost, call `on_lost` with the reason, once, from another thread."""
        # Two threads: a renewal may hang in the store, and giving up must not wait for it.
        for work in (self._renew_often, lambda: self._watch(on_lost)):
            threading.Thread(target=work, name=f"lease {self._path}", daemon=True).start()

    def renew(self) -> None:
        """Renew now. Raises LeaseLost, or StorageError where the store did not answer (the lease may still be held)."""
        with self._lock:
            self._check()
            began = clock()
            record = replace(self._record, renewed=time.time(), renewals=self._record.renewals + 1)
            try:
                self._tag = self._storage.swap(self._path, _pack(record), self._tag)
            except Stale:
                self._tag = self._storage.swap(self._path, _pack(record), self._own_tag())
            self._record, self._began = record, began

    def check(self) -> None:
        """Raises LeaseLost where the lease was lost or is too old to rely on. Asks the clock, not the store."""
        self._check()
        if clock() - self._began >= self._record.ttl * GIVE_UP:
            raise LeaseLost(f"{self._path}: the lease could not be renewed in time{self._trouble}, another may take it")

    def release(self) -> None:
        """Let the next one in at once. If the store does not answer, the lease runs out by itself."""
        self._stop.set()
        with self._lock, suppress(RaysdError):
            self._check()
            # The object stays: its token has to go on growing.
            self._storage.swap(self._path, _pack(replace(self._record, released=True)), self._own_tag())
        self._lose(f"{self._path}: the lease was released")

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _renew_often(self) -> None:
        while not self._stop.wait(self._record.ttl / RENEWALS):
            try:
                self.renew()
                self._trouble = ""
            except LeaseLost as lost:
                return self._lose(str(lost))
            except RaysdError as error:  # the watch gives up when this goes on for too long
                self._trouble = f" ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"

    def _watch(self, on_lost: Callable[[str], None]) -> None:
        """Look often, rather than sleep until the end: a machine that slept meanwhile has to notice at once."""
        limit = self._record.ttl * GIVE_UP
        while not self._stop.wait(limit / 40):
            silent = clock() - self._began
            if silent >= limit:
                self._lose(
                    f"{self._path}: the lease could not be renewed for {silent:.0f} s{self._trouble}, another may take it"
                )
            if self._lost is not None:
                self._stop.set()
                on_lost(self._lost)

    def _lose(self, reason: str) -> None:
        """The first reason stands."""
        self._lost = self._lost or reason
        _ours.discard(self._record.nonce)

    def _check(self) -> None:
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def _own_tag(self) -> str:
        """The tag of the stored lease while it is ours, even where a renewal of ours arrived and its answer did not."""
        found = _read(self._storage, self._path)
        if found is None:
            self._lose(f"{self._path}: the lease was deleted")
        elif found[0].nonce != self._record.nonce:
            self._lose(f"{self._path}: the lease was taken by {found[0].host}, process {found[0].pid}")
        self._check()
        assert found is not None
        return found[1]


def check_fence(storage: Storage, path: str, token: int, nonce: str) -> None:
    """Raises LeaseLost unless the holding of that token and nonce is the one that holds the lease.

    Called right before a write that makes others' work visible. What is written between this check and a takeover must
    carry the token in its name, or be create-only, to stay apart from the successor's.
    """
    found = _read(storage, path)
    if found is None:
        raise LeaseLost(f"{storage.url}/{path}: the lease is gone, so token {token} may not write")
    record = found[0]
    if record.nonce != nonce or record.released:
        state = "was released" if record.nonce == nonce else f"went to {record.host}, process {record.pid}"
        raise LeaseLost(f"{storage.url}/{path}: the lease {state}, so token {token} may not write")


def holder(storage: Storage, path: str) -> Holder | None:
    """Who holds the lease or held it last; None where there never was one or it was released."""
    found = _read(storage, path)
    if found is None or found[0].released:
        return None
    record = found[0]
    age = _age(storage, path)
    return Holder(record.host, record.pid, record.token, storage.now() - age, _alive(record, age))


def clock() -> float:
    """Seconds that never jump and go on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _mine(token: int, ttl: float) -> Record:
    started = _started(os.getpid()) or 0.0
    return Record(
        token, uuid.uuid4().hex, platform.node(), _machine(), os.getpid(), started, ttl, time.time(), 0, released=False
    )


def _refuse_if_held(storage: Storage, path: str, record: Record) -> None:
    if not record.released:
        age = _age(storage, path)
        if _alive(record, age):
            raise LeaseHeld(_sentence(storage, path, record, age))


def _held(storage: Storage, path: str) -> LeaseHeld:
    """Somebody was faster: say who, if they are still there."""
    found = _read(storage, path)
    if found is None:
        return LeaseHeld(f"{storage.url}/{path}: another process is just taking this: try again")
    return LeaseHeld(_sentence(storage, path, found[0], _age(storage, path)))


def _sentence(storage: Storage, path: str, record: Record, age: float) -> str:
    wait = "" if record.machine == _machine() else f" (free {record.ttl:.0f} s after its last renewal if it died)"
    return (
        f"{storage.url}/{path}: held by {record.host}, process {record.pid}, renewed {max(age, 0):.0f} s ago: "
        f"stop that process or wait for it{wait}"
    )


def _alive(record: Record, age: float) -> bool:
    """Whether the holder may still be working: by its process on its own machine, elsewhere by the lease's age."""
    if record.machine == _machine():
        if record.pid == os.getpid() and record.started == _started(record.pid):
            return record.nonce in _ours
        return record.started == _started(record.pid)
    return age < record.ttl + 2.0  # stores give whole seconds


def _age(storage: Storage, path: str) -> float:
    """Seconds since the lease was last written, by the store's clock."""
    with suppress(NotFound):
        written = storage.stat(path).modified  # before `now`: a renewal between the two makes it older, never younger
        return storage.now() - written
    return 0.0


def _machine() -> str:
    """One kernel, one pid namespace: where a pid means the same process."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    if len(parts) < 3:
        parts.append(str(int(psutil.boot_time())))
    return " ".join(parts)


def _started(pid: int) -> float | None:
    """When a process began, None if there is none (one that only waits to be reaped is none)."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        with suppress(OSError):
            # Ticks since boot: psutil's create_time moves when the wall clock is set, and the holder would look dead.
            return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return process.create_time()
    except psutil.NoSuchProcess:
        return None


def _read(storage: Storage, path: str) -> tuple[Record, str] | None:
    try:
        data, tag = storage.read_tagged(path)
    except NotFound:
        return None
    try:
        return Record(**json.loads(data)), tag
    except (ValueError, TypeError):
        raise IntegrityError(f"{storage.url}/{path}: not a lease: delete it if nothing runs") from None


def _pack(record: Record) -> bytes:
    return json.dumps(asdict(record)).encode()
