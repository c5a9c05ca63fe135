"""A blind study: the same prompts and seeds drawn by two versions, kept until people have compared them.

Pictures lie under studies/<name>/ in the storage, under names that say nothing; what they are is in the database.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from raysd.database import Database
from raysd.errors import NotFound, RequestError
from raysd.evaluate.prompts import read_prompts
from raysd.registry.records import NAME
from raysd.storage import Storage
from raysd.study.tables import Pair, Study

if TYPE_CHECKING:  # the page and the results are there without waiting for torch
    from raysd.references import Located

MOST_PAIRS = 1000


@dataclass(frozen=True)
class Plan:
    """What a study compares. Pair n has prompt n (round and round) and seed n. The same plan is the same study."""

    first_ref: str
    first_digest: str
    second_ref: str
    second_digest: str
    prompts: tuple[str, ...]
    count: int
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """The name of a study that was given none."""
        return "study-" + hashlib.sha256(json.dumps(asdict(_drawn(self))).encode()).hexdigest()[:8]


def plan(
    first: "Located",
    second: "Located",
    prompts: Sequence[str],
    *,
    count: int | None = None,
    steps: int = 25,
    guidance: float = 7.5,
) -> Plan:
    """`count` pairs, or one for each prompt. Raises RequestError where there is nothing to compare."""
    digests = [_digest(first), _digest(second)]
    if digests[0] == digests[1]:
        raise RequestError(f"{first.ref} and {second.ref}: the same model; name two that differ")
    number = len(prompts) if count is None else count
    if not 1 <= number <= MOST_PAIRS:
        raise RequestError(f"--count: a study has 1 to {MOST_PAIRS} pairs, not {number}")
    return Plan(first.ref, digests[0], second.ref, digests[1], tuple(prompts), number, steps, guidance)


def create(database: Database, wanted: Plan, name: str | None = None) -> tuple[Study, list[Pair]]:
    """The study of that plan: the one that exists, else a new one.

    Raises RequestError for a name that cannot be one or that belongs to another plan.
    """
    name = wanted.name if name is None else name
    if not NAME.fullmatch(name):
        raise RequestError(f"--name {name!r}: use a-z, 0-9, '.', '_' and '-', starting with a letter or digit")
    try:
        with database.writing() as session:
            if session.scalar(select(Study.id).where(Study.name == name)) is None:
                _insert(session, wanted, name)
    except IntegrityError:
        pass  # another process was faster: on PostgreSQL two may look at once
    study, pairs = find(database, name)
    if _plan_of(study, pairs) != _drawn(wanted):
        raise RequestError(f"study {name}: exists with other versions, prompts or settings; give another --name")
    return study, pairs


def find(database: Database, name: str) -> tuple[Study, list[Pair]]:
    """A study and its pairs in order. Raises NotFound."""
    with database.reading() as session:
        study = session.scalar(select(Study).where(Study.name == name))
        if study is None:
            known = ", ".join(session.scalars(select(Study.name).order_by(Study.name)).all()[:20]) or "none"
            raise NotFound(f"study {name}: not in {database.name}; there are: {known}")
        pairs = session.scalars(select(Pair).where(Pair.study_id == study.id).order_by(Pair.number)).all()
        return study, list(pairs)


def prompts_of(path: Path) -> list[str]:
    """The prompts of a file, as `raysd.evaluate.prompts` reads it. Raises NotFound, RequestError naming the line."""
    prompts = read_prompts(path)
    if any(prompt.negative for prompt in prompts):
        raise RequestError(f"prompts {path}: a study draws without negative prompts; leave them out")
    return [prompt.text for prompt in prompts]


def default_prompts(first: "Located", second: "Located") -> list[str]:
    """The bundled sample's captions, where the bundled base is compared. Raises RequestError for other models."""
    if not any(_bundled(located) for located in (first, second)):
        raise RequestError(
            "--prompts: name a file with one prompt a line; only the bundled base has prompts of its own"
        )
    from raysd.assets import asset

    return [path.read_text(encoding="utf-8").strip() for path in sorted(asset("sample").glob("*.txt"))]


def pictures(storage: Storage, name: str) -> Storage:
    """Where a study's pictures lie, as <picture>.png."""
    return storage.child(f"studies/{name}")


def drawn(storage: Storage, study: Study) -> set[str]:
    """The names of the pictures that are there."""
    entries = pictures(storage, study.name).list(recursive=False)
    return {entry.path.removesuffix(".png") for entry in entries if entry.path.endswith(".png")}


def _insert(session: Session, wanted: Plan, name: str) -> None:
    study = Study(
        name=name,
        created=time.time(),
        key=secrets.token_hex(16),
        first_ref=wanted.first_ref,
        first_digest=wanted.first_digest,
        second_ref=wanted.second_ref,
        second_digest=wanted.second_digest,
        steps=wanted.steps,
        guidance=wanted.guidance,
    )
    session.add(study)
    session.flush()
    for number, (prompt, seed) in enumerate(_drawn(wanted).pairs):
        tokens = {field: secrets.token_hex(16) for field in ("token", "first_picture", "second_picture")}
        session.add(Pair(study_id=study.id, number=number, prompt=prompt, seed=seed, **tokens))


@dataclass(frozen=True)
class _Drawn:
    """What makes two studies the same. A reference is not part of it: an alias may name the version too."""

    digests: tuple[str, str]
    settings: tuple[int, float]
    pairs: tuple[tuple[str, int], ...]


def _drawn(wanted: Plan) -> _Drawn:
    pairs = tuple((wanted.prompts[number % len(wanted.prompts)], number) for number in range(wanted.count))
    return _Drawn((wanted.first_digest, wanted.second_digest), (wanted.steps, wanted.guidance), pairs)


def _plan_of(study: Study, pairs: Sequence[Pair]) -> _Drawn:
    prompts = tuple((pair.prompt, pair.seed) for pair in pairs)
    return _Drawn((study.first_digest, study.second_digest), (study.steps, study.guidance), prompts)


def _digest(located: "Located") -> str:
    from raysd.references import identity

    return located.version.digest if located.version else identity(located.folder)


def _bundled(located: "Located") -> bool:
    return located.ref == "tiny-sd" or (located.version is not None and located.version.record.get("base") == "tiny-sd")
