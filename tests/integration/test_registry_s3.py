"""The registry's promises on S3, over HTTP, from many threads and processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from raysd.errors import IntegrityError, LeaseHeld, Stale
from raysd.lease import Lease, check_fence
from raysd.registry import Registry, Version
from raysd.registry.records import blob_path
from raysd.storage import Storage, digest
from tests.versions import files_of, safetensors

PATIENCE = 200.0  # seconds: the server shares two cores with 32 publishers, and maybe with more


@pytest.fixture
def store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Storage(s3, deadline=PATIENCE)


def publish(store: Storage, folder: Path, seed: int, key: str) -> Version:
    return Registry(store).publish("cats", files_of(folder / f"{key}-{seed}", seed), {"seed": seed}, key)


def publish_many(store: Storage, folder: Path, seeds: list[int]) -> list[Version]:
    """All at once, in threads."""
    with ThreadPoolExecutor(len(seeds)) as pool:
        return list(pool.map(lambda seed: publish(store, folder, seed, f"key{seed}"), seeds))


def test_a_version_comes_back_as_it_was_published(store: Storage, tmp_path: Path) -> None:
    registry = Registry(store)
    version = publish(store, tmp_path, 1, "key")
    registry.alias(version, "production")
    assert registry.resolve("cats:production") == version == publish(store, tmp_path, 2, "key")
    assert (registry.fetch(version) / "unet" / "weights.safetensors").read_bytes() == safetensors(1)
    assert registry.verify(version) == []
    assert store.list("pins") == []


def test_thirty_two_publishers_at_once_get_thirty_two_numbers(store: Storage, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        others = [pool.submit(publish_many, store, tmp_path, list(range(at, at + 8))) for at in (0, 8)]
        versions = publish_many(store, tmp_path, list(range(16, 32)))
        versions = [version for other in others for version in other.result()] + versions
    assert sorted(version.number for version in versions) == list(range(1, 33))
    registry = Registry(store)
    assert registry.models()[0].versions == list(range(1, 33))
    for seed, version in enumerate(versions):
        assert version.record == {"seed": seed}
        assert registry.resolve(version.ref) == version
        assert registry.verify(version) == []


def test_one_key_from_many_publishers_is_one_version(store: Storage, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda seed: publish(store, tmp_path, seed, "key"), range(8)))
    assert len({version.digest for version in versions}) == 1
    assert Registry(store).models()[0].versions == [1]
    assert Registry(store).verify(versions[0]) == []


DYING = """
    import itertools, os, signal, sys
    from pathlib import Path
    from raysd.registry import Registry
    from raysd.storage import Storage

    url, step, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    count = itertools.count()

    def dying(name):
        def call(self, *args, **given):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return getattr(Storage, name)(self, *args, **given)
        return call

    names = ("write", "create", "swap", "upload", "delete")
    store = type("Dying", (Storage,), {name: dying(name) for name in names})(url, deadline=200)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    Registry(store).publish("cats", files, {}, key="key")
"""


def test_a_publisher_killed_at_any_write_leaves_a_version_or_none(store: Storage, tmp_path: Path) -> None:
    files, script = files_of(tmp_path / "files", 1), textwrap.dedent(DYING)
    writes = 7  # a pin, three blobs, the key's number, the manifest, the pin's removal
    urls = [f"{store.url}/{step}" for step in range(writes + 1)]
    commands = [
        [sys.executable, "-c", script, url, str(step), str(tmp_path / "files")] for step, url in enumerate(urls)
    ]
    running = [subprocess.Popen(command) for command in commands]
    assert [child.wait() for child in running] == [-signal.SIGKILL] * writes + [0]
    whole = []
    for url in urls:
        registry = Registry(Storage(url, deadline=PATIENCE))
        versions = [registry.resolve(f"cats@{number}") for model in registry.models() for number in model.versions]
        assert all(registry.verify(version) == [] for version in versions)
        again = registry.publish("cats", files, {}, key="key")
        assert (again.number, registry.models()[0].versions, registry.verify(again)) == (1, [1], [])
        assert not versions or versions == [again]
        whole.append(len(versions))
    assert whole == [0, 0, 0, 0, 0, 0, 1, 1]


def test_a_flipped_byte_is_refused_by_name(store: Storage, tmp_path: Path) -> None:
    version = publish(store, tmp_path, 1, "key")
    [file] = [file for file in version.files if file.path.startswith("unet")]
    data = bytearray(store.read(blob_path(file.sha256)))
    data[-1] ^= 1
    store.write(blob_path(file.sha256), bytes(data))
    with pytest.raises(IntegrityError, match=f"cats@1: unet/weights.safetensors: blob {file.sha256} is damaged"):
        Registry(store).fetch(version)
    assert "other bytes" in Registry(store).verify(version)[0]


def test_stale_alias_moves_are_refused(store: Storage, tmp_path: Path) -> None:
    registry = Registry(store)
    versions = publish_many(store, tmp_path, list(range(4)))

    def move(version: Version) -> bool:
        try:
            registry.alias(version, "production", expect=0)
        except Stale:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = [version for version, winner in zip(versions, pool.map(move, versions), strict=True) if winner]
    assert [registry.resolve("cats:production")] == won
    assert [move.seq for move in registry.history("cats", "production")] == [1]


def collect_until(url: str, done: Any) -> None:
    while not done.is_set():
        Registry(Storage(url, deadline=PATIENCE)).collect(grace=0)


def test_a_collector_beside_publishers_takes_nothing_they_need(store: Storage, tmp_path: Path) -> None:
    """The collector is a process of its own; each publication relies on blobs that lie there and that nothing names."""
    context = get_context("spawn")
    done = context.Event()
    collector = context.Process(target=collect_until, args=(store.url, done))
    collector.start()
    try:
        for turn in range(15):
            for local in files_of(tmp_path / "orphans", turn).values():
                store.upload(local, blob_path(digest(local.read_bytes())))
            version = publish(store, tmp_path, turn, f"key{turn}")
            assert Registry(store).verify(version) == []
    finally:
        done.set()
        collector.join()
    assert collector.exitcode == 0
    store.write(blob_path("ab" * 32), b"orphan")
    assert Registry(store).collect(grace=0).blobs == ("ab" * 32,)
    assert all(Registry(store).verify(Registry(store).resolve(f"cats@{n}")) == [] for n in range(1, 16))


HOLDER = """
    import sys, time
    from raysd.lease import Lease
    from raysd.storage import Storage
    lease = Lease.acquire(Storage(sys.argv[1]), "lease.json")
    lease.start(print)
    print(lease.token, flush=True)
    time.sleep(120)
"""


def test_a_killed_holder_is_succeeded_at_once(store: Storage) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), store.url], stdout=subprocess.PIPE, env=os.environ
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(LeaseHeld, match=f"process {child.pid}"):
        Lease.acquire(store, "lease.json")
    child.kill()
    child.wait()
    with Lease.acquire(store, "lease.json") as lease:
        assert lease.token == 2
        lost = threading.Event()
        lease.start(lambda reason: lost.set())
        lease.renew()
        check_fence(store, "lease.json", 2, lease.nonce)
        assert not lost.is_set()
