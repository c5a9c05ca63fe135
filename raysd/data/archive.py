"""Unpack a zip that nobody vouches for into content-addressed storage. Names inside it never become paths."""

import hashlib
import json
import posixpath
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from raysd.data.captions import SIDECARS, TABLES
from raysd.data.picture import MAX_BYTES, SUFFIXES
from raysd.data.place import File, hidden
from raysd.errors import DataError, NotFound
from raysd.storage import Storage
from raysd.words import shown

MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 64 * 2**20
"""Of the zip's table of contents, which Python reads whole before anything can be judged."""
MAX_UNPACKED_BYTES = 64 * 2**30
MAX_RATIO = 100
"""Largest growth, of the whole and of each member beyond a first MiB; pictures hardly compress."""
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, OverflowError)
"""What zipfile raises for archives that are cut, damaged or made up."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
WRITERS = 16
FRESH_SECONDS = 86_400.0
"""From this age on a use marks an unpacked archive as used now."""
KEPT_SECONDS = 90 * 86_400.0

_END, _END_64 = b"PK\x05\x06", b"PK\x06\x06"


def unpack(archive: Path, uploads: Storage, origin: str) -> list[File]:
    """Judge a zip, copy its pictures and captions to `uploads`/<its sha256>/<number><suffix>, and list all its files.

    Done once: `index.json`, written last, says that a zip was unpacked before, and by its age when it was last named.
    A file that is neither picture nor caption is listed and not copied. Raises DataError naming what is wrong with the
    archive and which member.
    """
    with archive.open("rb") as body:
        digest = hashlib.file_digest(body, "sha256").hexdigest()
        place = uploads.child(digest)
        try:
            index = json.loads(place.read("index.json"))
            if _unused(uploads, digest) > FRESH_SECONDS:
                place.write("index.json", json.dumps(index).encode())
        except NotFound:
            forget(uploads)
            index = _copy(body, place, origin)
            place.write("index.json", json.dumps(index).encode())
    return sorted(File(name, address(place, file) if file else "", size) for name, file, size in index)


def forget(uploads: Storage) -> None:
    """Remove unpacked archives that no source named for `KEPT_SECONDS`; the index goes first."""
    for entry in uploads.list(recursive=False):
        with suppress(NotFound):  # an archive that is being unpacked has no index
            if entry.path.endswith("/") and _unused(uploads, entry.path.rstrip("/")) > KEPT_SECONDS:
                uploads.delete(f"{entry.path}index.json")
                uploads.delete_tree(entry.path)


def _unused(uploads: Storage, digest: str) -> float:
    """Seconds since an archive was named last. Raises NotFound."""
    return uploads.now() - uploads.stat(f"{digest}/index.json").modified


def address(place: Storage, file: str) -> str:
    """What reads a stored file from any node: its URL, or its absolute path where the storage is a local folder."""
    return str(place.local_path(file) or f"{place.url}/{file}")


def _copy(body: IO[bytes], place: Storage, origin: str) -> list[tuple[str, str, int]]:
    """[(name in the zip, file in the storage or "", bytes)]"""
    try:
        _judge_directory(body, origin)
        with zipfile.ZipFile(body) as zipped:
            members = list(_members(zipped, body.seek(0, 2), origin))
            return _write_all(zipped, members, place, origin)
    except BROKEN as error:
        raise DataError(f"{origin}: not a whole zip: {shown(str(error), 120)}") from None


def _judge_directory(body: IO[bytes], origin: str) -> None:
    """Refuse a table of contents too large to be read, from the end record alone (APPNOTE 4.3.14, 4.3.16)."""
    size = body.seek(0, 2)
    body.seek(max(0, size - 66_000))
    tail = body.read()
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        raise DataError(f"{origin}: not a zip; data.source takes a folder, a zip or a bucket")
    length = int.from_bytes(tail[end + 12 : end + 16], "little")
    large = tail.rfind(_END_64)
    if large >= 0:  # a zip64 end record counts as soon as there is one, so the larger of the two is judged
        length = max(length if length != 0xFFFFFFFF else 0, int.from_bytes(tail[large + 40 : large + 48], "little"))
    if length > MAX_DIRECTORY_BYTES:
        raise DataError(f"{origin}: a table of contents of {length:,} bytes; at most {MAX_MEMBERS:,} files are read")


def _members(zipped: zipfile.ZipFile, size: int, origin: str) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    """Files with their cleaned names, hidden ones left out, after the archive as a whole was found harmless."""
    members = zipped.infolist()
    total = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS:
        raise DataError(f"{origin}: {len(members):,} files; at most {MAX_MEMBERS:,} are read from a zip, use a bucket")
    if total > MAX_UNPACKED_BYTES or total > MAX_RATIO * size + 2**20:
        raise DataError(f"{origin}: {total:,} bytes unpacked from {size:,}: refused as a zip bomb")
    seen: set[str] = set()
    for member in members:
        name = _name(member, origin)
        _judge(member, name, origin)
        if member.is_dir() or hidden(name):
            continue
        if name in seen:
            raise DataError(f"{origin}: holds {shown(name)} twice; pack it again")
        seen.add(name)
        yield member, name


def _name(member: zipfile.ZipInfo, origin: str) -> str:
    """A relative name with forward slashes. Raises DataError where it climbs out of the archive."""
    name = _decoded(member).replace("\\", "/")
    if not name or "\0" in name:
        raise DataError(f"{origin}: {shown(name)!r} is no name for a file: refused")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise DataError(f"{origin}: {shown(name)!r} leads out of the archive: refused")
    return posixpath.normpath(name)


def _decoded(member: zipfile.ZipInfo) -> str:
    """Info-ZIP and macOS write UTF-8 without the flag that says so, which zipfile reads as code page 437."""
    name = member.orig_filename
    if member.flag_bits & 0x800:
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _judge(member: zipfile.ZipInfo, name: str, origin: str) -> None:
    """Refuse what a plain zip of pictures has no use for."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    where = f"{origin}: {shown(name)}"
    if member.flag_bits & 0x1:
        raise DataError(f"{where} is encrypted; pack the pictures without a password")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{where} is a link or a special file: refused; pack the files themselves")
    if member.compress_type not in METHODS:
        raise DataError(f"{where} is compressed by method {member.compress_type}; pack with deflate")
    if member.file_size > 2**20 and member.file_size > MAX_RATIO * member.compress_size:
        raise DataError(f"{where} grows more than {MAX_RATIO} times: refused as a zip bomb")


def _write_all(
    zipped: zipfile.ZipFile, members: Sequence[tuple[zipfile.ZipInfo, str]], place: Storage, origin: str
) -> list[tuple[str, str, int]]:
    """Copy by several threads, with only a few members in memory at a time."""
    index, pending = [], list[Future[None]]()
    with ThreadPoolExecutor(WRITERS) as pool:
        for number, (member, name) in enumerate(members):
            file = f"{number:06d}{posixpath.splitext(name)[1].lower()}" if _wanted(name) else ""
            index.append((name, file, member.file_size))
            if not file:
                continue
            pending.append(pool.submit(place.write, file, _read(zipped, member, f"{origin}: {shown(name)}")))
            if len(pending) >= WRITERS:
                pending.pop(0).result()
        for write in pending:
            write.result()
    return index


def _wanted(name: str) -> bool:
    lower = name.lower()
    return lower.endswith((*SUFFIXES, *SIDECARS)) or posixpath.basename(lower) in TABLES


def _read(zipped: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> bytes:
    """The bytes of a member, never more than a picture may have, whatever its header declares."""
    try:
        with zipped.open(member) as file:
            body = file.read(MAX_BYTES + 1)
    except BROKEN as error:
        raise DataError(f"{where} is damaged ({error}); pack the archive again") from None
    if len(body) > MAX_BYTES:
        raise DataError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
    return body
