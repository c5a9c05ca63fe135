"""A replica's work without Ray: claimed, drawn, written down once; given back, cancelled or refused where that is right."""

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysd.database import Database
from raysd.references import Located, identity
from raysd.registry import Registry
from raysd.serve.drawing import Drawing
from raysd.serve.metrics import Metrics
from raysd.serve.pool import Pool
from raysd.serve.predictions import Ask, NewPrediction, Prediction
from raysd.serve.predictor import Predictor, Sample
from raysd.serve.queue import Queue
from raysd.serve.scheduler import Scheduler
from raysd.serve.torch_backend import TorchBackend
from raysd.serve.worker import Worker
from tests.adapters import publish_lora
from tests.versions import flip

WISH = Drawing(prompt="a secret red circle", seed=3, steps=3, guidance=3, count=2)


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
    until(lambda: worker.in_work == 1)
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
    until(lambda: worker.in_work == 1)
    seen: list[int] = []
    work = worker.take(prediction.id, lambda number, index, png: seen.append(index))
    came.set()
    assert work is not None
    work.result(300)
    assert seen == [0]


def until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)
