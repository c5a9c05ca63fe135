"""A replica's worker over a real queue, with an engine that does as it is told."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from raysd.database import Database
from raysd.serve import worker as workers
from raysd.serve.claims import LEASE, MOST_ATTEMPTS
from raysd.serve.metrics import Metrics
from raysd.serve.queue import Queue
from raysd.serve.scheduler import Picture
from raysd.serve.worker import Worker
from raysd.storage import Storage
from tests.records import Clock, new


class Engine:
    """A scheduler, and a pool of one model. Pictures end when a test says so."""

    broken = False

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def use(self, ref: str, digest: str) -> AbstractContextManager[Any]:
        predictor = SimpleNamespace(check=lambda drawing: None, steps=lambda drawing: drawing.steps)
        return nullcontext(SimpleNamespace(predictor=predictor, adapter=None))

    def submit(self, pictures: Sequence[Picture]) -> None:
        self.pictures += pictures

    def stop(self) -> None:
        pass


class House:
    """Workers of one queue. `id` is a prediction that waits."""

    def __init__(self, root: Path):
        self.storage, self.clock = Storage(str(root)), Clock()
        self.database = Database(None, self.storage)
        self.database.migrate()
        self.queue = Queue(self.database, clock=self.clock)
        self.id = self.queue.submit(new())[0].id
        self.workers: list[tuple[Worker, Engine]] = []

    def worker(self) -> tuple[Worker, Engine]:
        engine: Any = Engine()
        made = Worker("one", "cats", self.queue, self.storage, engine, engine, Metrics.off(), 2)
        self.workers.append((made, engine))
        return made, engine

    def away(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        """The database is away while the queue is asked for `call`, for longer than a lease."""
        true: Callable[..., Any] = getattr(self.queue, call)

        def late(*given: Any, **named: Any) -> Any:
            self.clock.now += LEASE + 5
            return true(*given, **named)

        monkeypatch.setattr(self.queue, call, late)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.delenv("RAYSD_DATABASE", raising=False)
    found = House(tmp_path)
    yield found
    for worker, engine in found.workers:
        for picture in engine.pictures:
            picture.future.cancel()
        worker.stop()
    found.database.close()


@pytest.mark.parametrize("call", ["waiting", "claim", "expire"])
def test_a_worker_does_not_take_its_own_work_when_the_database_was_away(
    house: House, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It would draw it anew, and lose it to itself, until nothing is left of its attempts."""
    worker, engine = house.worker()
    ended = worker.take(house.id)
    wait(lambda: len(engine.pictures) == 1)
    monkeypatch.setattr(workers, "RENEW", 0.0)
    with monkeypatch.context() as outage:
        house.away(outage, call)
        worker._look()
    worker._look()
    assert house.queue.get(house.id).attempt == 1
    assert not house.queue.claim("another", "cats"), "its lease was renewed before anything else"
    engine.pictures[0].future.set_result(Image.new("RGB", (64, 64)))
    assert ended is not None
    ended.result(60)
    assert house.queue.get(house.id).status == "succeeded"
    assert worker.in_work == 0
    assert len(engine.pictures) == 1


def test_leases_are_renewed_before_the_claim(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the replica that the database answers first would take what others draw."""
    worker, engine = house.worker()
    worker.take(house.id)
    wait(lambda: len(engine.pictures) == 1)
    monkeypatch.setattr(workers, "RENEW", 0.0)
    true, free = house.queue.claim, list[str | None]()

    def claim(*given: Any, **named: Any) -> Any:
        free.append(house.queue.oldest("cats"))
        return true(*given, **named)

    house.away(monkeypatch, "waiting")
    monkeypatch.setattr(house.queue, "claim", claim)
    worker._look()
    assert free == [None]


def test_all_who_call_see_the_previews(house: House) -> None:
    """As a second ingress that does not know whether the first one lives."""
    worker, engine = house.worker()
    first, second = list[int](), list[int]()
    worker.take(house.id, lambda number, index, png: first.append(index))
    wait(lambda: len(engine.pictures) == 1)
    worker.take(house.id, lambda number, index, png: second.append(index))
    preview = engine.pictures[0].preview
    assert preview is not None
    preview(0, Image.new("RGB", (64, 64)))
    wait(lambda: first == second == [0])


def test_what_fails_unexpectedly_is_left_to_another_replica(house: House) -> None:
    (broken, engine), (sound, other) = house.worker(), house.worker()
    ended = broken.take(house.id)
    wait(lambda: len(engine.pictures) == 1)
    engine.pictures[0].future.set_exception(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert ended is not None
    ended.result(60)
    prediction = house.queue.get(house.id)
    assert (prediction.status, prediction.attempt) == ("starting", 1)
    assert broken.take(house.id) is None
    broken._look()
    assert broken.in_work == 0
    sound._look()
    wait(lambda: len(other.pictures) == 1)


def test_what_fails_everywhere_ends(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LEFT", 0.0)
    worker, engine = house.worker()
    for attempt in range(1, MOST_ATTEMPTS + 1):
        ended = worker.take(house.id)
        assert ended is not None, attempt
        wait(lambda: len(engine.pictures) == attempt)  # noqa: B023
        engine.pictures[-1].future.set_exception(RuntimeError("a shape that does not fit"))
        ended.result(60)
    prediction = house.queue.get(house.id)
    assert (prediction.status, prediction.attempt) == ("failed", MOST_ATTEMPTS)
    assert prediction.error == "RuntimeError: the service's log says more"


def test_a_worker_with_a_broken_engine_claims_nothing(house: House) -> None:
    worker, engine = house.worker()
    engine.broken = True
    assert worker.take(house.id) is None
    worker._look()
    assert house.queue.get(house.id).status == "starting"
    engine.broken = False
    worker._look()
    assert house.queue.get(house.id).status == "processing"


def wait(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)
