"""A manifest's bytes: made from a publication, and read with distrust. And which files a version may have at all."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from raysd.errors import IntegrityError, RequestError
from raysd.registry.records import File, Version, manifest_path
from raysd.storage import digest

SUFFIXES = {".safetensors", ".json", ".txt", ".md"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def pack(model: str, number: int, key: str, created: str, files: Iterable[File], record: Mapping[str, Any]) -> bytes:
    """The manifest as JSON, with a digest over its own content. Raises RequestError if `record` is not plain JSON."""
    body = {
        "schema": 1,
        "model": model,
        "number": number,
        "key": key,
        "created": created,
        "files": [file._asdict() for file in files],
        "record": dict(record),
    }
    try:
        return json.dumps(body | {"check": _check(body)}, sort_keys=True, allow_nan=False, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"record of {model}: not plain JSON, and NaN is not: {error}") from None


def unpack(data: bytes, model: str, number: int, withdrawn: bool) -> Version:
    """The version that a manifest describes. Raises IntegrityError where it is damaged or belongs elsewhere."""
    name = f"{model}@{number} ({manifest_path(model, number)})"
    try:
        body = json.loads(data)
        check = body.pop("check")
        files = tuple(File(str(file["path"]), str(file["sha256"]), int(file["size"])) for file in body["files"])
        whole = check == _check(body) and (body["model"], body["number"]) == (model, number)
        if not whole or any(_SHA256.fullmatch(file.sha256) is None for file in files):
            raise ValueError("not what was published")
        check_paths(file.path for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, RequestError) as error:
        raise IntegrityError(f"{name}: the manifest is damaged ({error}): restore it or use another version") from None
    return Version(model, number, digest(data), body["created"], files, body["record"], body["key"], withdrawn)


def check_paths(paths: Iterable[str]) -> None:
    """Raises RequestError naming a path that could leave the version's folder, or a kind of file that is refused."""
    known = set(paths)
    if not known:
        raise RequestError("a version needs at least one file")
    for path in known:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f\x7f]", path):
            raise RequestError(f"{path!r}: not a path inside a version: give names joined by '/'")
        _check_suffix(path)
        for parent in PurePosixPath(path).parents:
            if str(parent) in known:
                raise RequestError(f"{path!r}: {str(parent)!r} is a file of the same version")


def check_content(path: str, local: Path) -> None:
    """Raises RequestError where a file is a pickle or an archive under another name, or no safetensors file."""
    try:
        with local.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise RequestError(f"{path}: {local} cannot be read: {error.strerror}") from None
    if path.endswith(".safetensors"):
        # Its first 8 bytes are a length and may look like anything.
        if head[8:9] != b"{" or int.from_bytes(head[:8], "little") > local.stat().st_size - 8:
            raise RequestError(f"{path}: not a safetensors file: write it with safetensors")
    elif head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] <= b"\x05"):
        raise RequestError(f"{path}: a pickle or zip archive under another name: the registry takes safetensors only")


def _check_suffix(path: str) -> None:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _PICKLES:
        raise RequestError(f"{path}: a pickle runs code when it is loaded: convert it to safetensors")
    if suffix not in SUFFIXES:
        raise RequestError(f"{path}: a version has only {', '.join(sorted(SUFFIXES))} files")


def _check(body: dict[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True, allow_nan=False).encode())
