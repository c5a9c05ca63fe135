"""What users liked, as a data set folder that `raysd train` takes; and what they preferred, as pairs.

<folder>/<generation>.png      metadata.jsonl: {"file_name", "text", …}       pairs.jsonl: {"prompt", "chosen", "rejected", …}
"""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from raysd.database import Database
from raysd.errors import NotFound, RequestError
from raysd.feedback.opinions import Opinion, by_id, opinions, preferences
from raysd.feedback.tables import GenerationRow
from raysd.storage import Storage, digest
from raysd.storage.failures import explained

READERS = 8


@dataclass(frozen=True)
class Liked:
    """Which generations are taken: more thumbs up than down, or mean stars of at least `stars`; None asks for neither."""

    thumb: bool = True
    stars: float | None = 4

    def takes(self, said: Sequence[Opinion]) -> bool:
        """Whether users liked it. What one of them reported, or more found bad than good, they did not."""
        thumbs = Counter(opinion.thumb for opinion in said)
        given = [opinion.stars for opinion in said if opinion.stars is not None]
        if any(opinion.reported for opinion in said) or thumbs["down"] > thumbs["up"]:
            return False
        starred = self.stars is not None and bool(given) and sum(given) / len(given) >= self.stars
        return starred or (self.thumb and thumbs["up"] > thumbs["down"])


@dataclass(frozen=True)
class Exported:
    """How many rows were written, and how many could not be: their pictures are gone, or not what was drawn."""

    written: int
    left_out: int


def export(
    database: Database, storage: Storage, to: Path, *, model: str | None = None, liked: Liked = Liked()
) -> Exported:
    """Write the folder `to` of liked pictures and their prompts, whole or not at all; never withheld or deleted ones.

    Raises RequestError where the folder exists or nothing is liked.
    """
    with database.reading() as session:
        said = opinions(session, model)
        wanted = _usable(session, (id for id, given in said.items() if liked.takes(given)))
    if not wanted:
        raise RequestError("nothing to export: no generation with a prompt and a picture is liked so; ask for less")
    with _whole(to) as folder:
        there = _copy(database, storage, wanted, folder)
        rows = [_captioned(wanted[id], said[id]) for id in sorted(there)]
        _write(folder / "metadata.jsonl", rows)
    return Exported(len(rows), len(wanted) - len(rows))


def export_pairs(database: Database, storage: Storage, to: Path, *, model: str | None = None) -> Exported:
    """Write the folder `to` of pairs.jsonl and its pictures: of two with the same prompt, which more users preferred.

    It is no data set to train on as it stands: the rejected are in it. Raises as `export`.
    """
    with database.reading() as session:
        votes: dict[tuple[str, str], Counter[str | None]] = {}
        for one in preferences(session, model):
            left, right = sorted((one.left, one.right))
            votes.setdefault((left, right), Counter())[one.chosen] += 1
        found = _usable(session, (id for pair in votes for id in pair))
    chosen = {pair: _ordered(pair, count) for pair, count in votes.items() if count[pair[0]] != count[pair[1]]}
    pairs = [pair for pair in chosen.values() if {*pair} <= {*found} and found[pair[0]].prompt == found[pair[1]].prompt]
    if not pairs:
        raise RequestError("nothing to export: no two generations with one prompt of which users preferred one")
    with _whole(to) as folder:
        there = _copy(database, storage, {id: found[id] for pair in pairs for id in pair}, folder)
        rows = [_preferred(found[good], found[bad]) for good, bad in sorted(pairs) if {good, bad} <= there]
        _write(folder / "pairs.jsonl", rows)
    return Exported(len(rows), len(pairs) - len(rows))


def _usable(session: Session, ids: Iterable[str]) -> dict[str, GenerationRow]:
    found = by_id(session, ids)
    return {id: row for id, row in found.items() if row.deleted is None and row.path is not None and row.prompt}


def _ordered(pair: tuple[str, str], votes: Counter[str | None]) -> tuple[str, str]:
    """(chosen, rejected)"""
    return pair if votes[pair[0]] > votes[pair[1]] else (pair[1], pair[0])


@contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its name at the end, and is gone if anything fails."""
    if to.exists():
        raise RequestError(f"--out {to}: exists; name a folder that does not")
    scratch = to.with_name(f".{to.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.rename(scratch, to)
    except OSError as error:
        raise explained(error, str(to), str(to.parent)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy(database: Database, storage: Storage, wanted: Mapping[str, GenerationRow], folder: Path) -> set[str]:
    """Write the pictures; the ids of those that are there. One that is deleted meanwhile is not."""

    def copy(row: GenerationRow) -> str | None:
        try:
            body = storage.read(str(row.path))
        except NotFound:
            return None
        if digest(body) != row.sha256:
            return None
        (folder / f"{row.id}.png").write_bytes(body)
        return row.id

    with ThreadPoolExecutor(READERS) as pool:
        copied = {id for id in pool.map(copy, wanted.values()) if id is not None}
    with database.reading() as session:
        there = copied & {*_usable(session, copied)}
    for id in copied - there:
        (folder / f"{id}.png").unlink()
    return there


def _captioned(row: GenerationRow, said: Sequence[Opinion]) -> dict[str, Any]:
    given = [opinion.stars for opinion in said if opinion.stars is not None]
    up = sum(opinion.thumb == "up" for opinion in said)
    judged = {"thumbs_up": up, "stars": sum(given) / len(given) if given else None}
    return {"file_name": f"{row.id}.png", "text": row.prompt, **_origin(row), **judged}


def _preferred(chosen: GenerationRow, rejected: GenerationRow) -> dict[str, Any]:
    versions = {"chosen_version": chosen.ref, "rejected_version": rejected.ref}
    return {"prompt": chosen.prompt, "chosen": f"{chosen.id}.png", "rejected": f"{rejected.id}.png", **versions}


def _origin(row: GenerationRow) -> dict[str, Any]:
    return {"generation": row.id, "version": row.ref, "digest": row.digest, "seed": row.seed}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
