"""A service without Ray: the real application, queue and storage, and one thread that draws with the bundled model."""

import asyncio
import contextlib
import functools
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from raysd.config.serving import ServingSpec
from raysd.database import Database
from raysd.draw import metadata, open_pipeline
from raysd.errors import NotFound
from raysd.feedback.generations import Generations
from raysd.host import listen
from raysd.references import locate
from raysd.serve.drawing import Drawing
from raysd.serve.http.application import build
from raysd.serve.http.desk import Ended, Event, Preview, Served, Share
from raysd.serve.keys import Keys
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import Ask, Claim, NewPrediction, Picture, Prediction
from raysd.serve.queue import Queue
from raysd.serve.uploads import Uploads
from raysd.storage import Storage

DIGESTS = ("1" * 64, "2" * 64)
CATS = Served(
    "cats",
    "cats@1",
    DIGESTS[0],
    1.7e9,
    traffic=(Share("cats@1", DIGESTS[0], 0.9), Share("cats@2", DIGESTS[1], 0.1)),
)
TINY = Served("tiny-sd", "tiny-sd", "0" * 64, 1.7e9, traffic=(Share("tiny-sd", "0" * 64),))
SIDE = 64
"""Pixels of the bundled model's pictures."""


class DirectDesk:
    """Draws one prediction after the other, all of them with the bundled model. `step` is called before each step."""

    def __init__(
        self, queue: Queue, database: Database, storage: Storage, served: Sequence[Served] = (TINY, CATS)
    ) -> None:
        self.queue, self.database, self.storage, self.served = queue, database, storage, list(served)
        self.asks: list[Ask] = []
        self.step: Callable[[], None] = lambda: None
        self._watchers: dict[str, list[asyncio.Queue[Event]]] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        self._stop.set()
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def models(self) -> Sequence[Served]:
        return self.served

    async def submit(self, ask: Ask) -> Prediction:
        model = next(model for model in self.served if model.name == ask.model)
        shares = [share for share in model.traffic if ask.version in (None, share.ref, share.digest)]
        if not shares:
            raise NotFound(f"version: {model.name} has no {ask.version}")
        new = NewPrediction(ask, shares[0].ref, shares[0].digest)
        prediction, _ = await asyncio.to_thread(self.queue.submit, new)
        self.asks.append(ask)
        self._wake.set()
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
        while not (prediction := await asyncio.to_thread(self.queue.get, id)).ended:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(told.get(), 0.2)
                if isinstance(event, Preview):
                    yield event
        yield Ended(prediction)

    async def cancel(self, id: str) -> Prediction:
        prediction = await asyncio.to_thread(self.queue.cancel, id)
        self._tell(id, Ended(prediction))
        return prediction

    async def delete(self, id: str) -> None:
        uploads = Uploads(self.storage, self.queue.get(id).owner)
        for upload in await asyncio.to_thread(self.queue.delete, id):
            await asyncio.to_thread(uploads.delete, upload)
        await asyncio.to_thread(Generations(self.database, self.storage).sweep)

    async def read(self, path: str) -> bytes:
        return await asyncio.to_thread(self.storage.read, path)

    async def keep_upload(self, png: bytes, owner: str | None) -> str:
        return await asyncio.to_thread(Uploads(self.storage, owner).keep, png)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(0.2)
            self._wake.clear()
            self.queue.expire()
            for model in self.served:
                while claims := self.queue.claim("direct", model.name):
                    self._draw(claims[0])

    def _draw(self, claim: Claim) -> None:
        prediction, drawing = claim.prediction, Drawing.model_validate(claim.prediction.drawing)
        try:
            images = [self._drawn(claim, drawing.of(number), number) for number in range(drawing.count)]
            kept = [self._keep(prediction, drawing, number, image) for number, image in enumerate(images)]
            self.queue.finish(claim, kept, {})
        except InterruptedError:
            self.queue.canceled(claim)
        except Exception as error:
            self.queue.fail(claim, f"{type(error).__name__}: {error}")
        self._tell(claim.id, Ended(self.queue.get(claim.id)))

    def _drawn(self, claim: Claim, drawing: Drawing, number: int) -> Image.Image:
        pipeline = _pipeline()
        shown = 0

        def step(pipe: Any, n: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal shown
            self.step()
            if not self.queue.renew([claim]):
                raise InterruptedError
            if shown < drawing.partial_images and n + 1 < drawing.steps:
                latents = kwargs["latents"] / pipe.vae.config.scaling_factor
                body = io.BytesIO()
                pipe.image_processor.postprocess(pipe.vae.decode(latents).sample.detach())[0].save(body, "PNG")
                self._tell(claim.id, Preview(number, shown, body.getvalue()))
                shown += 1
            return kwargs

        image: Image.Image = pipeline(
            drawing.prompt,
            negative_prompt=drawing.negative,
            height=drawing.height or SIDE,
            width=drawing.width or SIDE,
            generator=torch.Generator().manual_seed(drawing.seed),
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            callback_on_step_end=step,
        ).images[0]
        if drawing.mask is not None:  # the picture stays where the mask is black
            uploads = Uploads(self.storage, claim.prediction.owner)
            given, mask = (Image.open(io.BytesIO(uploads.read(name))) for name in (drawing.image, drawing.mask))
            given, mask = given.convert("RGB"), mask.convert("L")
            image = Image.composite(image, given.resize(image.size), mask.resize(image.size))
        return image

    def _keep(self, prediction: Prediction, drawing: Drawing, number: int, image: Image.Image) -> Picture:
        body = io.BytesIO()
        image.save(body, "PNG", pnginfo=metadata({"model": prediction.ref}))
        path = f"generated/{datetime.now(UTC):%Y-%m-%d}/{prediction.id}-{number}.png"
        self.storage.write(path, body.getvalue())
        digest = hashlib.sha256(body.getvalue()).hexdigest()
        return Picture(number, path, digest, drawing.seed + number, image.width, image.height)

    def _tell(self, id: str, event: Event) -> None:
        for watcher in self._watchers.get(id, []):
            self._loop.call_soon_threadsafe(watcher.put_nowait, event)


@functools.cache
def _pipeline() -> Any:
    pipeline = open_pipeline(locate("tiny-sd", Storage("/nonexistent")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Parts:
    """A service that is not listening yet, and what it is made of."""

    app: FastAPI
    desk: DirectDesk
    queue: Queue
    database: Database
    storage: Storage

    def key(self, *roles: Any, **limits: Any) -> str:
        """A new API key's secret."""
        from raysd.serve.keys import Limits

        return Keys(self.database).create("somebody", roles or ("generate", "feedback"), Limits(**limits))[1]


def parts(
    root: Path, served: Sequence[Served] = (TINY, CATS), pauses: Sequence[float] = (0.05, 0.1), **spec: Any
) -> Parts:
    """A service in a folder. `spec` are fields of ServingSpec; `pauses` come between two tries of a webhook."""
    storage = Storage(str(root))
    database = Database(f"sqlite:///{root}/raysd.db", storage)
    database.migrate()
    queue = Queue(database)
    desk = DirectDesk(queue, database, storage, served)
    serving = ServingSpec.model_validate({"models": [{"ref": "tiny-sd"}], **spec})
    app = build(desk, queue, database, storage, serving, Metrics.off(), webhook_pauses=pauses)
    return Parts(app, desk, queue, database, storage)


@contextlib.contextmanager
def listening(service: Parts) -> Iterator[str]:
    """The URL at which it answers meanwhile, on loopback."""
    socket = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(service.app, log_config=None, lifespan="on", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])))
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < end, "the server did not start in time"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        service.database.close()
