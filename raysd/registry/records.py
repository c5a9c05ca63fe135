"""What the registry stores, as values, and where: paths, names and references.

blobs/sha256/<ab>/<sha256>              a file's bytes
models/<model>/versions/<n>.json        a manifest: create-only, written after all its blobs
models/<model>/keys/<sha256 of key>.json    the number that a publication has or tries to get
models/<model>/aliases/<alias>.json     where an alias points, with every move it made
models/<model>/withdrawn/<n>.json       a version taken out of use, and why
pins/<id>.json                          blobs that collection may not take for now
gc/                                     the collector's lease, and what it is about to delete
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from raysd.errors import RequestError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_REFERENCE = re.compile(rf"(?P<model>{NAME.pattern})(?:@(?P<number>[1-9][0-9]*)|:(?P<alias>{NAME.pattern}))?")


class File(NamedTuple):
    """One file of a version: its path in it, its digest, its size in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Version:
    """A published version. `digest` is the sha256 of its manifest's bytes; `record` is its lineage as it was given."""

    model: str
    number: int
    digest: str
    created: str
    files: tuple[File, ...]
    record: dict[str, Any]
    key: str
    withdrawn: bool = False

    @property
    def ref(self) -> str:
        return f"{self.model}@{self.number}"


@dataclass(frozen=True)
class Model:
    name: str
    versions: list[int]
    aliases: dict[str, int]
    withdrawn: list[int]


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias. `seq` counts from 1; `kind` is "move" or "rollback"; `previous` is None for the first."""

    model: str
    alias: str
    seq: int
    kind: str
    version: int
    digest: str
    previous: int | None
    moved: str


class Reference(NamedTuple):
    model: str
    number: int | None
    alias: str | None


def parse(ref: str) -> Reference:
    """`cats@3`, `cats:production` or `cats`. Raises RequestError."""
    match = _REFERENCE.fullmatch(ref)
    if match is None:
        raise RequestError(f"{ref!r}: not a version: give model@number, model:alias or model")
    number = match["number"]
    return Reference(match["model"], int(number) if number else None, match["alias"])


def check_name(name: str, what: str) -> str:
    """`name`. Raises RequestError where it is not a name of a model or alias."""
    if NAME.fullmatch(name) is None:
        raise RequestError(f"{what} {name!r}: use a-z, 0-9, '.', '_' and '-', at most 63, first a letter or digit")
    return name


def blob_path(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_path(model: str, number: int) -> str:
    return f"models/{model}/versions/{number}.json"


def withdrawn_path(model: str, number: int) -> str:
    return f"models/{model}/withdrawn/{number}.json"


def alias_path(model: str, alias: str) -> str:
    return f"models/{model}/aliases/{alias}.json"


def timestamp() -> str:
    """Now, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
