"""Publishing: blobs first, the manifest last, and one version a key however often and by how many it is tried."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysd.errors import AlreadyExists, NotFound, RequestError, Stale, StorageError
from raysd.registry import manifest
from raysd.registry.catalog import latest, load
from raysd.registry.pins import Pin, await_collector
from raysd.registry.records import File, Version, blob_path, check_name, manifest_path, timestamp
from raysd.storage import Storage, digest, sha256_of


@dataclass(frozen=True)
class Draft:
    """A publication before it has a number. `local` and `stamps` are each file's place and what changes with it."""

    model: str
    key: str
    created: str
    record: Mapping[str, Any]
    files: tuple[File, ...]
    local: dict[str, Path]
    stamps: dict[str, tuple[int, int]]


def publish(storage: Storage, model: str, files: Mapping[str, Path], record: Mapping[str, Any], key: str) -> Version:
    """See `Registry.publish`. The order of its steps is P1 to P5 in `pins`."""
    storage.require_swap()
    check_name(model, "model")
    manifest.check_paths(files)
    if done := _published(storage, model, key):
        return done
    draft = _draft(model, files, record, key)
    blobs = {file.sha256 for file in draft.files}
    while True:
        with Pin(storage, blobs, f"publishing {model}") as pin:  # P1, P5
            await_collector(storage, blobs)  # P2
            _upload(storage, draft)  # P3
            if not pin.broken:
                version = _number(storage, draft)  # P4
                if not pin.broken:
                    return version


def _draft(model: str, files: Mapping[str, Path], record: Mapping[str, Any], key: str) -> Draft:
    """Digests of all files. Raises RequestError for what may not be published."""
    for path, local in files.items():
        if not local.is_file():
            raise RequestError(f"{path}: {local} is not a file")
        manifest.check_content(path, local)
    stamps = {path: _stamp(local) for path, local in files.items()}
    entries = tuple(File(path, sha256_of(files[path]), stamps[path][0]) for path in sorted(files))
    draft = Draft(model, key, timestamp(), record, entries, dict(files), stamps)
    manifest.pack(model, 0, key, draft.created, entries, record)  # refuses a wrong record before any upload
    return draft


def _upload(storage: Storage, draft: Draft) -> None:
    """Upload the blobs that are not there. Raises StorageError if a file changed since it was digested."""
    for file in draft.files:
        path, local = blob_path(file.sha256), draft.local[file.path]
        if _stored_size(storage, path) != file.size:
            storage.upload(local, path)
        if _stamp(local) != draft.stamps[file.path]:
            raise StorageError(f"{local}: changed while it was published: publish again once it is finished")


def _number(storage: Storage, draft: Draft) -> Version:
    """Write the manifest under the next free number.

    The key's object says which number the publication tries; it goes on to another only when a manifest of another
    publication has that one for good. So publishers of one key always try the same number, where the first manifest
    wins, and one that comes late with an old number finds it taken: a key never gets two versions.
    """
    aim = None
    while True:
        number, tag = aim or _claim(storage, draft)
        data = manifest.pack(draft.model, number, draft.key, draft.created, draft.files, draft.record)
        path = manifest_path(draft.model, number)
        try:
            storage.create(path, data)
            return manifest.unpack(data, draft.model, number, False)
        except AlreadyExists:
            other = manifest.unpack(storage.read(path), draft.model, number, False)
        if other.key == draft.key:
            return load(storage, draft.model, number)
        aim = _aim(storage, draft, tag)


def _claim(storage: Storage, draft: Draft) -> tuple[int, str]:
    """The number that this key tries, and the tag of the object that says so."""
    while True:
        try:
            return _aimed(storage, draft.model, draft.key)
        except NotFound:
            if aim := _aim(storage, draft, None):
                return aim


def _aim(storage: Storage, draft: Draft, tag: str | None) -> tuple[int, str] | None:
    """Try the next free number from now on; None where another publisher of the same key changed that already."""
    number = latest(storage, draft.model) + 1
    data = json.dumps({"number": number, "key": draft.key}).encode()
    try:
        return number, storage.swap(_key_path(draft.model, draft.key), data, tag)
    except Stale:
        return None


def _aimed(storage: Storage, model: str, key: str) -> tuple[int, str]:
    data, tag = storage.read_tagged(_key_path(model, key))
    return int(json.loads(data)["number"]), tag


def _published(storage: Storage, model: str, key: str) -> Version | None:
    """The version that this key has already."""
    try:
        version = load(storage, model, _aimed(storage, model, key)[0])
    except NotFound:
        return None
    return version if version.key == key else None


def _stored_size(storage: Storage, path: str) -> int:
    try:
        return storage.size(path)
    except NotFound:
        return -1


def _stamp(local: Path) -> tuple[int, int]:
    status = local.stat()
    return status.st_size, status.st_mtime_ns


def _key_path(model: str, key: str) -> str:
    return f"models/{model}/keys/{digest(key.encode())}.json"
