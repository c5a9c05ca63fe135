"""Garbage collection: blobs that no manifest and no pin names. `pins` says why it is safe beside publishers."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raysd.lease import Lease, clock
from raysd.registry import pins
from raysd.registry.manifest import unpack
from raysd.storage import Entry, Storage

LEASE = "gc/lease.json"
BATCH = 500
TORN = 24 * 3600.0
"""Seconds after which a half-done upload is taken for a dead process's."""


@dataclass(frozen=True)
class Collected:
    """What was deleted (or would be): blobs by sha256, and their bytes; how many stay; half-done uploads removed."""

    blobs: tuple[str, ...]
    bytes: int
    kept: int
    swept: int


class Collector:
    """One collection. Manifests never change, so each is read once."""

    def __init__(self, storage: Storage, grace: float) -> None:
        self.storage, self.grace = storage, grace
        self._named: dict[str, frozenset[str]] = {}

    def dry_run(self) -> Collected:
        """What `run` would delete now. Writes nothing but the removal of pins that ended."""
        blobs = self.storage.list("blobs/sha256")
        return self._report(blobs, self._unused(blobs), 0)

    def run(self) -> Collected:
        """Delete. Raises LeaseHeld beside another collector, LeaseLost, IntegrityError for a damaged manifest."""
        with Lease.acquire(self.storage, LEASE) as lease:
            lease.start(lambda reason: None)  # `check` is asked before each deletion
            blobs = self.storage.list("blobs/sha256")
            unused = self._unused(blobs)
            gone = [entry for batch in _batches(unused) for entry in self._delete(batch, lease)]
            return self._report(blobs, gone, self.storage.sweep(max(self.grace, TORN)))

    def _unused(self, blobs: Sequence[Entry]) -> list[Entry]:
        """Old enough, and named by nothing."""
        now = self.storage.now()
        old = [entry for entry in blobs if now - entry.modified >= self.grace]
        kept = self._kept()
        return [entry for entry in old if _sha256(entry) not in kept]

    def _delete(self, batch: Sequence[Entry], lease: Lease) -> Iterator[Entry]:
        """Delete what is still unused. The letters are those of `pins`.

        Where it fails the list stays: a deletion that was not answered may yet happen.
        """
        began = clock()
        condemned = pins.condemn(self.storage, [_sha256(entry) for entry in batch], lease.token)  # C1
        kept = self._kept()  # C2, C3
        for entry in batch:
            lease.check()
            if clock() - began > pins.SPAN:
                break  # from here on a publisher may take the list for a dead collector's
            if _sha256(entry) not in kept:
                self.storage.delete(entry.path)  # C4
                yield entry
        pins.acquit(self.storage, condemned)  # C5

    def _kept(self) -> set[str]:
        """Pins first: a publisher writes its manifest before it removes its pin."""
        return pins.pinned(self.storage) | self._referenced()

    def _referenced(self) -> set[str]:
        paths = [entry.path for entry in self.storage.list("models") if entry.path.split("/")[2:3] == ["versions"]]
        fresh = [path for path in paths if path not in self._named]
        with ThreadPoolExecutor(8) as pool:
            self._named.update(zip(fresh, pool.map(self._blobs_of, fresh), strict=True))
        return {sha256 for path in paths for sha256 in self._named[path]}

    def _blobs_of(self, path: str) -> frozenset[str]:
        _, model, _, name = path.split("/")
        version = unpack(self.storage.read(path), model, int(name.removesuffix(".json")), False)
        return frozenset(file.sha256 for file in version.files)

    def _report(self, blobs: Sequence[Entry], gone: Sequence[Entry], swept: int) -> Collected:
        names = tuple(_sha256(entry) for entry in gone)
        return Collected(names, sum(entry.size for entry in gone), len(blobs) - len(gone), swept)


def _sha256(entry: Entry) -> str:
    return entry.path.rpartition("/")[2]


def _batches(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    for at in range(0, len(entries), BATCH):
        yield entries[at : at + BATCH]
