"""`Storage`: paths, retries, ambiguous answers and messages, over any backend."""

import errno
import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import split_protocol

from raysd.errors import AlreadyExists, NotFound, RaysdError, RequestError, Stale, StorageError
from raysd.storage.backend import HIDDEN, Backend, Entry
from raysd.storage.failures import explained, transient
from raysd.storage.local import Local
from raysd.storage.remote import S3, Remote

T = TypeVar("T")

DEADLINE = 20.0
"""Seconds for which a request that failed for a passing reason is tried again."""

_probed: set[tuple[int, str]] = set()


class Storage:
    """One root folder or URL. Paths are relative to it, with "/". Pickles as its URL and opens again elsewhere.

    Every method raises StorageError naming the object, the reason and the remedy where the store refuses, is full or
    stays unreachable for `deadline` seconds, and RequestError for a path that is not a plain relative one.
    A writer's object is seen whole or not at all. An object that is ever swapped must be written by `swap` alone.
    """

    def __init__(self, url: str | None = None, *, deadline: float = DEADLINE) -> None:
        given = url or os.environ.get("RAYSD_STORAGE") or "./.raysd"
        protocol, rest = split_protocol(given)
        if protocol in (None, "file", "local"):
            self.url = str(Path(rest).expanduser().absolute())
            if not url:
                _require_folder(Path(self.url))
        else:
            self.url = f"{protocol}://{rest.strip('/')}"
        self.deadline = deadline
        self._backend = _backend(self.url)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[Callable[[str, float], "Storage"], tuple[str, float]]:
        return _reopen, (self.url, self.deadline)

    def child(self, path: str) -> "Storage":
        """The storage whose root is the folder `path` of this one."""
        return Storage(f"{self.url}/{_clean(path)}", deadline=self.deadline)

    def patient(self, deadline: float) -> "Storage":
        """The same storage, trying again for `deadline` seconds."""
        return Storage(self.url, deadline=deadline)

    def read(self, path: str) -> bytes:
        """The content. Raises NotFound."""
        return self._run(path, lambda: self._backend.read(_clean(path)))

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """The content and the tag that `swap` wants. Raises NotFound."""
        return self._run(path, lambda: self._backend.read_tagged(_clean(path)))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes start to stop (exclusive) of each range. Raises NotFound, StorageError where the object is shorter."""
        if any(start < 0 or stop <= start for start, stop in ranges):
            raise ValueError(f"{path}: an empty or negative range in {list(ranges)[:5]}")
        parts = self._run(path, lambda: self._backend.read_ranges(_clean(path), ranges))
        for (start, stop), part in zip(ranges, parts, strict=True):
            if len(part) != stop - start:
                raise StorageError(f"{self._name(path)}: has no bytes {start} to {stop}: it is cut off; write it again")
        return parts

    def create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist. Raises AlreadyExists, and ValueError for no bytes at all.

        Where an answer was lost and the object then has exactly these bytes, it counts as written: what must have one
        winner needs something unique in it.
        """
        try:
            self._put(path, data, None)
        except Stale:
            raise AlreadyExists(f"{self._name(path)}: exists already") from None

    def swap(self, path: str, data: bytes, tag: str | None) -> str:
        """Replace the object whose tag is `tag` (None: create it). Returns the new tag. Raises Stale.

        Tags speak of content: bytes that come back to what they were look unchanged, so count in them.
        """
        return self._put(path, data, tag)

    def write(self, path: str, data: bytes) -> None:
        """Write or replace an object."""
        self._run(path, lambda: self._backend.put(_clean(path), data))

    def upload(self, local: Path, path: str) -> None:
        """Write or replace an object by a local file of any size. Raises NotFound where there is no such file."""
        if not local.is_file():
            raise NotFound(f"{local}: no such file")
        self._run(path, lambda: self._backend.upload(local, _clean(path)))

    def download(self, path: str, local: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all. Raises NotFound."""
        temporary = local.with_name(f"{HIDDEN}tmp-{uuid.uuid4().hex}")
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            self._run(path, lambda: self._backend.download(_clean(path), temporary), root=str(local.parent))
            os.replace(temporary, local)
        except OSError as error:
            raise explained(error, str(local), str(local.parent)) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def exists(self, path: str) -> bool:
        """Whether there is an object (not a folder) of that name."""
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of an object. Raises NotFound."""
        return self.stat(path).size

    def stat(self, path: str) -> Entry:
        """Size and time of an object. Raises NotFound."""
        return self._run(path, lambda: self._backend.stat(_clean(path)))

    def list(self, prefix: str = "", recursive: bool = True) -> list[Entry]:
        """The objects in the folder `prefix` as they are now, sorted; if not recursive, its folders too ("name/")."""
        folder = _clean(prefix.rstrip("/")) if prefix else ""
        return self._run(prefix, lambda: self._backend.list(folder, recursive))

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is fine."""
        self._run(path, lambda: self._backend.delete(_clean(path)))

    def delete_tree(self, prefix: str) -> None:
        """Delete a folder with all in it; one that is not there is fine."""
        self._run(prefix, lambda: self._backend.delete_tree(_clean(prefix.rstrip("/"))))

    def now(self) -> float:
        """Epoch seconds by the store's own clock, which also stamps `Entry.modified`: ages need no agreed clocks."""
        return self._run("", self._backend.now)

    def sweep(self, older: float) -> int:
        """Remove half-written files and uploads left by processes that died, older than so many seconds."""
        return self._run("", lambda: self._backend.sweep(older))

    def local_path(self, path: str) -> Path | None:
        """The file itself where the store is a local folder. Not to be written."""
        return self._backend.file(_clean(path))

    def for_arrow(self, path: str) -> tuple[Any, str]:
        """The pyarrow file system (None for the local one) and the path on it, for libraries that go through Arrow."""
        local = self.local_path(path)
        if local is not None:
            return None, str(local)
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        backend = self._backend
        return PyFileSystem(FSSpecHandler(backend.bulk)), backend.url(_clean(path))  # type: ignore[attr-defined]

    def require_swap(self) -> None:
        """Try create-only and compare-and-swap once a process. Raises StorageError where the store ignores them."""
        site = self.url if "://" not in self.url else "/".join(self.url.split("/")[:3])  # a folder, or a bucket
        if (os.getpid(), site) in _probed:
            return
        path = f"{HIDDEN}probe-{uuid.uuid4().hex}"
        try:
            self._probe(path)
        finally:
            self._run(path, lambda: self._backend.delete(path))
        _probed.add((os.getpid(), site))

    def _probe(self, path: str) -> None:
        first = self._attempt(path, b"1", None)
        if first is None or self._attempt(path, b"2", None) is not None:
            raise self._unsafe("create-only writes")
        second = self._attempt(path, b"3", first)
        stale = self._attempt(path, b"4", first)
        if second is None or stale is not None or self._run(path, lambda: self._backend.read(path)) != b"3":
            raise self._unsafe("compare-and-swap")

    def _attempt(self, path: str, data: bytes, tag: str | None) -> str | None:
        """The new tag, None where the condition was refused."""
        try:
            return self._conditional(path, path, data, tag)
        except Stale:
            return None

    def _unsafe(self, what: str) -> StorageError:
        return StorageError(
            f"{self.url}: this store ignores the conditions of {what}, so two writers could both win: "
            "set RAYSD_STORAGE to a local folder or an S3 store with conditional writes"
        )

    def _put(self, path: str, data: bytes, tag: str | None) -> str:
        if not data:  # s3fs and others overwrite silently when nothing is created exclusively
            raise ValueError(f"{path}: a conditional write needs at least one byte")
        return self._conditional(path, _clean(path), data, tag)

    def _conditional(self, path: str, clean: str, data: bytes, tag: str | None) -> str:
        """A conditional write, tried again. After an attempt of unknown outcome a refusal may be due to ourselves."""
        unsure = False

        def attempt() -> str:
            nonlocal unsure
            try:
                return self._backend.put_new(clean, data) if tag is None else self._backend.put_if(clean, data, tag)
            except (FileExistsError, Stale) as error:
                if unsure and (mine := self._written_by_us(clean, data)):
                    return mine
                raise Stale(f"{self._name(path)}: was changed by another since it was read") from error
            except Exception as error:
                unsure = unsure or transient(error)
                raise

        return self._run(path, attempt)

    def _written_by_us(self, clean: str, data: bytes) -> str | None:
        try:
            found, tag = self._backend.read_tagged(clean)
        except FileNotFoundError:
            return None
        return tag if found == data else None

    def _run(self, path: str, work: Callable[[], T], root: str | None = None) -> T:
        """Do it, again while it fails for a passing reason and the deadline allows. Raises the explained error."""
        end, pause = time.monotonic() + self.deadline, 0.1
        while True:
            try:
                return work()
            except RaysdError:
                raise
            except Exception as error:
                wait = pause * random.uniform(0.5, 1.5)
                if not transient(error) or time.monotonic() + wait > end:
                    raise explained(error, self._name(path), self._where(error, root)) from error
            time.sleep(wait)
            pause = min(2 * pause, 3.0)

    def _where(self, error: Exception, root: str | None) -> str:
        """A download may fail on the disk it goes to as well as in the store."""
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        return root if root and full else self.url

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url


def _reopen(url: str, deadline: float) -> Storage:
    return Storage(url, deadline=deadline)


def _require_folder(root: Path) -> None:
    """Raises RequestError where `root` is no folder and cannot become one: to read it would find nothing, in silence."""
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise RequestError(f"RAYSD_STORAGE {there} is not a folder: give one, or s3://bucket/folder")


def _backend(url: str) -> Backend:
    protocol, rest = split_protocol(url)
    if protocol is None:
        return Local(Path(url))
    if "::" in url or not rest:
        raise RequestError(f"{url}: not a storage URL: give a folder or s3://bucket/folder")
    return S3("s3", rest) if protocol in ("s3", "s3a") else Remote(protocol, rest)


def _clean(path: str) -> str:
    """A plain relative path, as it is. Raises RequestError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.startswith(HIDDEN) for part in parts) or "\\" in path or "\0" in path:
        raise RequestError(f"{path!r}: not a path in a store: give names joined by '/', without '.', '..' or '\\'")
    return path
