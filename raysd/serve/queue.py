"""Accepted requests in the database: the one way for work to reach a replica, whichever processes die meanwhile."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.orm import Session

from raysd import database as sql
from raysd.database import Clock, Database
from raysd.errors import NotFound, RequestError
from raysd.idempotency import Seal, seal
from raysd.patience import Patient
from raysd.serve import claims, limits, rows, uploads
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import LIVE, Claim, Cursor, NewPrediction, Picture, Prediction
from raysd.serve.tables import PredictionRow
from raysd.words import shown


class Queue:
    """The queue in a database. May be shared by threads.

    Every method waits up to 30 seconds for a database that is away and raises StorageError then. Each may be made again
    where its answer was lost. `keep_pictures`: seconds after which a picture's retention ends (None: never). `metrics` are
    told of what ends here; of what a holder ends, the holder tells.
    """

    def __init__(
        self,
        database: Database,
        *,
        keep_pictures: float | None = None,
        metrics: Metrics | None = None,
        clock: Clock = sql.now,
    ) -> None:
        self._patient, self._keep, self._metrics = Patient(database, clock), keep_pictures, metrics or Metrics.off()
        self._clock = clock

    @property
    def one_node(self) -> bool:
        """Whether only the processes of one machine may share it: SQLite's file does not bear more."""
        return self._patient.read(lambda session: session.get_bind().dialect.name == "sqlite")

    def submit(self, new: NewPrediction) -> tuple[Prediction, bool]:
        """Accept a request; whether it is new, or its key was seen before and the former one is returned.

        Raises TooMany where a limit of the owner's key is reached, RequestError where it asks for more than that limit, for
        an idempotency key that was used for another request, and for text that cannot be kept; NotFound for the shadow of
        what was cancelled or deleted.
        """
        ask = new.ask
        for name in ("prompt", "negative"):
            if not sql.storable(getattr(ask.drawing, name)):
                raise RequestError(f"{name}: holds a NUL or half a character (\\ud8xx alone); leave it out")
        body = ask.body or f"{ask.api} {ask.model} {ask.drawing.model_dump_json()}"
        mark = _seal(ask.idempotency_key, body, ask.owner) if ask.idempotency_key is not None else None
        id = sql.new_id()
        return self._patient.write(lambda session, now: _submit(session, now, id, new, mark))

    def former(self, key: str | None, owner: str | None) -> Prediction | None:
        """What was accepted with that idempotency key of that owner, be it for another request."""
        if key is None:
            return None
        sealed = select(PredictionRow).where(PredictionRow.seal_name == _seal(key, "", owner).name)
        found = self._patient.read(lambda session: rows.read(session, session.scalars(sealed).all()))
        return found[0] if found else None

    def get(self, id: str) -> Prediction:
        """Raises NotFound."""
        _check(id)
        return self._patient.read(lambda session: rows.read(session, [_found(session.get(PredictionRow, id), id)])[0])

    def ended(self, ids: Sequence[str]) -> list[Prediction]:
        """Those of them that have ended."""
        done = select(PredictionRow).where(PredictionRow.id.in_(ids), PredictionRow.status.not_in(LIVE))
        return self._patient.read(lambda session: rows.read(session, session.scalars(done).all()))

    def find(self, owner: str | None, before: Cursor | None, limit: int) -> list[Prediction]:
        """A page, newest first, of an owner's or of all. What was drawn as a shadow is in no list."""
        page = select(PredictionRow).where(PredictionRow.shadow_of.is_(None)).limit(limit)
        if owner is not None:
            page = page.where(PredictionRow.owner == owner)
        if before is not None:
            _check(before.id)
            place = tuple_(PredictionRow.created, PredictionRow.id)
            page = page.where(PredictionRow.created <= before.created, place < tuple_(*before))
        page = page.order_by(PredictionRow.created.desc(), PredictionRow.id.desc())
        return self._patient.read(lambda session: rows.read(session, session.scalars(page).all()))

    def claim(
        self,
        worker: str,
        model: str,
        *,
        id: str | None = None,
        most: int = 1,
        but: Callable[[], Collection[str]] = tuple,
    ) -> list[Claim]:
        """The right to work on the oldest of a model (or on `id` alone): those that wait, or whose lease has ended.

        Shadows come after all others. `but` says which not to take; it is asked at each try, for the database may be away.
        """
        ticket = sql.new_id()

        def work(session: Session, now: float) -> list[Claim]:
            taken = claims.take(session, now, worker, model, id, most, ticket, but())
            session.flush()
            tokens = [row.token for row in taken]
            return [Claim(p.id, t, p) for p, t in zip(rows.read(session, taken), tokens, strict=True)]

        return self._patient.write(work)

    def renew(self, held: Sequence[Claim]) -> set[str]:
        """Make their leases last another 15 seconds. The ids of those still held and not asked to stop."""
        return self._patient.write(lambda session, now: claims.renew(session, now, held)) if held else set()

    def finish(self, claim: Claim, pictures: Sequence[Picture], metrics: dict[str, Any]) -> bool:
        """Succeed, and record the generations in the same transaction. False: another has the claim, or it was ended."""
        return self._patient.write(
            lambda session, now: claims.finish(session, now, claim, pictures, metrics, self._keep)
        )

    def fail(self, claim: Claim, error: str) -> bool:
        """Fail. `error` is shown to the client, on one line. False as for `finish`."""
        return self._patient.write(lambda session, now: claims.stop(session, now, claim, "failed", shown(error, 1000)))

    def canceled(self, claim: Claim) -> bool:
        """End what was asked to be cancelled. False as for `finish`."""
        return self._patient.write(lambda session, now: claims.stop(session, now, claim, "canceled"))

    def release(self, claim: Claim, *, counts: bool = False) -> None:
        """Give back at once, for another to claim. `counts`: as an attempt, of which there is a most."""
        self._ending(lambda session, now: claims.release(session, now, claim, counts=counts))

    def cancel(self, id: str) -> Prediction:
        """Cancel at once what nobody works on; else ask its replica to. What has ended stays. Raises NotFound.

        Its shadows are deleted.
        """
        _check(id)
        self._ending(lambda session, now: claims.cancel(session, now, _locked(session, id)))
        return self.get(id)

    def delete(self, id: str) -> set[str]:
        """Cancel it, and remove prompt, user, pictures and what was written of them, and the same of its shadows.

        Returns the digests of its owner's uploads that it started from and nothing else does. The files of pictures are
        there until `Generations.sweep`. Again does nothing more. Raises NotFound.
        """
        owner = self.get(id).owner
        started_from: set[str] = set()

        def work(session: Session, now: float) -> Sequence[PredictionRow]:
            row = _locked(session, id)
            started_from.update(uploads.named(row.drawing))
            return claims.delete(session, now, row)

        self._ending(work)
        return started_from and started_from - self._needed(owner)

    def expire(self) -> int:
        """End those past their deadline, and those that were claimed too often. How many; again if it is many."""
        return self._ending(claims.expire)

    def _ending(self, work: Callable[[Session, float], Sequence[PredictionRow]]) -> int:
        """Do what ends predictions, and tell the metrics of them. How many."""

        def noted(session: Session, now: float) -> list[tuple[str, str, Any, float]]:
            return [(row.model, row.ref, row.status, now - row.created) for row in work(session, now)]

        ended = self._patient.write(noted)
        for each in ended:
            self._metrics.ended(*each)
        return len(ended)

    def _needed(self, owner: str | None) -> set[str]:
        """The uploads that an owner's predictions started from, as far back as uploads are kept."""

        def work(session: Session) -> set[str]:
            of_owner = PredictionRow.owner == owner if owner is not None else PredictionRow.owner.is_(None)
            lately = PredictionRow.created > self._clock(session) - uploads.KEPT
            drawings = session.scalars(select(PredictionRow.drawing).where(of_owner, lately))
            return {sha256 for drawing in drawings for sha256 in uploads.named(drawing)}

        return self._patient.read(work)

    def known(self, ids: Collection[str]) -> set[str]:
        """Those of `ids` that are predictions of this database."""
        here = select(PredictionRow.id).where(PredictionRow.id.in_(ids))
        return self._patient.read(lambda session: {*session.scalars(here)})

    def waiting(self, model: str) -> int:
        """Pictures of a model's predictions that nobody has claimed, but for shadows."""
        unclaimed = PredictionRow.status == "starting", PredictionRow.shadow_of.is_(None)
        here = select(func.sum(PredictionRow.count)).where(PredictionRow.model == model, *unclaimed)
        return self._patient.read(lambda session: session.scalar(here) or 0)

    def oldest(self, model: str) -> str | None:
        """The id of the prediction of a model that has been free for a claim longest, but for shadows."""
        return self._patient.read(lambda session: claims.oldest(session, self._clock(session), model))

    def in_flight(self, owner: str) -> int:
        """Predictions of an owner that have not ended."""
        return self._patient.read(lambda session: limits.in_flight(session, owner))

    def admit(self, owner: str) -> None:
        """Count a request of a key that draws nothing. Raises TooMany where it may make no more."""
        id = sql.new_id()
        self._patient.write(lambda session, now: limits.count(session, now, owner, id))

    def hold(self, owner: str, requests: int = 1) -> None:
        """Raises what `submit` would raise for so many requests of a picture each; counts nothing."""
        self._patient.write(lambda session, now: limits.enforce(session, now, owner, requests, requests))


def _submit(session: Session, now: float, id: str, new: NewPrediction, mark: Seal | None) -> tuple[Prediction, bool]:
    if mark is not None:
        sql.take_turns(session, mark.name)
    same = [PredictionRow.id == id, *([PredictionRow.seal_name == mark.name] if mark else [])]
    former = session.scalars(select(PredictionRow).where(or_(*same))).one_or_none()
    if former is not None:
        if mark is not None and former.seal_body != mark.body:
            raise RequestError("Idempotency-Key: was used for another request; give this one a key of its own")
        return rows.read(session, [former])[0], former.id == id
    if new.shadow_of is not None:
        _refuse_orphan(session, new.shadow_of)
    elif new.ask.owner is not None:
        limits.enforce(session, now, new.ask.owner, new.ask.drawing.count)
    row = rows.new_row(id, new, mark, now)
    session.add(row)
    session.flush()
    return rows.read(session, [row])[0], True


def _refuse_orphan(session: Session, of: str) -> None:
    seen = session.get(PredictionRow, of, with_for_update=True)
    if seen is not None and (seen.cancel_requested or seen.deleted is not None):
        raise NotFound(f"prediction {of}: was cancelled or deleted")


def _seal(key: str, body: str, owner: str | None) -> Seal:
    return seal(key, body, "prediction", owner)


def _check(id: str) -> None:
    """PostgreSQL would refuse what cannot be an id."""
    if not sql.storable(id):
        _found(None, id)


def _locked(session: Session, id: str) -> PredictionRow:
    return _found(session.get(PredictionRow, id, with_for_update=True), id)


def _found(row: PredictionRow | None, id: str) -> PredictionRow:
    if row is None:
        raise NotFound(f"prediction {shown(id)}: there is none of that id")
    return row
