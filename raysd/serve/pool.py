"""The models that one replica holds: bases, and the LoRA versions on them, which share the base's weights.

Whatever is in use is counted and stays; what is not is let go when room is wanted, least recently used first.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from raysd.errors import IntegrityError
from raysd.references import Located, identity, locate
from raysd.registry import Pin, Registry, signing
from raysd.serve.predictor import Predictor
from raysd.serve.scheduler import Busy
from raysd.serve.threads import in_passing
from raysd.storage import Storage

PATIENCE = 60.0
"""Seconds for which a load waits for something to become unused."""


@dataclass
class Entry:
    """A base, or an adapter on one. `users` may not be touched without the pool's lock."""

    pin: Pin | None
    users: int = 0
    used: float = field(default_factory=time.monotonic)


@dataclass
class Base(Entry):
    predictor: Predictor | None = None
    adapters: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A version that may be drawn with, for as long as it is in use."""

    predictor: Predictor
    adapter: str | None


class Pool:
    """At most `bases` bases, with at most `adapters` adapters on each. Shared by threads.

    `open_base(located)` makes a predictor of a base; `loaded(ref, seconds, adapter)` is told of each load. With `signers`
    (public keys), versions that none of them signed are refused.
    """

    def __init__(
        self,
        storage: Storage,
        open_base: Callable[[Located], Predictor],
        bases: int = 2,
        adapters: int = 16,
        loaded: Callable[[str, float, bool], None] | None = None,
        signers: Sequence[str] = (),
    ):
        self.storage, self._open, self._signers = storage, open_base, signers
        self._most_bases, self._most_adapters = bases, adapters
        self._loaded = loaded or (lambda ref, seconds, adapter: None)
        self._bases: dict[str, Base] = {}
        self._known: dict[str, Located] = {}  # by digest: a version's files, verified once a load
        self._changed = threading.Condition()
        self._loading = threading.Lock()  # one load at a time: two would need twice the memory

    @contextmanager
    def use(self, ref: str, digest: str) -> Iterator[Ready]:
        """The version of that digest, loaded if need be; it stays until the block ends.

        Raises NotFound, RequestError (withdrawn), IntegrityError (not the bytes or not the digest asked for), and Busy
        where everything that is loaded is in use.
        """
        base, adapter = self._take(ref, digest)
        assert base.predictor is not None
        try:
            yield Ready(base.predictor, digest if adapter is not None else None)
        finally:
            with self._changed:
                for entry in (base, adapter):
                    if entry is not None:
                        entry.users -= 1
                        entry.used = time.monotonic()
                self._changed.notify_all()

    def loaded(self) -> list[str]:
        """Digests of the adapters and keys of the bases that are here."""
        with self._changed:
            return [*self._bases, *(name for base in self._bases.values() for name in base.adapters)]

    def _take(self, ref: str, digest: str) -> tuple[Base, Entry | None]:
        found = self._held(digest)
        if found is not None:
            return found
        with self._loading:
            found = self._held(digest)
            if found is not None:
                return found
            in_passing(lambda: self._load(ref, digest))
            found = self._held(digest)
            assert found is not None  # nothing is let go but by loads, and this is the only one
            return found

    def _load(self, ref: str, digest: str) -> None:
        located = self._locate(ref, digest)
        self._known[digest] = located
        self._load_base(located)
        if located.lora is not None:
            self._load_adapter(located, digest)

    def _held(self, digest: str) -> tuple[Base, Entry | None] | None:
        """What is loaded already, counted as used."""
        with self._changed:
            located = self._known.get(digest)
            base = self._bases.get(str(located.folder)) if located else None
            if located is None or base is None:
                return None
            adapter = base.adapters.get(digest) if located.lora is not None else None
            if located.lora is not None and adapter is None:
                return None
            for entry in (base, adapter):
                if entry is not None:
                    entry.users += 1
            return base, adapter

    def _locate(self, ref: str, digest: str) -> Located:
        located = locate(ref, self.storage)
        actual = located.version.digest if located.version else identity(located.folder)
        if actual != digest:
            raise IntegrityError(f"{ref}: is {actual[:12]}, and {digest[:12]} was asked for")
        if self._signers:
            if located.version is None:
                raise IntegrityError(f"{ref}: is not in the registry, and this service takes signed versions alone")
            signing.check(self.storage, located.version, self._signers)
        return located

    def _load_base(self, located: Located) -> None:
        key = str(located.folder)
        if key in self._bases:
            return
        self._make_room(lambda: self._bases, self._most_bases, self._drop_base)
        began = time.monotonic()
        pin = self._pin(located) if located.lora is None else None
        base = Base(pin, predictor=self._open(located))
        with self._changed:
            self._bases[key] = base
        self._loaded(located.ref, time.monotonic() - began, False)

    def _load_adapter(self, located: Located, digest: str) -> None:
        base = self._bases[str(located.folder)]
        if digest in base.adapters:
            return
        with self._changed:
            base.users += 1  # while room is made for its adapter
        try:
            self._make_room(lambda: base.adapters, self._most_adapters, lambda name: self._drop_adapter(base, name))
            began = time.monotonic()
            assert base.predictor is not None
            assert located.lora is not None
            base.predictor.backend.add_adapter(digest, located.lora)
            with self._changed:
                base.adapters[digest] = Entry(self._pin(located))
            self._loaded(located.ref, time.monotonic() - began, True)
        finally:
            with self._changed:
                base.users -= 1

    def _make_room(
        self, entries: Callable[[], "dict[str, Base] | dict[str, Entry]"], most: int, drop: Callable[[str], None]
    ) -> None:
        """Let go of what is unused until one more fits. Raises Busy where nothing becomes unused."""
        end = time.monotonic() + PATIENCE
        while (name := self._spare(entries, most, end)) is not None:
            drop(name)

    def _spare(self, entries: Callable[[], "dict[str, Base] | dict[str, Entry]"], most: int, end: float) -> str | None:
        """Which has to go: unused, and since longest. None if one more fits."""
        with self._changed:
            while len(here := entries()) >= most:
                idle = [(entry.used, name) for name, entry in here.items() if entry.users == 0]
                if idle:
                    return min(idle)[1]
                if not self._changed.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    raise Busy(f"all {most} models that fit are in use: try again later")
            return None

    def _drop_base(self, key: str) -> None:
        with self._changed:
            base = self._bases[key]
            if base.users:
                return  # taken since it was chosen
            del self._bases[key]
        for entry in (base, *base.adapters.values()):
            _unpin(entry)

    def _drop_adapter(self, base: Base, name: str) -> None:
        with self._changed:
            entry = base.adapters[name]
            if entry.users:
                return
            del base.adapters[name]
        assert base.predictor is not None
        base.predictor.backend.remove_adapter(name)
        _unpin(entry)

    def _pin(self, located: Located) -> Pin | None:
        return Registry(self.storage).pin(located.version, "served") if located.version else None


def _unpin(entry: Entry) -> None:
    if entry.pin is not None:
        entry.pin.release()
