"""Open what `data.source` names: a folder, a zip, a URL of a zip, or a bucket. The pictures stay where they are."""

import posixpath
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raysd.data.archive import unpack
from raysd.data.captions import SIDECARS, TABLES, captions
from raysd.data.download import download, fetch
from raysd.data.picture import MAX_BYTES, MAX_PIXELS, SUFFIXES, read_picture
from raysd.data.place import ODD, File, locate, walk
from raysd.errors import DataError
from raysd.storage import Storage
from raysd.words import counted, named, shown

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Entry", "Source", "open_source", "read_picture"]

OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl")


@dataclass(frozen=True)
class Entry:
    """One picture of a source."""

    path: str
    """Absolute local path, or a URL that fsspec reads from any node."""
    name: str
    """Relative to the source; for messages."""
    caption: str | None
    folder: str
    """The folder part of `name`; empty at the top."""


@dataclass(frozen=True)
class Source:
    """Pictures with their captions, in the order of their names, and what was noticed while listing them."""

    entries: list[Entry]
    origin: str
    """What was opened, without passwords and signatures."""
    notes: list[str] = field(default_factory=list)


def open_source(source: str, uploads: Storage) -> Source:
    """List a folder, a bucket or `sample`; a zip (local, http(s), s3://…) is first unpacked to `uploads`/<sha256>.

    Raises DataError (no such source, broken or hostile archive, refused address, broken captions), StorageError.
    """
    if not source.strip() or "\0" in source:
        raise DataError("data.source is empty; name a folder, a zip, a URL or `sample`")
    if source == "sample":
        return _source(*walk(str(_sample())), origin=source)
    scheme = source.split("://", 1)[0].lower() if "://" in source else ""
    if scheme in ("http", "https"):
        return _from_web(source, uploads)
    return _from_store(source, uploads) if scheme else _from_disk(source, uploads)


def public(url: str) -> str:
    """A URL without what may be secret in it, for a message."""
    return shown(without_secrets(url), 200)


def without_secrets(source: str) -> str:
    """A source, where it is a URL without user, password and query."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return source
    rest = rest.split("?", 1)[0].split("#", 1)[0]
    host, slash, path = rest.partition("/")
    # abfs://container@account is an address; elsewhere, what stands before @ is a credential.
    host = host if scheme.startswith(("abfs", "az")) else host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}"


def _sample() -> Path:
    from raysd.assets import asset

    try:
        return asset("sample")
    except FileNotFoundError as error:
        raise DataError(f"data.source sample: {error}") from None


def _from_web(url: str, uploads: Storage) -> Source:
    with tempfile.TemporaryDirectory(prefix="raysd-") as folder:
        archive = Path(folder, "source.zip")
        download(url, archive)
        return _source(unpack(archive, uploads, public(url)), origin=public(url))


def _from_store(url: str, uploads: Storage) -> Source:
    if "::" in url:
        raise DataError(f"{public(url)}: chained URLs (::) are not read; copy the data to one place")
    store, inner = locate(url)
    if not inner.lower().endswith(".zip"):
        return _source(*walk(url), origin=public(url))
    with tempfile.TemporaryDirectory(prefix="raysd-") as folder:
        archive = Path(folder, "source.zip")
        fetch(store, inner, archive, public(url))
        return _source(unpack(archive, uploads, public(url)), origin=public(url))


def _from_disk(source: str, uploads: Storage) -> Source:
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return _source(*walk(str(path)), origin=shown(source, 200))
    if path.is_file():
        return _source(unpack(path, uploads, shown(source, 200)), origin=shown(source, 200))
    raise DataError(f"{shown(source, 200)}: no such folder or zip (data.source takes these, a URL, or `sample`)")


def _source(files: Sequence[File], odd: Sequence[tuple[str, str]] = (), *, origin: str) -> Source:
    pictures = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    if not pictures:
        rest = "; ".join([counted(len(files), "other file"), *_odd_notes(odd)])
        raise DataError(f"{origin}: no JPEG, PNG or WebP in it ({rest})")
    said = captions(files, pictures)
    entries = [Entry(f.path, f.name, said.get(f.name), posixpath.dirname(f.name)) for f in pictures]
    return Source(entries, origin, [*_notes(files, pictures), *_odd_notes(odd)])


def _odd_notes(odd: Sequence[tuple[str, str]]) -> list[str]:
    """What is no file: a linked folder may hold the pictures, a broken link may stand for one."""
    kinds = {kind: [name for found, name in odd if found == kind] for kind in ODD}
    return [f"{counted(len(names), kind)} {ODD[kind]}: {named(names)}" for kind, names in kinds.items() if names]


def _notes(files: Sequence[File], pictures: Sequence[File]) -> list[str]:
    """What else lies in the source: nothing of it is used, and nothing of it is passed over in silence."""
    taken = {file.name for file in pictures}
    stems = {posixpath.splitext(name)[0] for name in taken}
    rest = [f.name for f in files if f.name not in taken and posixpath.basename(f.name).lower() not in TABLES]
    unread = [name for name in rest if name.lower().endswith(OTHER_PICTURES)]
    texts = [name for name in rest if name.lower().endswith(SIDECARS)]
    strays = [name for name in texts if posixpath.splitext(name)[0] not in stems]
    others = [name for name in rest if name not in set(unread) and name not in set(texts)]
    found = (
        (unread, "picture", "left out, convert to JPEG, PNG or WebP"),
        (strays, "text file", "without a picture of that name, not used"),
        (others, "file", "neither picture nor caption, not used"),
    )
    return [f"{counted(len(names), noun)} {what}: {named(names)}" for names, noun, what in found if names]
