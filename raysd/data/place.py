"""Where a source's files lie and how their bytes are read: this machine or an allowed fsspec store, nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from raysd.errors import DataError, StorageError
from raysd.words import is_text, shown

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory", "file")
"""No http here (it would follow redirects to anywhere: see download.py), and no protocol that wraps another."""


class File(NamedTuple):
    """A file of a source: its name relative to the source, the path that reads it from any node, its size in bytes."""

    name: str
    path: str
    size: int


def locate(path: str) -> tuple[Any, str]:
    """The fsspec file system of an absolute local path or an allowed URL, and the path inside it. Raises DataError."""
    if "://" not in path:
        return fsspec.filesystem("file"), path
    protocol = path.split("://", 1)[0].lower()
    if protocol not in PROTOCOLS:
        raise DataError(
            f"{shown(path)}: {shown(protocol, 20)}:// is not read; use a folder, http(s) or {', '.join(PROTOCOLS[:6])}"
        )
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise DataError(f"{shown(path)}: {protocol}:// needs another package: {error}") from None
    return kind(**kind._get_kwargs_from_urls(path)), kind._strip_protocol(path)


def read_bytes(path: str, limit: int, store: Any = None) -> bytes:
    """At most `limit` bytes of a file, in one request. `store` is its file system, where the caller has it already.

    Raises DataError where the file is gone, forbidden or larger; StorageError where the store itself failed.
    """
    found, inner = locate(path) if store is None else (store, store._strip_protocol(path) if "://" in path else path)
    try:
        body = found.cat_file(inner, start=0, end=limit + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{shown(path)}: {type(error).__name__}") from None
    except Exception as error:  # botocore's and aiohttp's errors are not OSErrors
        if "InvalidRange" in str(error) or "requested range is not" in str(error):  # S3's answer for an empty object
            return b""
        raise StorageError(f"{shown(path)}: cannot be read: {shown(str(error), 200)}") from error
    if len(body) > limit:
        raise DataError(f"{shown(path)}: larger than {limit >> 20} MiB")
    return body


ODD = {"linked folder": "not followed", "broken link": "left out", "special file": "left out"}
"""What a local folder holds besides files and folders, and what becomes of it."""


def walk(root: str) -> tuple[list[File], list[tuple[str, str]]]:
    """All files under a local folder or a URL, in the order of their names, and (kind, name) of what is `ODD` in it.

    Hidden ones are left out. Raises StorageError where the store refuses.
    """
    if "://" in root:
        return sorted(_remote(root)), []
    found = sorted((path.relative_to(root).as_posix(), path) for path in _local(Path(root)))
    odd = {name: kind for name, path in found if (kind := _odd(path))}
    files = [File(name, str(path), path.stat().st_size) for name, path in found if name not in odd]
    return files, [(kind, name) for name, kind in odd.items()]


def hidden(name: str) -> bool:
    """Whether a file is one that systems leave behind: in a part that starts with a dot, or macOS' resource forks."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _local(root: Path) -> Iterator[Path]:
    """Everything but folders and what is hidden; links to folders too, which are not followed."""
    for folder, folders, names in os.walk(root):
        for name in (*names, *(name for name in folders if Path(folder, name).is_symlink())):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not is_text(relative):
                raise DataError(f"{shown(relative)}: a file name that is not UTF-8; rename it")
            if not hidden(relative):
                yield path


def _odd(path: Path) -> str | None:
    """Its kind in `ODD`; None for a file."""
    if path.is_file():
        return None
    return "linked folder" if path.is_dir() else "special file" if path.exists() else "broken link"


def _remote(root: str) -> Iterator[File]:
    store, inner = locate(root)
    try:
        found = store.find(inner, detail=True)
    except Exception as error:  # botocore's and aiohttp's errors are not OSErrors
        raise StorageError(f"{shown(root)}: cannot be listed: {shown(str(error), 200)}") from error
    prefix = inner.rstrip("/") + "/"
    for path, info in found.items():
        name = path.removeprefix(prefix)
        if name and not name.endswith("/") and not hidden(name):
            yield File(name, store.unstrip_protocol(path), int(info["size"] or 0))
