"""Pictures that were drawn: recorded, found, deleted on request, and their files removed when retention ends."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from raysd import database as sql
from raysd.database import Clock, Database
from raysd.errors import NotFound
from raysd.feedback.tables import FeedbackRow, GenerationRow
from raysd.patience import Patient
from raysd.storage import Storage
from raysd.words import shown

FOLDER = "generated"
"""Pictures lie in generated/YYYY-MM-DD/, by the day (UTC) of their prediction, whose id their names begin with."""
AT_ONCE = 200
"""Files that are removed between two looks at the database."""


@dataclass(frozen=True)
class Generation:
    """A drawn picture. Times are epoch seconds. `path` is None once the picture is gone, the prompt where withheld.

    `deleted`: nothing is left but the digests, the version and the dates. `blind`: nobody may be told the version yet.
    """

    id: str
    prediction_id: str
    number: int
    prompt: str | None
    negative: str | None
    seed: int
    parameters: dict[str, Any]
    model: str
    ref: str
    digest: str
    path: str | None
    sha256: str
    width: int
    height: int
    owner: str | None
    user: str | None
    blind: bool
    created: float
    kept_until: float | None
    deleted: float | None


class Generations:
    """The generations of a database, with their pictures in a storage. May be shared by threads; waits as `Queue` does."""

    def __init__(self, database: Database, storage: Storage, *, clock: Clock = sql.now) -> None:
        self._patient, self._storage = Patient(database, clock), storage

    def get(self, id: str, owner: str | None = None) -> Generation:
        """A generation, of this owner if one is given. Raises NotFound."""
        row = self._patient.read(lambda session: _found(session, id, owner))
        return Generation(**{field.name: getattr(row, field.name) for field in fields(Generation)})

    def delete(self, id: str, owner: str | None = None) -> None:
        """Remove picture, prompt and what was written of it, and the same of its shadows. Again does nothing more.

        Raises NotFound; StorageError where the picture could not be removed: `sweep` will.
        """

        def work(session: Session, now: float) -> list[tuple[str, str]]:
            row = _found(session, id, owner, lock=True)
            shadows = session.scalars(select(GenerationRow).where(GenerationRow.shadow_of == id)).all()
            bury(session, now, [row, *shadows])
            return [(each.id, each.path) for each in (row, *shadows) if each.path is not None]

        self._remove(self._patient.write(work))

    def sweep(self) -> int:
        """Remove the pictures whose retention has ended; the rest of the generation stays. How many there were."""
        swept = 0
        while due := self._patient.write(_due):
            self._remove(due)
            swept += len(due)
        return swept

    def strays(self, before: str, known: Callable[[Set[str]], Set[str]]) -> int:
        """Remove pictures of days before `before` (YYYY-MM-DD) that no generation names: who drew them lost the claim.

        Only of predictions that are `known`: others are another service's, whose store this is too.
        Choose a day so long ago that nothing of it is being drawn.
        """
        folders = [entry.path for entry in self._storage.list(FOLDER, recursive=False) if entry.path.endswith("/")]
        old = [folder for folder in folders if folder.split("/")[-2] < before]
        paths = [entry.path for folder in old for entry in self._storage.list(folder)]
        removed = 0
        for start in range(0, len(paths), AT_ONCE):
            unnamed = self._unnamed(paths[start : start + AT_ONCE], known)
            for path in unnamed:
                self._storage.delete(path)
            removed += len(unnamed)
        return removed

    def _unnamed(self, paths: Sequence[str], known: Callable[[Set[str]], Set[str]]) -> list[str]:
        """Those of known predictions that no generation names."""
        drawn_for = {path: path.rpartition("/")[2].partition("-")[0] for path in paths}
        named = select(GenerationRow.path).where(GenerationRow.path.in_(paths))
        here = known(set(drawn_for.values()))
        kept = self._patient.read(lambda session: {*session.scalars(named)})
        return [path for path in paths if path not in kept and drawn_for[path] in here]

    def _remove(self, pictures: Sequence[tuple[str, str]]) -> None:
        """The files first: if this is cut short, the paths are still known."""
        for _, path in pictures:
            self._storage.delete(path)
        gone = update(GenerationRow).where(GenerationRow.id.in_([id for id, _ in pictures])).values(path=None)
        self._patient.write(lambda session, now: session.execute(gone))


def record(session: Session, now: float, rows: Sequence[GenerationRow]) -> None:
    """Keep what was drawn. The shadow of a generation that was deleted meanwhile is deleted with it."""
    session.add_all(rows)
    seen = [row.shadow_of for row in rows if row.shadow_of is not None]
    if not seen:
        return
    originals = session.scalars(select(GenerationRow).where(GenerationRow.id.in_(seen)).with_for_update()).all()
    deleted = {row.id for row in originals if row.deleted is not None}
    bury(session, now, [row for row in rows if row.shadow_of in deleted])


def bury(session: Session, now: float, rows: Sequence[GenerationRow]) -> None:
    """Make tombstones of generations. Their paths stay until the files are gone: `sweep` finds what is left of them."""
    for row in rows:
        row.prompt, row.negative, row.user, row.parameters = None, None, None, {}
        row.deleted, row.kept_until = row.deleted or now, now
    of_these = FeedbackRow.generation_id.in_([row.id for row in rows])
    session.execute(update(FeedbackRow).where(of_these).values(text=None))
    session.execute(update(FeedbackRow).where(of_these, FeedbackRow.report.is_not(None)).values(report=""))


def _found(session: Session, id: str, owner: str | None, *, lock: bool = False) -> GenerationRow:
    row = session.get(GenerationRow, id, with_for_update=lock) if sql.storable(id) else None
    if row is None or (owner is not None and row.owner != owner):
        raise NotFound(f"generation {shown(id)}: there is none of that id")
    return row


def _due(session: Session, now: float) -> list[tuple[str, str]]:
    due = select(GenerationRow).where(GenerationRow.path.is_not(None), GenerationRow.kept_until <= now).limit(AT_ONCE)
    return [(row.id, row.path) for row in session.scalars(due) if row.path is not None]
