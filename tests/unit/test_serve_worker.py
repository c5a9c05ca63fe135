"""A replica's worker, without Ray: with the real model, and with an engine that does as it is told."""

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raysd.database import Database
from raysd.references import Located, identity
from raysd.registry import Registry
from raysd.serve import worker as workers
from raysd.serve.claims import LEASE, MOST_ATTEMPTS
from raysd.serve.drawing import Drawing
from raysd.serve.metrics import Metrics
from raysd.serve.pool import Pool
from raysd.serve.predictions import Ask, NewPrediction, Prediction
from raysd.serve.predictor import Predictor, Sample
from raysd.serve.queue import Queue
from raysd.serve.scheduler import Picture, Scheduler
from raysd.serve.torch_backend import TorchBackend
from raysd.serve.worker import Worker
from raysd.storage import Storage
from tests.adapters import publish_lora
from tests.records import Clock, new
from tests.versions import flip
from tests.waiting import until

WISH = Drawing(prompt="a secret red circle", seed=3, steps=3, guidance=3, count=2)


# With the real model


class Bench:
    """A queue in a storage of its own, and workers on it."""

    def __init__(self, registry: Registry, base: Path):
        self.registry, self.storage, self.base = registry, registry.storage, base
        self.database = Database(None, self.storage)
        self.database.migrate()
        self.queue = Queue(self.database)
        self.workers: list[Worker] = []

    def worker(self, most: int = 8, name: str = "one") -> Worker:
        pool = Pool(self.storage, opened)
        worker = Worker(name, "cats", self.queue, self.storage, pool, Scheduler(), Metrics.off(), most)
        self.workers.append(worker)
        return worker

    def submit(
        self, drawing: Drawing = WISH, ref: str | None = None, digest: str | None = None, deadline: float | None = None
    ) -> Prediction:
        ask = Ask("predictions", "cats", drawing, deadline=deadline)
        return self.queue.submit(NewPrediction(ask, ref or str(self.base), digest or identity(self.base)))[0]

    def ended(self, id: str) -> Prediction:
        end = time.monotonic() + 300
        while not (found := self.queue.get(id)).ended:
            assert time.monotonic() < end
            time.sleep(0.05)
        return found


def opened(located: Located) -> Predictor:
    backend = TorchBackend(located.family, located.folder, torch.device("cpu"))
    return Predictor(located.family, located.folder, backend)


@pytest.fixture
def bench(registry: Registry, tiny_base: Path) -> Iterator[Bench]:
    found = Bench(registry, tiny_base)
    yield found
    for worker in found.workers:
        worker.stop()


def test_a_prediction_is_drawn_and_kept_with_what_it_was_drawn_by(bench: Bench) -> None:
    worker = bench.worker()
    worker.start()
    prediction = bench.submit()
    worker.take(prediction.id)
    done = bench.ended(prediction.id)
    assert done.status == "succeeded"
    assert [picture.seed for picture in done.pictures] == [3, 4]
    assert 0 < done.metrics["draw_time"] < (done.completed or 0) - (done.started or 0)
    for picture in done.pictures:
        data = bench.storage.read(picture.path)
        assert hashlib.sha256(data).hexdigest() == picture.sha256
        image = Image.open(io.BytesIO(data))
        assert image.size == (picture.width, picture.height) == (64, 64)
        assert identity(bench.base) in image.text["raysd"]
        assert "secret" not in str(image.text)


def test_work_that_nobody_was_called_for_is_found(bench: Bench) -> None:
    prediction = bench.submit()
    bench.worker().start()
    assert bench.ended(prediction.id).status == "succeeded"


def test_a_prediction_is_drawn_by_one_of_two_workers(bench: Bench) -> None:
    workers = [bench.worker(name=name) for name in ("one", "two")]
    for worker in workers:
        worker.start()
    predictions = [bench.submit(WISH.of(number)) for number in range(8)]
    taken = [[worker.take(prediction.id) is not None for worker in workers] for prediction in predictions]
    assert all(sum(who) <= 1 for who in taken)
    for prediction in predictions:
        done = bench.ended(prediction.id)
        assert (done.status, done.attempt, len(done.pictures)) == ("succeeded", 1, 1)


def test_a_picture_that_cannot_be_drawn_fails_with_its_reason(bench: Bench, tmp_path: Path) -> None:
    version = publish_lora(bench.registry, bench.base, tmp_path / "1", seed=1)
    flip(Path(bench.storage.url) / "blobs" / "sha256" / version.files[0].sha256[:2] / version.files[0].sha256)
    worker = bench.worker()
    worker.start()
    damaged = bench.submit(ref=version.ref, digest=version.digest)
    unknown = bench.submit(WISH.model_copy(update={"sampler": "flow_euler"}))
    assert "damaged" in (bench.ended(damaged.id).error or "")
    assert "sampler flow_euler" in (bench.ended(unknown.id).error or "")


def test_a_stopping_worker_gives_its_work_back_and_another_draws_it(bench: Bench) -> None:
    slow = bench.submit(WISH.model_copy(update={"steps": 200}))
    first = bench.worker()
    first.start()
    until(lambda: first.scheduler.load > 0)
    first.stop()
    bench.workers.remove(first)
    waiting = bench.queue.get(slow.id)
    assert (waiting.status, waiting.attempt) == ("starting", 0)
    quick = bench.submit()
    bench.worker(name="two").start()
    assert bench.ended(quick.id).status == "succeeded"
    bench.queue.cancel(slow.id)


def test_cancelled_while_it_is_drawn_and_past_its_deadline(bench: Bench) -> None:
    worker = bench.worker()
    worker.start()
    long = WISH.model_copy(update={"steps": 200, "count": 1})
    cancelled, late = bench.submit(long), bench.submit(long, deadline=time.time() + 1)
    until(lambda: worker.in_work == 2)
    bench.queue.cancel(cancelled.id)
    assert bench.ended(cancelled.id).status == "canceled"
    assert bench.ended(late.id).status == "canceled"
    until(lambda: worker.in_work == 0)


def test_a_worker_takes_no_more_than_it_has_room_for(bench: Bench) -> None:
    worker = bench.worker(most=1)
    worker.start()
    first, second = bench.submit(), bench.submit()
    until(lambda: worker.in_work == 1, 300)
    assert worker.take(second.id) is None or worker.in_work <= 1
    assert {bench.ended(first.id).status, bench.ended(second.id).status} == {"succeeded"}


def test_previews_are_shown_to_who_watches(bench: Bench) -> None:
    worker = bench.worker()
    worker.scheduler.start()  # not `start`, which would claim it unwatched
    seen: list[tuple[int, int, bytes]] = []
    prediction = bench.submit(WISH.model_copy(update={"steps": 6, "partial_images": 2}))
    work = worker.take(prediction.id, lambda *preview: seen.append(preview))
    assert work is not None
    work.result(300)
    assert sorted((number, index) for number, index, _ in seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(np.asarray(Image.open(io.BytesIO(png))).shape == (64, 64, 3) for *_, png in seen)


def test_previews_are_encoded_beside_the_thread_that_draws(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else everybody's steps wait for one's previews."""
    worker, threads = bench.worker(), set()

    def marked(image: Image.Image, digest: str) -> Image.Image:
        threads.add(threading.current_thread().name)
        return image

    monkeypatch.setattr(worker.finish, "marked", marked)
    worker.scheduler.start()
    prediction = bench.submit(WISH.model_copy(update={"steps": 6, "partial_images": 2}))
    seen: list[int] = []
    work = worker.take(prediction.id, lambda number, index, png: seen.append(index))
    assert work is not None
    work.result(300)
    assert sorted(seen) == [0, 0, 1, 1]
    assert threads
    assert "denoising" not in threads


def test_who_comes_to_watch_what_is_in_work_already_sees_the_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker may find a request by itself before it is called for it."""
    came, begin = threading.Event(), Predictor.begin

    def wait(*given: object) -> Sample:
        assert came.wait(300)
        return begin(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "begin", wait)
    worker = bench.worker()
    worker.start()
    prediction = bench.submit(WISH.model_copy(update={"steps": 6, "partial_images": 1, "count": 1}))
    until(lambda: worker.in_work == 1, 300)
    seen: list[int] = []
    work = worker.take(prediction.id, lambda number, index, png: seen.append(index))
    came.set()
    assert work is not None
    work.result(300)
    assert seen == [0]


# With an engine that does as it is told


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


class Crew:
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
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.delenv("RAYSD_DATABASE", raising=False)
    found = Crew(tmp_path)
    yield found
    for worker, engine in found.workers:
        for picture in engine.pictures:
            picture.future.cancel()
        worker.stop()
    found.database.close()


@pytest.mark.parametrize("call", ["waiting", "claim", "expire"])
def test_a_worker_does_not_take_its_own_work_when_the_database_was_away(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It would draw it anew, and lose it to itself, until nothing is left of its attempts."""
    worker, engine = crew.worker()
    ended = worker.take(crew.id)
    until(lambda: len(engine.pictures) == 1)
    monkeypatch.setattr(workers, "RENEW", 0.0)
    with monkeypatch.context() as outage:
        crew.away(outage, call)
        worker._look()
    worker._look()
    assert crew.queue.get(crew.id).attempt == 1
    assert not crew.queue.claim("another", "cats"), "its lease was renewed before anything else"
    engine.pictures[0].future.set_result(Image.new("RGB", (64, 64)))
    assert ended is not None
    ended.result(60)
    assert crew.queue.get(crew.id).status == "succeeded"
    assert worker.in_work == 0
    assert len(engine.pictures) == 1


def test_leases_are_renewed_before_the_claim(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the replica that the database answers first would take what others draw."""
    worker, engine = crew.worker()
    worker.take(crew.id)
    until(lambda: len(engine.pictures) == 1)
    monkeypatch.setattr(workers, "RENEW", 0.0)
    true, free = crew.queue.claim, list[str | None]()

    def claim(*given: Any, **named: Any) -> Any:
        free.append(crew.queue.oldest("cats"))
        return true(*given, **named)

    crew.away(monkeypatch, "waiting")
    monkeypatch.setattr(crew.queue, "claim", claim)
    worker._look()
    assert free == [None]


def test_all_who_call_see_the_previews(crew: Crew) -> None:
    """As a second ingress that does not know whether the first one lives."""
    worker, engine = crew.worker()
    first, second = list[int](), list[int]()
    worker.take(crew.id, lambda number, index, png: first.append(index))
    until(lambda: len(engine.pictures) == 1)
    worker.take(crew.id, lambda number, index, png: second.append(index))
    preview = engine.pictures[0].preview
    assert preview is not None
    preview(0, Image.new("RGB", (64, 64)))
    until(lambda: first == second == [0])


def test_what_fails_unexpectedly_is_left_to_another_replica(crew: Crew) -> None:
    (broken, engine), (sound, other) = crew.worker(), crew.worker()
    ended = broken.take(crew.id)
    until(lambda: len(engine.pictures) == 1)
    engine.pictures[0].future.set_exception(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert ended is not None
    ended.result(60)
    prediction = crew.queue.get(crew.id)
    assert (prediction.status, prediction.attempt) == ("starting", 1)
    assert broken.take(crew.id) is None
    broken._look()
    assert broken.in_work == 0
    sound._look()
    until(lambda: len(other.pictures) == 1)


def test_what_fails_everywhere_ends(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LEFT", 0.0)
    worker, engine = crew.worker()
    for attempt in range(1, MOST_ATTEMPTS + 1):
        ended = worker.take(crew.id)
        assert ended is not None, attempt
        until(lambda: len(engine.pictures) == attempt)  # noqa: B023
        engine.pictures[-1].future.set_exception(RuntimeError("a shape that does not fit"))
        ended.result(60)
    prediction = crew.queue.get(crew.id)
    assert (prediction.status, prediction.attempt) == ("failed", MOST_ATTEMPTS)
    assert prediction.error == "RuntimeError: the service's log says more"


def test_a_worker_with_a_broken_engine_claims_nothing(crew: Crew) -> None:
    worker, engine = crew.worker()
    engine.broken = True
    assert worker.take(crew.id) is None
    worker._look()
    assert crew.queue.get(crew.id).status == "starting"
    engine.broken = False
    worker._look()
    assert crew.queue.get(crew.id).status == "processing"
