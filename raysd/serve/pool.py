"""The models that one replica holds: bases, and the LoRA versions on them, which share the base's weights.

Whatever is in use is counted and stays; what is not is let go when room is wanted, least recently used first. Versions
that are withdrawn while they are here are found by a look at the registry every few seconds, not at each request.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from raysd.errors import IntegrityError, RaysdError, RequestError
from raysd.references import Located, identity, locate
from raysd.registry import Pin, Registry, signing
from raysd.registry.records import parse, withdrawn_path
from raysd.serve.predictor import Predictor
from raysd.serve.scheduler import Busy
from raysd.serve.threads import in_passing
from raysd.storage import Storage

log = logging.getLogger(__name__)
REVIEW = 2.0
"""Seconds between looks at what was withdrawn."""
GIB = 2**30
PATIENCE = 60.0
"""Seconds for which a load waits for something to become unused."""


@dataclass
class Entry:
    """A base, or an adapter on one, of `size` bytes. `users` may not be touched without the pool's lock."""

    pin: Pin | None
    size: int = 0
    users: int = 0
    used: float = field(default_factory=time.monotonic)


@dataclass
class Base(Entry):
    predictor: Predictor | None = None
    adapters: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Idle:
    """Something unused. The smallest goes first: unused for longest, an adapter before the base that it is on."""

    used: float
    whole: bool
    drop: Callable[[], None] = field(compare=False)


@dataclass(frozen=True)
class Ready:
    """A version that may be drawn with, for as long as it is in use."""

    predictor: Predictor
    adapter: str | None


class Pool:
    """At most `bases` bases, with at most `adapters` adapters on each, of `memory` bytes together. Shared by threads.

    What a model takes is reckoned by its files (`weight`); without `memory` there is no bound but those by number.
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
        memory: float | None = None,
    ):
        self.storage, self._open, self._signers = storage, open_base, signers
        self._most_bases, self._most_adapters, self._memory = bases, adapters, memory
        self._loaded = loaded or (lambda ref, seconds, adapter: None)
        self._bases: dict[str, Base] = {}
        self._known: dict[str, Located] = {}  # what is loaded, by digest: its files, verified once a load
        self._changed = threading.Condition()
        # One load at a time: two would need twice the memory. What waits for room lets others load meanwhile.
        self._loading = threading.Lock()
        self._closed = threading.Event()

    def watch(self) -> None:
        """Look every `REVIEW` seconds at what was withdrawn, until `close`."""
        threading.Thread(target=self._watch, name="withdrawn", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def review(self) -> None:
        """Draw no more with what is here and was withdrawn since: to be used again it would have to be loaded.

        What is in use is drawn to its end. Where the store does not answer all stays as it is.
        """
        with self._changed:
            known = dict(self._known)
        for digest, located in known.items():
            if any(self.storage.exists(withdrawn_path(*version)) for version in _versions(located)):
                log.warning("%s was withdrawn", located.ref)
                with self._changed:
                    self._known.pop(digest, None)

    @contextmanager
    def use(self, ref: str, digest: str) -> Iterator[Ready]:
        """The version of that digest, loaded if need be; it stays until the block ends.

        Raises NotFound, RequestError (withdrawn, or larger than the memory there is), IntegrityError (not the bytes or
        not the digest asked for), and Busy where everything that is loaded is in use.
        """
        base, adapter = self._take(ref, digest)
        assert base.predictor is not None
        try:
            yield Ready(base.predictor, digest if adapter is not None else None)
        finally:
            with self._changed:
                now = time.monotonic()
                for entry in (base, adapter):
                    if entry is not None:
                        entry.users -= 1
                        entry.used = now
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
            # Nothing is let go but by loads, and this is the only one; but what it loaded may be withdrawn by now.
            while (found := self._held(digest)) is None:
                in_passing(lambda: self._load(ref, digest))
            return found

    def _load(self, ref: str, digest: str) -> None:
        located = self._locate(ref, digest)
        self._check_size(located)
        self._load_base(located)
        if located.lora is not None:
            self._load_adapter(located, digest)
        with self._changed:
            self._known[digest] = located
            self._changed.notify_all()

    def _watch(self) -> None:
        while not self._closed.wait(REVIEW):
            try:
                self.review()
            except RaysdError as error:  # what is here goes on being served
                log.warning("%s", error)

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
        size = weight(located.folder)
        self._make_room(lambda: self._for_base(key, size))
        if key in self._bases:
            return
        began = time.monotonic()
        pin = self._pin(located) if located.lora is None else None
        base = Base(pin, size, predictor=self._open(located))
        with self._changed:
            self._bases[key] = base
        self._loaded(located.ref, time.monotonic() - began, False)

    def _load_adapter(self, located: Located, digest: str) -> None:
        base = self._bases[str(located.folder)]
        with self._changed:
            base.users += 1  # while room is made for its adapter
        try:
            assert base.predictor is not None
            assert located.lora is not None
            size = weight(located.lora)
            self._make_room(lambda: self._for_adapter(base, digest, size))
            if digest in base.adapters:
                return
            began = time.monotonic()
            base.predictor.backend.add_adapter(digest, located.lora)
            with self._changed:
                base.adapters[digest] = Entry(self._pin(located), size)
            self._loaded(located.ref, time.monotonic() - began, True)
        finally:
            with self._changed:
                base.users -= 1
                self._changed.notify_all()

    def _make_room(self, crowding: Callable[[], list[Idle] | None]) -> None:
        """Let go of what is unused until there is room (None). Raises Busy where nothing becomes unused."""
        end = time.monotonic() + PATIENCE
        while True:
            with self._changed:
                unused = crowding()
            if unused is None:
                return
            if unused:
                min(unused).drop()
            else:
                self._stand_aside(lambda: crowding() != [], end)

    def _stand_aside(self, met: Callable[[], bool], end: float) -> None:
        """Let others load until then."""
        self._loading.release()
        try:
            with self._changed:
                in_time = self._changed.wait_for(met, end - time.monotonic())
        finally:
            self._loading.acquire()
        if not in_time:
            raise Busy("all models that fit at once are in use: try again later")

    def _for_base(self, key: str, size: int) -> list[Idle] | None:
        """What may go for a base; None where it has room or is here."""
        if key in self._bases:
            return None
        if len(self._bases) >= self._most_bases:
            return self._idle_bases()
        return self._idle() if self._overfull(size) else None

    def _for_adapter(self, base: Base, digest: str, size: int) -> list[Idle] | None:
        """What may go for an adapter; None where it has room or is here."""
        if digest in base.adapters:
            return None
        if len(base.adapters) >= self._most_adapters:
            return self._idle_adapters(base)
        return self._idle() if self._overfull(size) else None

    def _idle_bases(self) -> list[Idle]:
        bases = self._bases.items()
        return [Idle(base.used, True, partial(self._drop_base, key)) for key, base in bases if not base.users]

    def _idle_adapters(self, base: Base) -> list[Idle]:
        adapters = base.adapters.items()
        return [Idle(a.used, False, partial(self._drop_adapter, base, name)) for name, a in adapters if not a.users]

    def _idle(self) -> list[Idle]:
        return self._idle_bases() + [idle for base in self._bases.values() for idle in self._idle_adapters(base)]

    def _overfull(self, more: int) -> bool:
        """Whether so many bytes more would be too many."""
        if self._memory is None:
            return False
        entries = [entry for base in self._bases.values() for entry in (base, *base.adapters.values())]
        return sum(entry.size for entry in entries) + more > self._memory

    def _check_size(self, located: Located) -> None:
        """Raises RequestError for what would not fit if it were alone."""
        size = weight(located.folder) + (weight(located.lora) if located.lora is not None else 0)
        if self._memory is not None and size > self._memory:
            has = f"{size / GIB:.3g} GiB of weights, and a replica here has memory for {self._memory / GIB:.3g}"
            raise RequestError(f"{located.ref}: {has}; raise `memory` of the served model")

    def _drop_base(self, key: str) -> None:
        with self._changed:
            base = self._bases[key]
            if base.users:
                return  # taken since it was chosen
            del self._bases[key]
            self._known = {digest: known for digest, known in self._known.items() if str(known.folder) != key}
        for entry in (base, *base.adapters.values()):
            _unpin(entry)

    def _drop_adapter(self, base: Base, name: str) -> None:
        with self._changed:
            entry = base.adapters[name]
            if entry.users:
                return
            del base.adapters[name]
            self._known.pop(name, None)
        assert base.predictor is not None
        base.predictor.backend.remove_adapter(name)
        _unpin(entry)

    def _pin(self, located: Located) -> Pin | None:
        return Registry(self.storage).pin(located.version, "served") if located.version else None


def weight(path: Path) -> int:
    """Bytes of a model's weights as they lie on disk: the safetensors file, or all those below a folder."""
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _versions(located: Located) -> list[tuple[str, int]]:
    """The registered versions, by model and number, whose weights it draws with: its own, and that of its base."""
    version = located.version
    if version is None:
        return []
    found = [(version.model, version.number)]
    if located.lora is not None:
        with suppress(RequestError):  # a base that is a folder, or in no registry
            base = parse(str(version.record["base"]))
            found += [(base.model, base.number)] if base.number is not None else []
    return found


def _unpin(entry: Entry) -> None:
    if entry.pin is not None:
        entry.pin.release()
