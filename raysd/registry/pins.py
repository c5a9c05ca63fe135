"""How publishing and collecting stay out of each other's way.

A publisher may rely on a blob that it did not upload itself, and a collector may just be about to delete that blob.
Each announces itself before it looks at the other:

    publisher                                       collector
    P1  write a pin that names its blobs            C1  write the list of blobs it is about to delete ("condemned")
    P2  read the condemned list; while one of its   C2  read the pins
        blobs is on it, wait                        C3  read the manifests
    P3  upload the blobs that are not there         C4  delete what neither names
    P4  write the manifest                          C5  clear the list
    P5  remove the pin

The store is linearizable, so either P1 comes before C2, or C2 before P1 and so C1 before P2. In the first case the
collector finds the pin, or P5 came before C2: then P4 came before C3, and it finds the manifest (pins are read before
manifests for this reason). In the second the publisher sees the list and looks for its blobs (P3) only after C5.
So no blob is deleted between P3 and the manifest, nor after it.

One collector runs at a time, under a lease whose token stands in the list: a late one can neither announce a batch
over a successor's nor clear it.

Time enters in two places. A pin counts while it is younger than its ttl, by the store's clock, so that a killed
publisher's pin ends; a living one renews it, and knows by its own clock when it could not: then the pin is `broken`,
and the publisher does all of it again under a new one, also where the manifest is written already.
A collector that dies leaves its list. It stops deleting `SPAN` after C1; a publisher that has seen the same list for
twice as long clears it and goes on. What is left is a collector that is frozen between looking at its clock and sending
one request, for longer than that.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from raysd.errors import IntegrityError, LeaseLost, NotFound, RaysdError, Stale
from raysd.lease import clock
from raysd.storage import Storage

PIN_TTL = 3600.0
SPAN = 60.0
CONDEMNED = "gc/condemned.json"
_RESOLUTION = 2.0  # seconds: stores stamp whole ones


class Pin:
    """Keeps blobs from collection until it is released or its process dies. A context manager."""

    def __init__(self, storage: Storage, blobs: Iterable[str], why: str, ttl: float = PIN_TTL) -> None:
        self._storage, self._ttl = storage, ttl
        self._path = f"pins/{uuid.uuid4().hex}.json"
        body = {"blobs": sorted(blobs), "ttl": ttl, "why": why, "host": platform.node(), "pid": os.getpid()}
        self._data = json.dumps(body).encode()
        self._broken = False
        self._stop = threading.Event()
        self._began = clock()
        self._storage.write(self._path, self._data)
        self._thread = threading.Thread(target=self._renew_often, name=self._path, daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        """Whether there was a time since the pin was made in which a collector may have overlooked it."""
        return self._broken or clock() - self._began >= self._ttl

    def release(self) -> None:
        """Remove the pin. If the store does not answer, it ends by itself."""
        self._stop.set()
        self._thread.join()
        with suppress(RaysdError):
            self._storage.delete(self._path)

    def __enter__(self) -> "Pin":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _renew_often(self) -> None:
        while not self._stop.wait(self._ttl / 6):
            began = clock()
            try:
                self._storage.write(self._path, self._data)
            except RaysdError:  # the next turn may succeed; `broken` says whether it came too late
                continue
            self._broken = self.broken  # had the former one ended before this one was there?
            self._began = began


def pinned(storage: Storage) -> set[str]:
    """The blobs that pins hold now. Removes pins that ended. Raises StorageError."""
    blobs: set[str] = set()
    now = storage.now()  # before the listing, so that no pin looks older than it was when it was listed
    for entry in storage.list("pins"):
        try:
            body = json.loads(storage.read(entry.path))
        except NotFound:
            continue
        except ValueError:
            raise IntegrityError(f"{storage.url}/{entry.path}: a damaged pin: delete it if nothing publishes") from None
        if now - entry.modified < body["ttl"] + _RESOLUTION:
            blobs.update(body["blobs"])
        else:
            storage.delete(entry.path)
    return blobs


def await_collector(storage: Storage, blobs: set[str]) -> None:
    """Return once no collector is about to delete any of `blobs` (P2 above). They must be pinned already."""
    seen, since = "", clock()
    while True:
        condemned = read_condemned(storage)
        if blobs.isdisjoint(condemned.blobs):
            return
        if condemned.tag != seen:
            seen, since = condemned.tag or "", clock()
        elif clock() - since > 2 * SPAN:
            acquit(storage, condemned)  # its collector is dead
        time.sleep(0.1)


class Condemned(NamedTuple):
    """The list of blobs about to be deleted, the lease token of its collector, and its tag (None: there is no list)."""

    blobs: frozenset[str]
    token: int
    tag: str | None


def read_condemned(storage: Storage) -> Condemned:
    try:
        data, tag = storage.read_tagged(CONDEMNED)
    except NotFound:
        return Condemned(frozenset(), 0, None)
    body = json.loads(data)
    return Condemned(frozenset(body["blobs"]), body["token"], tag)


def condemn(storage: Storage, blobs: Iterable[str], token: int) -> Condemned:
    """Announce a batch (C1). Raises LeaseLost where a later collector announced one already."""
    names = frozenset(blobs)
    while True:
        current = read_condemned(storage)
        if current.token > token:
            raise LeaseLost(f"{storage.url}/{CONDEMNED}: another collection began: this one ends")
        with suppress(Stale):
            return Condemned(names, token, _announce(storage, names, token, current.tag))


def acquit(storage: Storage, condemned: Condemned) -> None:
    """Clear a batch (C5), unless another was announced meanwhile."""
    with suppress(Stale):
        _announce(storage, frozenset(), condemned.token, condemned.tag)


def _announce(storage: Storage, blobs: frozenset[str], token: int, tag: str | None) -> str:
    body = {"blobs": sorted(blobs), "token": token, "nonce": uuid.uuid4().hex}  # the nonce makes each list's tag new
    return storage.swap(CONDEMNED, json.dumps(body).encode(), tag)
