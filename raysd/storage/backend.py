"""What a store has to be able to do, and the small things that all stores share."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

HIDDEN = ".raysd-"
"""Names that begin like this are the store's own (locks, half-written files, probes) and are not listed."""


class Entry(NamedTuple):
    """One object: its path under the storage's root, its size in bytes, and when it was written.

    `modified` is in epoch seconds by the *store's* clock (see `Storage.now`). A folder, listed only where the
    listing is not recursive, has a path that ends with "/", and 0 for both numbers.
    """

    path: str
    size: int
    modified: float


class Conflict(Exception):
    """The store refused a conditional write because another one was under way: try again (HTTP 409)."""


class Backend(Protocol):
    """One kind of store. Failures leave as the library's own exceptions; `Storage` retries and explains them.

    A missing object is FileNotFoundError; a condition that does not hold is FileExistsError in `put_new` and
    Stale in `put_if`.
    """

    def read(self, path: str) -> bytes: ...
    def read_tagged(self, path: str) -> tuple[bytes, str]: ...
    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]: ...
    def put(self, path: str, data: bytes) -> None: ...
    def put_new(self, path: str, data: bytes) -> str: ...
    def put_if(self, path: str, data: bytes, tag: str) -> str: ...
    def upload(self, local: Path, path: str) -> None: ...
    def download(self, path: str, local: Path) -> None: ...
    def stat(self, path: str) -> Entry: ...
    def list(self, prefix: str, recursive: bool) -> list[Entry]: ...
    def delete(self, path: str) -> None: ...
    def delete_tree(self, prefix: str) -> None: ...
    def now(self) -> float: ...
    def sweep(self, older: float) -> int: ...
    def file(self, path: str) -> Path | None: ...


def digest(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces, as 64 hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
