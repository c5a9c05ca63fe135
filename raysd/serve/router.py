"""The ingress's view of the service: requests are written to the database, and a replica is called to draw each.

The call is a shortcut: it makes the work begin at once and brings the previews. What counts is the database, so a
replica, the ingress or the database itself may go away meanwhile, and come back.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from raysd.errors import NotFound, RaysdError, TooMany
from raysd.feedback.generations import Generations
from raysd.serve import tracing
from raysd.serve.http.desk import Busy, Ended, Event, Preview, Served
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import Ask, NewPrediction, Prediction
from raysd.serve.queue import Queue
from raysd.serve.routes import Routes, Target
from raysd.serve.uploads import Uploads, forget
from raysd.storage import Storage

log = logging.getLogger(__name__)
LOOK = 0.1
"""Seconds between looks at the predictions that somebody waits for and no replica tells about."""
LOOK_AT_CALLED = 1.0
"""The same for those that a replica should tell about."""
COUNT = 1.0
"""Seconds between counts of what waits, and looks for what is past its deadline."""
COUNT_AGAIN = 0.1
"""Seconds after which it is counted once more before a request is refused, for much may have been claimed since."""
TIDY = 3600.0
"""Seconds between removals of what is kept no longer."""
CALL_AGAIN = 2.0
"""Seconds before a replica is called again for a prediction whose replica was lost, or that none had room for."""


@dataclass
class Backlog:
    """The pictures that wait for a model: as the database was counted last, and what came since, which is in no count yet."""

    most: int
    counted: int = 0
    written: int = 0
    """Accepted ever."""
    before: int = 0
    """Accepted before the last count began."""
    underway: int = 0
    """On their way into the database."""
    at: float = -math.inf
    """When the last count began."""

    @property
    def waiting(self) -> int:
        return self.counted + self.written - self.before + self.underway

    @property
    def full(self) -> bool:
        return self.waiting >= self.most

    async def count(self, ask: Callable[[], int]) -> None:
        """Count anew. What is written meanwhile may be counted twice, until the next count: rather too many than too few."""
        self.at, before = time.monotonic(), self.written
        self.counted, self.before = await asyncio.to_thread(ask), before

    @contextlib.contextmanager
    def entering(self, pictures: int) -> Iterator[None]:
        """Take their places before the request is written, so that no other takes them meanwhile."""
        self.underway += pictures
        try:
            yield
        finally:
            self.underway -= pictures


class Router:
    """The service as the HTTP application sees it (`Desk`), in one event loop. `replicas` are Serve handles by model."""

    def __init__(
        self,
        queue: Queue,
        storage: Storage,
        routes: Routes,
        replicas: Mapping[str, Any],
        metrics: Metrics,
        most_waiting: Mapping[str, int],
        generations: Generations,
    ):
        self.queue, self.storage, self.routes, self.metrics = queue, storage, routes, metrics
        self._replicas, self._generations = replicas, generations
        self._backlogs = {model: Backlog(most_waiting[model]) for model in replicas}
        self._watchers: dict[str, list[asyncio.Queue[Event]]] = {}
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._shadows: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch the database. In the event loop of the application."""
        self._tasks = [asyncio.create_task(work()) for work in (self._look, self._count, self._tidy)]

    async def close(self) -> None:
        for task in [*self._tasks, *self._shadows, *self._calls.values()]:
            task.cancel()
        self.routes.close()

    def models(self) -> Sequence[Served]:
        return self.routes.served()

    async def submit(self, ask: Ask) -> Prediction:
        former = await asyncio.to_thread(self.queue.former, ask.idempotency_key, ask.owner)
        if former is not None:  # whatever became of its version, its uploads, or the room for it
            answer, _ = await asyncio.to_thread(self.queue.submit, NewPrediction(ask, former.ref, former.digest))
            return answer
        target, shadows = await asyncio.to_thread(self.routes.choose, ask)
        await asyncio.to_thread(Uploads(self.storage, ask.owner).require, ask.drawing.model_dump())
        await self._refuse_too_many(ask.model, target)
        with tracing.span("accept", {"raysd.model": ask.model, "raysd.version": target.ref}):
            prediction, fresh = await self._written(NewPrediction(ask, target.ref, target.digest))
            tracing.note({"raysd.prediction": prediction.id, "raysd.fresh": fresh})
        if fresh:
            self._call(prediction.id, prediction.model)
        if fresh and not self._backlogs[ask.model].full:  # nobody would get to them
            for shadow in shadows:
                task = asyncio.create_task(self._shadow(ask, shadow, prediction))
                self._shadows.add(task)
                task.add_done_callback(self._shadows.discard)
        return prediction

    async def wait(self, id: str, timeout: float | None) -> Prediction:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                async for event in self.events(id):
                    if isinstance(event, Ended):
                        return event.prediction
        return await asyncio.to_thread(self.queue.get, id)

    async def events(self, id: str) -> AsyncIterator[Event]:
        told: asyncio.Queue[Event] = asyncio.Queue()
        self._watchers.setdefault(id, []).append(told)
        try:
            if id not in self._calls:  # else the call tells the end; if it just did, `_look` finds it
                prediction = await asyncio.to_thread(self.queue.get, id)
                if prediction.ended:
                    yield Ended(prediction)
                    return
            while True:
                event = await told.get()
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self._watchers[id].remove(told)
            if not self._watchers[id]:
                del self._watchers[id]

    async def cancel(self, id: str) -> Prediction:
        prediction = await asyncio.to_thread(self.queue.cancel, id)
        replica = self._replicas.get(prediction.model)  # another service's model, or a former one, has none here
        if not prediction.ended and replica is not None:  # it learns it within seconds anyway
            replica.cancel.remote(id)
        return prediction

    async def delete(self, id: str) -> None:
        prediction = await self.cancel(id)
        uploads = await asyncio.to_thread(self.queue.delete, prediction.id)
        await asyncio.to_thread(self._remove, uploads, prediction.owner)

    async def read(self, path: str) -> bytes:
        return await asyncio.to_thread(self.storage.read, path)

    async def keep_upload(self, png: bytes, owner: str | None) -> str:
        return await asyncio.to_thread(Uploads(self.storage, owner).keep, png)

    async def _refuse_too_many(self, model: str, target: Target) -> None:
        """Raises Busy where as many wait for the model as may."""
        backlog = self._backlogs[model]
        if backlog.full and time.monotonic() - backlog.at > COUNT_AGAIN:
            await self._recount(model)
        if backlog.full:
            self.metrics.refused(model, target.ref)
            raise Busy(f"{backlog.waiting} pictures wait for {model}: try again later", 5.0)

    async def _written(self, new: NewPrediction) -> tuple[Prediction, bool]:
        """Accepted, and counted among those that wait; whether it is new."""
        backlog = self._backlogs[new.ask.model]
        pictures = new.ask.drawing.count
        with backlog.entering(pictures):
            try:
                prediction, fresh = await asyncio.to_thread(self.queue.submit, new)
            except TooMany:
                self.metrics.refused(new.ask.model, new.ref)
                raise
            backlog.written += pictures * fresh
        return prediction, fresh

    async def _shadow(self, ask: Ask, target: Target, of: Prediction) -> None:
        """Have it drawn by another version besides, by whoever has nothing else to do. Its failure is nobody's."""
        try:
            await asyncio.to_thread(self.queue.submit, _shadow_of(of.id, ask, target))
        except Exception as error:
            log.warning("shadow of %s: %s", of.id, error)

    def _call(self, id: str, model: str) -> None:
        if id in self._calls:
            return
        self._calls[id] = asyncio.get_running_loop().create_task(self._called(id, model), name=model)
        self._calls[id].add_done_callback(lambda _: self._calls.pop(id, None))

    async def _called(self, id: str, model: str) -> None:
        """Have a replica draw it, and another one if that is lost."""
        while True:
            try:
                async for number, index, png in self._replicas[model].options(stream=True).draw.remote(id):
                    self._tell(id, Preview(number, index, png))
            except Exception as error:  # whatever a lost replica raises
                log.warning("prediction %s: its replica was lost or failed: %s", id, error)
            try:
                prediction = await asyncio.to_thread(self.queue.get, id)
            except NotFound:
                return
            except RaysdError:
                prediction = None
            if prediction is not None and prediction.ended:
                self._tell(id, Ended(prediction))
                return
            await asyncio.sleep(CALL_AGAIN)

    def _tell(self, id: str, event: Event) -> None:
        for watcher in self._watchers.get(id, []):
            watcher.put_nowait(event)

    async def _look(self) -> None:
        """Tell of what ended elsewhere: claimed by another replica's own accord, cancelled, expired."""
        looked = 0.0
        while True:
            await asyncio.sleep(LOOK)
            ids = [id for id in self._watchers if id not in self._calls]
            if time.monotonic() - looked >= LOOK_AT_CALLED:
                looked, ids = time.monotonic(), list(self._watchers)
            try:
                if ids:
                    for prediction in await asyncio.to_thread(self.queue.ended, ids):
                        self._tell(prediction.id, Ended(prediction))
            except Exception as error:
                log.warning("the database could not be asked: %s", error)

    async def _count(self) -> None:
        while True:
            for model in self._backlogs:
                await self._recount(model)
                await self._adopt(model)
            await self._expire()
            await asyncio.sleep(COUNT)

    async def _expire(self) -> None:
        """Replicas do so too; but there may be none."""
        try:
            await asyncio.to_thread(self.queue.expire)
        except Exception as error:
            log.warning("the database could not be asked: %s", error)

    async def _recount(self, model: str) -> None:
        """Where the database does not answer, what was known stands."""
        try:
            await self._backlogs[model].count(partial(self.queue.waiting, model))
            self.metrics.queued(model, self._backlogs[model].counted)
        except Exception as error:
            log.warning("the database could not be asked: %s", error)
            self.metrics.database_failed()

    async def _adopt(self, model: str) -> None:
        """Call for what waits longest, where none is called: who accepted it may be gone, and no replica starts uncalled."""
        if any(task.get_name() == model for task in self._calls.values()):
            return
        try:
            id = await asyncio.to_thread(self.queue.oldest, model)
        except Exception as error:
            log.warning("the database could not be asked: %s", error)
            return
        if id is not None:
            self._call(id, model)

    async def _tidy(self) -> None:
        """Remove what retention no longer keeps, and what those left who lost their claim."""
        while True:
            await asyncio.sleep(TIDY)
            try:
                await asyncio.to_thread(self._generations.sweep)
                before = datetime.now(UTC) - timedelta(days=2)
                await asyncio.to_thread(self._generations.strays, before.strftime("%Y-%m-%d"), self.queue.known)
                await asyncio.to_thread(forget, self.storage)
            except Exception as error:
                log.warning("old pictures could not be removed: %s", error)

    def _remove(self, uploads: Set[str], owner: str | None) -> None:
        """Files of what was deleted. Raises StorageError; then they go when their retention ends."""
        for sha256 in uploads:
            Uploads(self.storage, owner).delete(sha256)
        self._generations.sweep()


def _shadow_of(id: str, ask: Ask, target: Target) -> NewPrediction:
    """The same for another version: nobody is told of it, and it is no answer to a repeated request."""
    alone = replace(ask, webhook=None, webhook_events=(), idempotency_key=None, body=None, comparison=None)
    return NewPrediction(alone, target.ref, target.digest, shadow_of=id)
