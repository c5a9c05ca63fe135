"""The registry's promises, on a local folder. tests/integration/test_registry_s3.py has them over HTTP."""

import itertools
import json
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raysd.errors import IntegrityError, NotFound, RequestError, StorageError
from raysd.registry import Registry, Version
from raysd.registry.records import blob_path, manifest_path
from raysd.storage import Storage, digest
from tests.versions import files_of, flip, safetensors


@pytest.fixture
def store(registry: Registry) -> Storage:
    return registry.storage


def blob_of(store: Storage, version: Version, path: str) -> Path:
    [file] = [file for file in version.files if file.path == path]
    local = store.local_path(blob_path(file.sha256))
    assert local is not None
    return local


def test_a_version_comes_back_as_it_was_published(registry: Registry, put: Any, tmp_path: Path) -> None:
    version = put(1)
    assert (version.ref, version.record, version.withdrawn) == ("cats@1", {"seed": 1}, False)
    assert registry.resolve("cats@1") == registry.resolve("cats") == version
    assert version.digest == digest(registry.storage.read(manifest_path("cats", 1)))
    for folder in (registry.fetch(version), registry.fetch(version, tmp_path / "given")):
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {"unet/weights.safetensors", "model_index.json", "README.md"}
        assert (folder / "unet/weights.safetensors").read_bytes() == safetensors(1)
    assert registry.verify(version) == []
    assert registry.storage.list("pins") == []


def test_versions_count_up_and_share_blobs(registry: Registry, put: Any) -> None:
    assert [put(seed).number for seed in (1, 2, 3)] == [1, 2, 3]
    assert len(registry.storage.list("blobs")) == 7
    [model] = registry.models()
    assert (model.name, model.versions, model.aliases, model.withdrawn) == ("cats", [1, 2, 3], {}, [])


def test_one_key_is_one_version(registry: Registry, put: Any, tmp_path: Path) -> None:
    first = put(1)
    put(2)
    assert registry.publish("cats", files_of(tmp_path / "x", 9), {"other": 1}, key="key1") == first
    assert len(registry.models()[0].versions) == 2
    assert registry.publish("dogs", files_of(tmp_path / "x", 9), {}, key="key1").ref == "dogs@1"


def test_what_is_not_there_is_named_with_what_is(registry: Registry, put: Any) -> None:
    with pytest.raises(NotFound, match="cats: no such model; models: none"):
        registry.resolve("cats")
    version = put(1)
    registry.alias(version, "production")
    for ref, message in {
        "cats@7": "cats@7: no such version; cats has versions 1 and aliases production",
        "cats:beta": "cats:beta: no such alias; cats has versions 1 and aliases production",
        "dogs": "dogs: no such model; models: cats",
        "dogs@1": "dogs@1: no such version; models: cats",
    }.items():
        with pytest.raises(NotFound, match=message):
            registry.resolve(ref)
    for ref in ("Cats", "cats@", "cats@0", "cats@1:x", "../x", "cats:", "a/b", ""):
        with pytest.raises(RequestError, match="not a version"):
            registry.resolve(ref)


@pytest.mark.parametrize(
    "path",
    ["/abs.json", "../up.json", "a/../b.json", "a\\b.json", "./a.json", "a//b.json", "", "c:/x.json", "a\n.json"],
)
def test_paths_stay_inside_the_version(registry: Registry, tmp_path: Path, path: str) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RequestError):
        registry.publish("cats", {path: tmp_path / "x.json"}, {}, key="k")
    assert registry.storage.list() == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"x", "a pickle runs code"),
        ("a.PT", b"x", "a pickle runs code"),
        ("a.ckpt", b"x", "a pickle runs code"),
        ("a.pkl", b"x", "a pickle runs code"),
        ("a.py", b"x", "only .json, .md, .safetensors, .txt files"),
        ("noname", b"x", "only .json, .md, .safetensors, .txt files"),
        ("a.txt", b"\x80\x04\x95rest", "pickle or zip archive under another name"),
        ("a.json", b"PK\x03\x04rest", "pickle or zip archive under another name"),
        ("a.safetensors", b"\x80\x04\x95restrestrest", "not a safetensors file"),
        ("a.safetensors", b"PK\x03\x04restrestrest", "not a safetensors file"),
        ("a.safetensors", struct.pack("<Q", 1000) + b"{}", "not a safetensors file"),
    ],
)
def test_no_pickle_is_published(registry: Registry, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        registry.publish("cats", {name: tmp_path / "file"}, {}, key="k")
    assert registry.storage.list() == []


def test_a_safetensors_header_may_look_like_a_pickle(registry: Registry, tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x280)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"1")
    assert (tmp_path / "x").read_bytes()[:2] == b"\x80\x02"
    assert registry.publish("cats", {"x.safetensors": tmp_path / "x"}, {}, key="k").number == 1


@pytest.mark.parametrize("record", [{"loss": float("nan")}, {"path": Path("x")}])
def test_a_record_is_plain_json(registry: Registry, tmp_path: Path, record: Mapping[str, Any]) -> None:
    with pytest.raises(RequestError, match="record of cats: not plain JSON"):
        registry.publish("cats", files_of(tmp_path / "f", 1), record, key="k")
    assert registry.storage.list() == []


@pytest.mark.parametrize("model", ["Cats", "", "-cats", "a/b", "a b", "x" * 64, ".."])
def test_models_have_plain_names(registry: Registry, tmp_path: Path, model: str) -> None:
    with pytest.raises(RequestError, match="model"):
        registry.publish(model, files_of(tmp_path / "f", 1), {}, key="k")


def test_other_wrong_publications(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one file"):
        registry.publish("cats", {}, {}, key="k")
    with pytest.raises(RequestError, match="is not a file"):
        registry.publish("cats", {"a.json": tmp_path / "none"}, {}, key="k")
    (tmp_path / "x").write_text("{}")
    with pytest.raises(RequestError, match="is a file of the same version"):
        registry.publish("cats", {"a.json": tmp_path / "x", "a.json/b.json": tmp_path / "x"}, {}, key="k")


def test_a_file_that_changes_meanwhile_is_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, real = files_of(tmp_path / "f", 1), Storage.upload

    def upload(self: Storage, local: Path, path: str) -> None:
        local.write_bytes(local.read_bytes() + b" ")
        real(self, local, path)

    monkeypatch.setattr(Storage, "upload", upload)
    with pytest.raises(StorageError, match="changed while it was published"):
        registry.publish("cats", files, {}, key="k")
    assert registry.models() == []


def test_publishers_at_once_get_different_numbers_and_one_key_gets_one(registry: Registry, tmp_path: Path) -> None:
    files = {seed: files_of(tmp_path / f"f{seed}", seed) for seed in range(6)}

    def publish_one(turn: int) -> Version:
        seed = turn % 6
        return Registry(registry.storage).publish("cats", files[seed], {"seed": seed}, key=f"key{seed}")

    with ThreadPoolExecutor(18) as pool:
        versions = list(pool.map(publish_one, range(18)))
    assert sorted({version.number for version in versions}) == [1, 2, 3, 4, 5, 6]
    assert registry.models()[0].versions == [1, 2, 3, 4, 5, 6]
    for seed in range(6):
        assert len({version.digest for version in versions[seed::6]}) == 1
        assert versions[seed].record == {"seed": seed}
        assert registry.verify(versions[seed]) == []


def test_a_flipped_byte_is_refused_by_name(registry: Registry, put: Any, store: Storage) -> None:
    version = put(1)
    flip(blob_of(store, version, "unet/weights.safetensors"))
    [file] = [file for file in version.files if file.path.startswith("unet")]
    with pytest.raises(IntegrityError, match=f"cats@1: unet/weights.safetensors: blob {file.sha256} is damaged"):
        registry.fetch(version)
    assert registry.verify(version) == [
        f"unet/weights.safetensors: blob {file.sha256} has other bytes than its digest says"
    ]


def test_a_short_or_missing_blob_is_refused_by_name(registry: Registry, put: Any, store: Storage) -> None:
    version = put(1)
    blob = blob_of(store, version, "model_index.json")
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"cats@1: model_index\.json: blob \w+ is damaged in the store"):
        registry.fetch(version)
    assert "instead of" in registry.verify(version)[0]
    blob.unlink()
    with pytest.raises(IntegrityError, match=r"cats@1: model_index\.json: blob \w+ is missing in the store"):
        registry.fetch(version)
    assert registry.verify(version)[0].endswith("is missing")


def test_a_damaged_local_copy_is_fetched_again_at_each_load(registry: Registry, put: Any, tmp_path: Path) -> None:
    version = put(1)
    for given in (None, tmp_path / "given"):
        weights = registry.fetch(version, given) / "unet" / "weights.safetensors"
        flip(weights)
        assert registry.fetch(version, given) / "unet" / "weights.safetensors" == weights
        assert weights.read_bytes() == safetensors(1)
        weights.unlink()
        registry.fetch(version, given)
        assert weights.read_bytes() == safetensors(1)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and "store" not in path.parts]


def test_many_fetch_at_once(registry: Registry, put: Any) -> None:
    version = put(1)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: registry.fetch(version), range(16)))
    [folder] = folders
    assert (folder / "unet" / "weights.safetensors").read_bytes() == safetensors(1)


@pytest.mark.parametrize("damage", ["byte", "path", "number", "text"])
def test_a_damaged_manifest_is_refused(registry: Registry, put: Any, store: Storage, damage: str) -> None:
    version = put(1)
    registry.alias(version, "production")
    place = manifest_path("cats", 1)
    text = store.read(place).decode()
    changed = {
        "byte": text.replace('"seed": 1', '"seed": 2'),
        "path": text.replace("README.md", "../../.md"),
        "number": text.replace('"number": 1', '"number": 2'),
        "text": text[:-10],
    }[damage]
    assert changed != text
    store.write(place, changed.encode())
    for ref in ("cats@1", "cats:production", "cats"):
        with pytest.raises(IntegrityError, match="cats@1"):
            registry.resolve(ref)
    assert "cats@1" in registry.verify(version)[0]
    with pytest.raises(IntegrityError):
        registry.collect(grace=0)
    assert len(store.list("blobs")) == 3


def test_an_alias_knows_the_manifest_it_was_moved_to(
    registry: Registry, put: Any, store: Storage, tmp_path: Path
) -> None:
    """Another whole manifest under the same number, as after a careless restore."""
    registry.alias(put(1), "production")
    other = Registry(Storage(str(tmp_path / "other")))
    other.publish("cats", files_of(tmp_path / "f", 5), {}, key="x")
    store.write(manifest_path("cats", 1), other.storage.read(manifest_path("cats", 1)))
    with pytest.raises(IntegrityError, match="cats@1: its manifest is"):
        registry.resolve("cats:production")


def die_at(step: int, names: tuple[str, ...]) -> None:
    """End this process without any clean-up right before the n-th of these system calls."""
    count = itertools.count()

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            if next(count) == step:
                os._exit(9)
            return real(*args, **given)

        return call

    for name in names:
        setattr(os, name, dying(getattr(os, name)))


def test_a_publisher_killed_anywhere_leaves_a_version_or_none(tmp_path: Path) -> None:
    calls = ("link", "replace", "fsync", "unlink", "open")
    files, deaths = files_of(tmp_path / "files", 1), 0
    for step in itertools.count():
        store = Storage(str(tmp_path / f"store{step}"))
        store.require_swap()
        if (pid := os.fork()) == 0:
            try:
                die_at(step, calls)
                Registry(store).publish("cats", files, {"a": 1}, key="k")
            finally:
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        deaths += 1
        registry = Registry(store)
        versions = [registry.resolve(f"cats@{number}") for model in registry.models() for number in model.versions]
        assert [registry.verify(version) for version in versions] == [[]] * len(versions)
        again = registry.publish("cats", files, {"a": 1}, key="k")
        assert (again.number, registry.models()[0].versions) == (1, [1])
        assert registry.verify(again) == []
        assert not versions or versions == [again]
    assert deaths > 20
