"""Collection takes only what nothing names, also beside publishers."""

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysd import lease as lease_module
from raysd.errors import LeaseHeld, LeaseLost
from raysd.registry import Pin, Registry, Version, collect, pins, publish
from raysd.registry.records import blob_path, manifest_path
from raysd.storage import Storage, digest
from tests.versions import files_of


@pytest.fixture
def store(registry: Registry) -> Storage:
    return registry.storage


def test_collection_takes_only_what_nothing_names(registry: Registry, put: Any, store: Storage) -> None:
    version = put(1)
    store.write(blob_path("ab" * 32), b"orphan")
    assert registry.collect().blobs == ()
    planned = registry.collect(grace=0, dry_run=True)
    assert store.exists(blob_path("ab" * 32))
    assert registry.collect(grace=0) == planned
    assert (planned.blobs, planned.bytes, planned.kept) == (("ab" * 32,), 6, 3)
    assert registry.verify(version) == []
    registry.withdraw(version)
    assert registry.collect(grace=0).blobs == ()


def test_a_pin_holds_until_it_is_released_or_ends(registry: Registry, put: Any, store: Storage) -> None:
    version = put(1)
    store.delete(manifest_path("cats", 1))
    pin = registry.pin(version, "serving")
    assert registry.collect(grace=0).blobs == ()
    [entry] = store.list("pins")
    local = store.local_path(entry.path)
    assert local is not None
    pin.release()
    assert not local.exists()
    dead = registry.pin(version, "a dead process's")
    dead._stop.set()
    [entry] = store.list("pins")
    local = store.local_path(entry.path)
    assert local is not None
    os.utime(local, (time.time() - pins.PIN_TTL,) * 2)
    assert registry.collect(grace=0).blobs == ()  # stores give whole seconds
    os.utime(local, (time.time() - pins.PIN_TTL - 3,) * 2)
    assert len(registry.collect(grace=0).blobs) == 3
    assert store.list("pins") == []


def test_a_pin_is_renewed_and_knows_when_it_was_not(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Pin(store, ["ab" * 32], "test", ttl=0.6)
    [first] = store.list("pins")
    while store.list("pins")[0].modified == first.modified:
        time.sleep(0.02)
    assert not pin.broken
    now = pins.clock()
    monkeypatch.setattr(pins, "clock", lambda: now + 0.7)
    while not pin._broken:  # the next renewal comes too late, and says so for ever
        time.sleep(0.02)
    monkeypatch.undo()
    assert pin.broken
    pin.release()


def test_two_collections_at_once_are_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with lease_module.Lease.acquire(registry.storage, collect.LEASE), pytest.raises(LeaseHeld):
        registry.collect()


def test_a_collection_that_lost_its_lease_deletes_nothing(
    registry: Registry, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(blob_path("ab" * 32), b"orphan")
    real = pins.condemn

    def overtaken(storage: Storage, blobs: Any, token: int) -> pins.Condemned:
        real(storage, [], token + 1)
        return real(storage, blobs, token)

    monkeypatch.setattr(pins, "condemn", overtaken)
    with pytest.raises(LeaseLost, match="another collection began"):
        registry.collect(grace=0)
    monkeypatch.setattr(pins, "condemn", real)
    now = lease_module.clock()

    def slow(self: collect.Collector) -> set[str]:
        monkeypatch.setattr(lease_module, "clock", lambda: now + 25)
        return set()

    monkeypatch.setattr(collect.Collector, "_kept", slow)
    store.delete(pins.CONDEMNED)
    with pytest.raises(LeaseLost, match="in time"):
        registry.collect(grace=0)
    assert store.exists(blob_path("ab" * 32))


def test_a_dead_collectors_list_is_cleared_in_the_end(
    registry: Registry, put: Any, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "SPAN", 0.05)
    pins.condemn(store, [digest(b"always the same")], token=7)
    assert put(1).number == 1
    assert pins.read_condemned(store).blobs == frozenset()


class Hooked(Storage):
    """A store that calls `before` with the number and path of each operation of the thread that made it."""

    def __init__(self, url: str, before: Callable[[int, str], None]) -> None:
        super().__init__(url)
        self.count, self.before, self.thread = itertools.count(), before, threading.get_ident()

    def _run(self, path: str, work: Callable[[], Any], root: str | None = None) -> Any:
        if threading.get_ident() == self.thread:  # not a renewal in the background
            self.before(next(self.count), path)
        return super()._run(path, work, root)


def orphaned(root: Path, files: dict[str, Path]) -> Storage:
    """A store that has the blobs of a publication to come, and nothing that names them: it will rely on them."""
    store = Storage(str(root))
    store.require_swap()
    for local in files.values():
        store.upload(local, blob_path(digest(local.read_bytes())))
    return store


class Interleaving:
    """A publisher stops before its operation `p`. A collector runs to its operation `c`. The publisher runs to its end,
    or until it waits for the collector. The collector runs to its end, then the publisher.
    """

    def __init__(self, store: Storage, files: dict[str, Path], p: int, c: int) -> None:
        self.store, self.files, self.p, self.c = store, files, p, c
        self.reached_p = self.reached_c = False
        self.paused, self.go_on, self.settled = threading.Event(), threading.Event(), threading.Event()
        self.looks = 0
        self.version: Version | None = None

    def run(self) -> list[str]:
        publisher = threading.Thread(target=self._publish)
        publisher.start()
        self.paused.wait()
        Registry(Hooked(self.store.url, self._before_collector)).collect(grace=0)
        self.go_on.set()
        publisher.join()
        assert self.version is not None
        return [f"p={self.p} c={self.c}: {problem}" for problem in Registry(self.store).verify(self.version)]

    def _publish(self) -> None:
        try:
            store = Hooked(self.store.url, self._before_publisher)
            self.version = Registry(store).publish("cats", self.files, {}, key="k")
        finally:
            self.paused.set()
            self.settled.set()

    def _before_publisher(self, step: int, path: str) -> None:
        self.looks += path == pins.CONDEMNED
        if self.looks > 1:  # it looks again and again
            self.settled.set()
        if step == self.p:
            self.reached_p = True
            self.paused.set()
            self.go_on.wait()

    def _before_collector(self, step: int, path: str) -> None:
        if step == self.c:
            self.reached_c = True
            self.go_on.set()
            self.settled.wait()


def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What is missing after each interleaving of that kind."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    files = dict(list(files_of(tmp_path / "files", 1).items())[:1])
    for p in itertools.count():
        for c in itertools.count():
            tried = Interleaving(orphaned(tmp_path / f"{p}-{c}", files), files, p, c)
            yield from tried.run()
            if not tried.reached_c:
                break
        if not tried.reached_p:
            return


class NoPin(Pin):
    """A pin that nobody sees."""

    def __init__(self, storage: Storage, blobs: Any, why: str, ttl: float = pins.PIN_TTL) -> None:
        super().__init__(storage, [], why, ttl)


def condemn_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first look, which only makes batches smaller and hides the races that the protocol is for."""
    monkeypatch.setattr(collect.Collector, "_unused", lambda self, blobs: list(blobs))


@pytest.mark.parametrize("first_look", [True, False])
def test_no_interleaving_of_a_collector_and_a_publisher_loses_a_blob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_look: bool
) -> None:
    if not first_look:
        condemn_everything(monkeypatch)
    assert list(problems(tmp_path, monkeypatch)) == []


def test_without_the_pin_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "Pin", NoPin)
    assert next(problems(tmp_path, monkeypatch))


def test_without_the_wait_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "await_collector", lambda storage, blobs: None)
    assert next(problems(tmp_path, monkeypatch))


def test_with_pins_read_after_manifests_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def the_other_way_round(self: collect.Collector) -> set[str]:
        referenced = self._referenced()
        return pins.pinned(self.storage) | referenced

    monkeypatch.setattr(collect.Collector, "_kept", the_other_way_round)
    condemn_everything(monkeypatch)
    assert next(problems(tmp_path, monkeypatch))


def test_collectors_and_publishers_at_random(tmp_path: Path) -> None:
    stop, files = threading.Event(), files_of(tmp_path / "files", 1)
    for turn in range(25):
        store = orphaned(tmp_path / str(turn), files)
        stop.clear()

        def collect_on(store: Storage = store) -> None:
            while not stop.is_set():
                Registry(store).collect(grace=0)

        collector = threading.Thread(target=collect_on)
        collector.start()
        time.sleep(random.random() * 0.02)
        version = Registry(store).publish("cats", files, {}, key="k")
        stop.set()
        collector.join()
        assert Registry(store).verify(version) == []


def test_a_pin_that_broke_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher frozen for longer than its pin lasted does it all again, whatever a collector did meanwhile."""
    files = files_of(tmp_path / "files", 1)
    store = orphaned(tmp_path / "store", files)
    real, frozen = publish.manifest_path, []

    def freeze(model: str, number: int) -> str:
        if not frozen:
            frozen.append(True)
            for entry in store.list("pins"):
                store.delete(entry.path)
            now = pins.clock()
            monkeypatch.setattr(pins, "clock", lambda: now + pins.PIN_TTL)
            Registry(store).collect(grace=0)
        return real(model, number)

    monkeypatch.setattr(publish, "manifest_path", freeze)
    version = Registry(store).publish("cats", files, {}, key="k")
    assert Registry(store).verify(version) == []
    assert Registry(store).models()[0].versions == [1]
