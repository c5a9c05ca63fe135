"""Captions beside pictures (.txt, .caption) and in tables (captions.csv, metadata.jsonl), each picture's or nothing."""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from raysd.data.place import File, locate, read_bytes
from raysd.errors import DataError
from raysd.words import is_text, shown

SIDECARS = (".txt", ".caption")
TABLES = ("captions.csv", "metadata.csv", "captions.jsonl", "metadata.jsonl")
"""`metadata.*` with file_name and text is what the datasets library writes."""
FILE_KEYS = ("file_name", "file", "filename", "image")
CAPTION_KEYS = ("caption", "text", "prompt")
MAX_CAPTION_BYTES = 64 * 2**10
MAX_TABLE_BYTES = 256 * 2**20


class Said(NamedTuple):
    """A caption and where it stands, for messages."""

    caption: str
    where: str


def captions(files: Sequence[File], pictures: Sequence[File]) -> dict[str, str]:
    """{name of a picture: its caption} for those that have one; empty text is none.

    Raises DataError naming the file or row that is broken, contradicts another, or names no picture of the source.
    """
    names = {_key(picture.name): picture.name for picture in pictures}
    found: dict[str, Said] = {}
    for name, said in (*_beside(files, names), *_tables(files, names)):
        if not said.caption:
            continue
        earlier = found.setdefault(name, said)
        if earlier.caption != said.caption:
            raise DataError(f"{shown(name)}: two captions, in {earlier.where} and in {said.where}; keep one of them")
    return {name: said.caption for name, said in found.items()}


def _key(name: str) -> str:
    """Names compare in one Unicode form: macOS writes é as two characters into zips and folders."""
    return unicodedata.normalize("NFC", name)


def _beside(files: Sequence[File], names: Mapping[str, str]) -> Iterator[tuple[str, Said]]:
    """Captions in a file with the stem of its picture, read by several threads: on S3 each costs a request."""
    by_stem: dict[str, list[str]] = {}
    for key, name in names.items():
        by_stem.setdefault(posixpath.splitext(key)[0], []).append(name)
    wanted = [f for f in files if posixpath.splitext(f.name)[1].lower() in SIDECARS]
    wanted = [f for f in wanted if posixpath.splitext(_key(f.name))[0] in by_stem]
    store = locate(wanted[0].path)[0] if wanted else None
    with ThreadPoolExecutor(16) as pool:
        bodies = pool.map(lambda file: _text(file, MAX_CAPTION_BYTES, store), wanted)
        for file, body in zip(wanted, bodies, strict=True):
            said = Said(" ".join(body.split()), shown(file.name))
            yield from ((name, said) for name in by_stem[posixpath.splitext(_key(file.name))[0]])


def _tables(files: Sequence[File], names: Mapping[str, str]) -> Iterator[tuple[str, Said]]:
    for file in files:
        if posixpath.basename(file.name).lower() not in TABLES:
            continue
        rows = _csv_rows if file.name.lower().endswith(".csv") else _jsonl_rows
        for where, row in rows(file, _text(file, MAX_TABLE_BYTES)):
            name = _picture(file, where, row["file_name"], names)
            yield name, Said(" ".join(row["caption"].split()), where)


def _picture(table: File, where: str, named: str, names: Mapping[str, str]) -> str:
    """The picture that a row names, relative to its table's folder or to the source."""
    relative = named.strip().replace("\\", "/")
    for base in (posixpath.dirname(table.name), ""):
        name = names.get(_key(posixpath.normpath(posixpath.join(base, relative))))
        if name is not None:
            return name
    raise DataError(f"{where}: names {shown(named)!r}, which is no picture of the source; correct the row or remove it")


def _csv_rows(file: File, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as {file_name, caption}. Row 1 is the header and empty rows count, as in a spreadsheet."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        picture, caption = (header.index(key) for key in _keys(f"{shown(file.name)} row 1", header))
        for number, row in enumerate(reader, start=2):
            where = f"{shown(file.name)} row {number}"
            if row and len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields, the header has {len(header)}; quote captions with commas")
            if row:
                yield where, {"file_name": row[picture], "caption": row[caption]}
    except csv.Error as error:
        raise DataError(f"{shown(file.name)} line {reader.line_num}: not CSV: {error}") from None


def _jsonl_rows(file: File, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{shown(file.name)} row {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {shown(str(error))}") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}: not an object like {{"file_name": …, "text": …}}')
        picture, caption = _keys(where, list(row))
        if not isinstance(row[picture], str) or not isinstance(row[caption] or "", str):
            raise DataError(f"{where}: {picture} and {caption} must be text")
        if not is_text(row[picture] + (row[caption] or "")):
            raise DataError(f"{where}: half a character (\\ud8xx alone); write the character itself")
        yield where, {"file_name": row[picture], "caption": row[caption] or ""}


def _keys(where: str, given: Sequence[str]) -> tuple[str, str]:
    """Which keys hold the picture and the caption. Raises DataError where none or more than one of them could."""
    chosen = []
    for meaning, known in (("picture", FILE_KEYS), ("caption", CAPTION_KEYS)):
        held = [key for key in known if key in given]
        if len(held) != 1 or list(given).count(held[0]) != 1:
            problem = f"more than one {meaning}: {', '.join(held)}" if held else f"no {meaning}"
            raise DataError(f"{where}: {problem}; one of {', '.join(known)} is needed")
        chosen.append(held[0])
    return chosen[0], chosen[1]


def _text(file: File, limit: int, store: Any = None) -> str:
    if file.size > limit:
        raise DataError(f"{shown(file.name)}: larger than {limit >> 10} KiB, too much for captions")
    try:
        return read_bytes(file.path, limit, store).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{shown(file.name)}: not UTF-8 text; save it as UTF-8") from None
