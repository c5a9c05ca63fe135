"""A folder on one host. Every write is a temporary file in the same folder, flushed to disk, then renamed or linked.

Compare-and-swap holds a lock file while it compares and renames. POSIX record locks are used, not flock: they belong to
the process, so the kernel frees them however it ends, and a forked child does not keep its parent's lock.
They do not exclude threads of one process, hence the mutex.
"""

import errno
import fcntl
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from raysd.errors import Stale, StorageError
from raysd.storage.backend import HIDDEN, Entry, digest

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_mutex = threading.Lock()


def _fresh_mutex() -> None:
    """A child forked while another thread held the mutex would wait for ever."""
    global _mutex
    _mutex = threading.Lock()


os.register_at_fork(after_in_child=_fresh_mutex)


class Local:
    """A local folder as a store. The tag of an object is the SHA-256 of its content."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str) -> Path:
        return self.root / path

    def read(self, path: str) -> bytes:
        return self.file(path).read_bytes()

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, digest(data)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self.file(path).open("rb") as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]

    def put(self, path: str, data: bytes) -> None:
        with self._written(path, data) as temporary:
            self._rename(temporary, self.file(path))

    def put_new(self, path: str, data: bytes) -> str:
        with self._written(path, data) as temporary:
            try:
                os.link(temporary, self.file(path))  # fails where the name exists, and shows the whole content at once
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._rename_new(temporary, self.file(path))
        _flush_folder(self.file(path).parent)
        return digest(data)

    def put_if(self, path: str, data: bytes, tag: str) -> str:
        if not self.file(path).parent.is_dir():
            raise Stale(f"{path}: it no longer exists")
        with self._written(path, data) as temporary, _locked(self.file(path).parent):
            try:
                current = digest(self.read(path))
            except FileNotFoundError:
                current = ""
            if current != tag:
                raise Stale(f"{path}: it was changed since it was read")
            self._rename(temporary, self.file(path))
        return digest(data)

    def upload(self, local: Path, path: str) -> None:
        with local.open("rb") as source, self._temporary(path) as (temporary, target):
            shutil.copyfileobj(source, target, 1 << 20)
            _flush(target)
            self._rename(temporary, self.file(path))

    def download(self, path: str, local: Path) -> None:
        shutil.copyfile(self.file(path), local)

    def stat(self, path: str) -> Entry:
        if not self.file(path).is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        status = self.file(path).stat()
        return Entry(path, status.st_size, status.st_mtime)

    def list(self, prefix: str, recursive: bool) -> list[Entry]:
        return sorted(self._entries(self.file(prefix) if prefix else self.root, recursive))

    def delete(self, path: str) -> None:
        with suppress(NotADirectoryError):
            self.file(path).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        for last in (False, False, True):
            try:
                return shutil.rmtree(self.file(prefix))
            except FileNotFoundError:
                if not self.file(prefix).exists():
                    return None
            except OSError as error:  # somebody wrote into it meanwhile
                if last or error.errno != errno.ENOTEMPTY:
                    raise

    def now(self) -> float:
        """The file system's clock, which on a network mount is not this host's."""
        with self._temporary("now") as (_, target):
            return os.fstat(target.fileno()).st_mtime

    def sweep(self, older: float) -> int:
        """Delete the half-written files that dead processes left. Returns how many."""
        swept, now = 0, self.now()
        for folder, _, names in os.walk(self.root):
            for temporary in (Path(folder, name) for name in names if name.startswith(HIDDEN + "tmp-")):
                with suppress(FileNotFoundError):
                    if now - temporary.stat().st_mtime > older:
                        temporary.unlink()
                        swept += 1
        return swept

    def _entries(self, folder: Path, recursive: bool) -> Iterator[Entry]:
        try:
            children = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for child in children:
            path = Path(child.path).relative_to(self.root).as_posix()
            if child.name.startswith(HIDDEN):
                continue
            if not child.is_dir():
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    status = child.stat()
                    yield Entry(path, status.st_size, status.st_mtime)
            elif recursive:
                yield from self._entries(Path(child.path), recursive)
            else:
                yield Entry(path + "/", 0, 0.0)

    @contextmanager
    def _temporary(self, path: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A new hidden file beside `path`, with the user's umask; it is gone afterwards unless it was renamed."""
        folder = self.file(path).parent
        _make(folder)
        temporary = folder / f"{HIDDEN}tmp-{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as target:
                yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _written(self, path: str, data: bytes) -> Iterator[Path]:
        with self._temporary(path) as (temporary, target):
            target.write(data)
            _flush(target)
            yield temporary

    def _rename(self, temporary: Path, target: Path) -> None:
        os.replace(temporary, target)
        _flush_folder(target.parent)

    def _rename_new(self, temporary: Path, target: Path) -> None:
        """Create-only where the file system has no hard links: every creator there comes this way, under the lock."""
        with _locked(target.parent):
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.replace(temporary, target)


def _make(folder: Path) -> None:
    """Raises StorageError where there can be no such folder: as a write's error it would read as an object's absence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise StorageError(f"{folder}: cannot be made a folder ({error.strerror}): set RAYSD_STORAGE") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process and thread at a time, for all objects of a folder. Raises StorageError where locks do not work."""
    with _mutex:
        descriptor = _lock(folder / f"{HIDDEN}lock")
        try:
            yield
        finally:
            os.close(descriptor)


def _lock(path: Path) -> int:
    """An open, locked descriptor of the lock file there is now: a deleted tree may have taken the one we opened."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            raise StorageError(f"{path}: this file system cannot lock files: use a local disk or S3") from error
        os.close(descriptor)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename or link survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
