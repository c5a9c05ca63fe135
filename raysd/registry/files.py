"""A version's files on this machine, every byte compared with its digest each time."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from raysd.errors import IntegrityError, NotFound, StorageError
from raysd.registry.records import File, Version, blob_path
from raysd.storage import Storage, sha256_of

_PIECE = 16 << 20


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/raysd, or ~/.cache/raysd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raysd"


def fetch(storage: Storage, version: Version, folder: Path | None) -> Path:
    """See `Registry.fetch`."""
    try:
        if folder is not None:
            for file in version.files:
                _ensure(storage, version, file, folder / file.path)
            return folder
        return _fetch_cached(storage, version, cache_folder())
    except OSError as error:
        where = folder or cache_folder()
        raise StorageError(f"{version.ref}: {where}: {error}: free some space or set XDG_CACHE_HOME") from None


def problems(storage: Storage, version: Version) -> list[str]:
    """One line for each file whose blob is missing, cut off or changed."""
    return [line for file in version.files if (line := _problem(storage, file))]


def _fetch_cached(storage: Storage, version: Version, cache: Path) -> Path:
    """Blobs by content, shared between versions; the version's folder links to them."""
    folder = cache / "versions" / version.digest
    for file in version.files:
        blob = cache / "blobs" / file.sha256
        _ensure(storage, version, file, blob)
        _link(blob, folder / file.path)
    return folder


def _ensure(storage: Storage, version: Version, file: File, local: Path) -> None:
    ensure(storage, blob_path(file.sha256), file, local, _what(version, file), "use another version")


def ensure(storage: Storage, path: str, file: File, local: Path, what: str, remedy: str) -> None:
    """`local` has the file's bytes. What is there already is digested too, and fetched again where it differs.

    Raises IntegrityError of `what` and a `remedy` where the object at `path` is missing or has other bytes.
    """
    if is_same(local, file):
        return
    fresh = local.with_name(f".{local.name[:64]}.{uuid.uuid4().hex}")
    try:
        storage.download(path, fresh)
        if not is_same(fresh, file):
            found = f"{fresh.stat().st_size} bytes, sha256 {sha256_of(fresh)[:12]}…"
            raise IntegrityError(f"{what} is damaged in the store ({found}): {remedy}")
        os.replace(fresh, local)
    except NotFound:
        raise IntegrityError(f"{what} is missing in the store: {remedy}") from None
    finally:
        fresh.unlink(missing_ok=True)


def is_same(local: Path, file: File) -> bool:
    """Whether a local file has the size and the bytes that it should have."""
    try:
        return local.stat().st_size == file.size and sha256_of(local) == file.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False


def _link(blob: Path, place: Path) -> None:
    """Make `place` the blob, by a hard link where the file system has them."""
    try:
        if os.path.samefile(blob, place):
            return
    except FileNotFoundError:
        place.parent.mkdir(parents=True, exist_ok=True)
    _replace(place, lambda fresh: os.link(blob, fresh), lambda fresh: shutil.copyfile(blob, fresh))


def _replace(place: Path, first: Callable[[Path], object], other: Callable[[Path], object]) -> None:
    fresh = place.with_name(f".{place.name[:64]}.{uuid.uuid4().hex}")
    try:
        try:
            first(fresh)
        except OSError:
            other(fresh)
        os.replace(fresh, place)
    finally:
        fresh.unlink(missing_ok=True)  # still there where another process made the same link meanwhile


def _problem(storage: Storage, file: File) -> str | None:
    path, name = blob_path(file.sha256), f"{file.path}: blob {file.sha256}"
    try:
        size = storage.size(path)
        if size != file.size:
            return f"{name} has {size} bytes instead of {file.size}"
        if _stored_digest(storage, path, size) != file.sha256:
            return f"{name} has other bytes than its digest says"
    except NotFound:
        return f"{name} is missing"
    return None


def _stored_digest(storage: Storage, path: str, size: int) -> str:
    """The digest of an object, read in pieces and kept nowhere."""
    total = hashlib.sha256()
    for start in range(0, size, _PIECE):
        total.update(storage.read_ranges(path, [(start, min(start + _PIECE, size))])[0])
    return total.hexdigest()


def _what(version: Version, file: File) -> str:
    return f"{version.ref}: {file.path}: blob {file.sha256}"
