"""One replica's work: predictions claimed from the queue, drawn, written down. No Ray.

A claim is renewed while its prediction is drawn. If this process dies another claims it after the lease; if it is only
cut off, what it finishes after that is refused, so that each prediction ends once.
"""

import hashlib
import io
import logging
import queue as queues
import threading
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from opentelemetry.trace import SpanKind
from PIL import Image

from raysd.draw import metadata
from raysd.errors import RaysdError, StorageError
from raysd.feedback.generations import FOLDER
from raysd.serve import tracing
from raysd.serve.claims import MOST_ATTEMPTS
from raysd.serve.drawing import Drawing
from raysd.serve.finish import Finish
from raysd.serve.metrics import Metrics, Outcome
from raysd.serve.pool import Pool, Ready
from raysd.serve.predictions import Claim, Prediction
from raysd.serve.predictions import Picture as Kept
from raysd.serve.queue import Queue
from raysd.serve.safety import Flagged
from raysd.serve.scheduler import Busy, Canceled, Picture, Scheduler
from raysd.serve.threads import in_passing
from raysd.serve.uploads import FIELDS, Uploads
from raysd.storage import Storage

log = logging.getLogger(__name__)
RENEW = 2.0
"""Seconds between renewals, which also tell what was cancelled; a lease lasts several."""
LOOK = 1.0
"""Seconds between looks for work that nobody was called for: left by the dead, or accepted while none was there."""
LEFT = 2 * LOOK
"""Seconds for which what failed here as nobody expects is left to other replicas."""

Watch = Callable[[int, int, bytes], None]
"""Gets previews: the number of the picture, the preview's index, PNG."""
Due = queues.SimpleQueue[tuple[int, int, Image.Image] | None]
"""Previews that are drawn and not shown yet; None where a picture has ended."""


@dataclass
class Work:
    """A claim that is being drawn. `watches` may come later than the claim."""

    claim: Claim
    watches: list[Watch]
    ended: "Future[None]"
    pictures: Sequence[Picture] = ()


class Worker:
    """Draws predictions of one served model. `most` pictures are in work at once."""

    def __init__(
        self,
        name: str,
        model: str,
        queue: Queue,
        storage: Storage,
        pool: Pool,
        scheduler: Scheduler,
        metrics: Metrics,
        most: int,
        finish: Finish | None = None,
    ):
        self.name, self.model, self.queue, self.storage = name, model, queue, storage
        self.pool, self.scheduler, self.metrics, self.most = pool, scheduler, metrics, most
        self.finish = finish or Finish()
        self.queued = 0
        """Predictions of the model that nobody has claimed, when it was last looked."""
        self._claims: dict[str, Work] = {}
        self._left: dict[str, float] = {}
        """When what failed here may be claimed here again."""
        self._renewed = time.monotonic()
        self._lock = threading.Lock()
        self._stop, self._room = threading.Event(), threading.Event()
        self._hands = ThreadPoolExecutor(most, thread_name_prefix="prediction")
        self._tender = threading.Thread(target=self._tend, name="claims", daemon=True)

    def start(self) -> None:
        self.scheduler.start()
        self._tender.start()

    def stop(self) -> None:
        """Give back what is not finished: others draw it."""
        self._stop.set()
        self._room.set()
        self.scheduler.stop()
        self._hands.shutdown()
        if self._tender.is_alive():
            self._tender.join()

    @property
    def in_work(self) -> int:
        return len(self._claims)

    def take(self, id: str, watch: Watch | None = None) -> "Future[None] | None":
        """Draw that prediction, or watch it where it is drawn here already; the future ends with it.

        None: another has it, it has ended, or there is no room.
        """
        with self._lock:
            if (work := self._claims.get(id)) is not None:
                work.watches += [watch] if watch else []
                return work.ended
        if not self._may_claim or self.in_work >= self.most:
            return None
        claims = self.queue.claim(self.name, self.model, id=id, but=self._passed_over)
        begun = [self._begin(claim, watch) for claim in claims]
        return begun[0] if begun else None

    @property
    def _may_claim(self) -> bool:
        return not (self._stop.is_set() or self.scheduler.broken)

    def _passed_over(self) -> Set[str]:
        """What is drawn here, though its lease may have ended while the database was away; and what is left to others."""
        now = time.monotonic()
        with self._lock:
            self._left = {id: until for id, until in self._left.items() if until > now}
            return self._claims.keys() | self._left.keys()

    def _begin(self, claim: Claim, watch: Watch | None = None) -> "Future[None]":
        with self._lock:
            ended = self._hands.submit(self._traced, claim)
            self._claims[claim.id] = Work(claim, [watch] if watch else [], ended)
        self.metrics.in_progress(self.model, self.in_work)
        return ended

    def _traced(self, claim: Claim) -> None:
        """As a part of the trace of the request that asked for it."""
        prediction, now = claim.prediction, time.time_ns()
        tracing.told("queue", min(int(prediction.created * 1e9), now), now, parent=prediction.traceparent)
        with tracing.span("predict", _about(claim), parent=prediction.traceparent, kind=SpanKind.CONSUMER):
            self._draw(claim)

    def _draw(self, claim: Claim) -> None:
        """From a claim to its end, whatever happens."""
        prediction = claim.prediction
        try:
            with self.pool.use(prediction.ref, prediction.digest) as ready:
                images, times = self._drawn(claim, ready)
            kept = self._kept(claim, images, times)
            if self.queue.finish(claim, kept, times):
                self.metrics.drawn(self.model, prediction.ref, len(kept))
                self._ended(prediction, "succeeded")
        except Canceled:
            self._gave_up(claim)
        except (Busy, StorageError) as error:
            log.warning("prediction %s goes back: %s", claim.id, error)
            self._quietly(partial(self.queue.release, claim))
        except FloatingPointError as error:
            self.metrics.not_finite(self.model, prediction.ref, prediction.drawing["count"])
            self._failed(claim, str(error))
        except Flagged as error:
            self._failed(claim, str(error), "flagged")
        except RaysdError as error:
            self._failed(claim, str(error))
        except Exception as error:
            log.exception("prediction %s failed", claim.id)
            self._unexpected(claim, error)
        finally:
            with self._lock:
                full = self.in_work >= self.most
                del self._claims[claim.id]
            self.metrics.in_progress(self.model, self.in_work)
            if full:  # others may have found no room
                self._room.set()

    def _drawn(self, claim: Claim, ready: Ready) -> tuple[list[Image.Image], dict[str, Any]]:
        prediction = claim.prediction
        drawing = Drawing.model_validate(prediction.drawing)
        uploads = Uploads(self.storage, prediction.owner)
        named = {field: getattr(drawing, field) for field in FIELDS}
        inputs = {field: uploads.read(sha256) if sha256 else None for field, sha256 in named.items()}
        due: Due = queues.SimpleQueue()
        pictures = [
            Picture(
                ready.predictor,
                drawing.of(number),
                adapter=ready.adapter,
                deadline=prediction.deadline,
                preview=partial(_put, due, number) if self.finish.previews else None,
                label=prediction.ref,
                request=prediction.id,
                **inputs,
            )
            for number in range(drawing.count)
        ]
        with self._lock:
            work = self._claims[claim.id]
            work.pictures = pictures
        self.scheduler.submit(pictures)
        for picture in pictures:
            picture.future.add_done_callback(lambda _: due.put(None))
        for _ in pictures:
            self._show(work, due)
        for number, picture in enumerate(pictures):
            tracing.told_of_picture(picture.trail, {"raysd.picture": number, "raysd.sampler": drawing.sampler})
        images = [picture.future.result() for picture in pictures]
        self.metrics.waited(self.model, prediction.ref, max(0.0, time.time() - prediction.created - pictures[0].spent))
        return images, {"draw_time": max(picture.spent for picture in pictures)}

    def _kept(self, claim: Claim, images: Sequence[Image.Image], times: dict[str, Any]) -> list[Kept]:
        """Write what may be shown. Raises Flagged where that is none of them."""
        flagged = [False] * len(images)
        if self.finish.classifier is not None:
            with tracing.span("classify"):
                flagged = in_passing(lambda: self.finish.flagged(images))
        if any(flagged):
            times["flagged"] = sum(flagged)
            self.metrics.flagged(self.model, claim.prediction.ref, sum(flagged))
        if all(flagged):
            raise Flagged
        with tracing.span("store"):
            return [self._keep(claim, number, image) for number, image in enumerate(images) if not flagged[number]]

    def _keep(self, claim: Claim, number: int, image: Image.Image) -> Kept:
        """Mark and write a picture, with what it was drawn by (not the prompt) in the file.

        The claim's token is in its name: who has lost the claim writes over nobody's picture.
        """
        prediction = claim.prediction
        drawing = Drawing.model_validate(prediction.drawing).of(number)
        told = drawing.model_dump(include={"seed", "steps", "guidance", "sampler"})
        body, image = io.BytesIO(), self.finish.marked(image, prediction.digest)
        image.save(body, "PNG", pnginfo=metadata({"model": prediction.ref, "digest": prediction.digest, **told}))
        day = datetime.fromtimestamp(prediction.created, UTC).strftime("%Y-%m-%d")
        path = f"{FOLDER}/{day}/{claim.id}-{claim.token}-{number}.png"
        self.storage.write(path, body.getvalue())
        sha256 = hashlib.sha256(body.getvalue()).hexdigest()
        return Kept(number, path, sha256, drawing.seed, image.width, image.height)

    def _failed(self, claim: Claim, reason: str, outcome: Outcome = "failed") -> None:
        if self._quietly(partial(self.queue.fail, claim, reason)):
            self._ended(claim.prediction, outcome)

    def _unexpected(self, claim: Claim, error: Exception) -> None:
        """It may be this replica's fault: another one tries, until as many tries were made as may be."""
        if claim.prediction.attempt >= MOST_ATTEMPTS:
            self._failed(claim, f"{type(error).__name__}: the service's log says more")
            return
        with self._lock:
            self._left[claim.id] = time.monotonic() + LEFT
        self._quietly(partial(self.queue.release, claim, counts=True))

    def _gave_up(self, claim: Claim) -> None:
        """Cancelled by its client or its deadline; or by us, because we stop or lost the claim."""
        if self._stop.is_set():
            self._quietly(partial(self.queue.release, claim))
        elif self._quietly(partial(self.queue.canceled, claim)):
            self._ended(claim.prediction, "canceled")

    def _ended(self, prediction: Prediction, outcome: Outcome) -> None:
        tracing.note({"raysd.outcome": outcome})
        if outcome == "failed":
            tracing.failed(tracing.current(), outcome)
        self.metrics.ended(self.model, prediction.ref, outcome, time.time() - prediction.created)

    def _quietly(self, call: Callable[[], Any]) -> Any:
        """What cannot be written down now is found by the lease's end."""
        try:
            return call()
        except RaysdError as error:
            log.warning("%s", error)
            return None

    def _tend(self) -> None:
        while not self._stop.is_set():
            self._room.wait(LOOK)
            self._room.clear()
            try:
                self._look()
            except StorageError as error:
                self.metrics.database_failed()
                log.warning("%s", error)
            except Exception:
                log.exception("the queue could not be tended")

    def _look(self) -> None:
        """Renew first, once the database answers: leases that ended while it was away are still ours if nobody was faster."""
        self.queued = self.queue.waiting(self.model)
        if time.monotonic() - self._renewed >= RENEW:
            self._renew()
            self._renewed = time.monotonic()
        if (room := self.most - self.in_work) > 0 and self._may_claim:
            for claim in self.queue.claim(self.name, self.model, most=room, but=self._passed_over):
                self._begin(claim)
        self.queue.expire()

    def _renew(self) -> None:
        """Renew all claims; what is not ours any more, or was cancelled, ends."""
        with self._lock:
            claims = [work.claim for work in self._claims.values()]
        held = self.queue.renew(claims) if claims else set()
        for claim in claims:
            if claim.id not in held:
                self.cancel(claim.id)

    def cancel(self, id: str) -> None:
        """End a prediction that is drawn here at its next step."""
        with self._lock:
            found = self._claims.get(id)
        for picture in found.pictures if found else ():
            picture.cancel()

    def _show(self, work: Work, due: Due) -> None:
        """Mark and encode previews, beside the scheduler's thread, until a picture has ended."""
        for number, index, image in iter(due.get, None):
            if not work.watches:
                continue
            with suppress(Exception):  # whoever looks on does not disturb
                body = io.BytesIO()
                self.finish.marked(image, work.claim.prediction.digest).save(body, "PNG")
                for watch in work.watches:
                    watch(number, index, body.getvalue())


def _put(due: Due, number: int, index: int, image: Image.Image) -> None:
    due.put((number, index, image))


def _about(claim: Claim) -> dict[str, Any]:
    """What a span says of a prediction."""
    prediction = claim.prediction
    return {
        "raysd.prediction": prediction.id,
        "raysd.request_id": prediction.request_id,
        "raysd.model": prediction.model,
        "raysd.version": prediction.ref,
        "raysd.digest": prediction.digest,
        "raysd.pictures": prediction.drawing["count"],
        "raysd.attempt": prediction.attempt,
        "raysd.shadow": prediction.shadow_of is not None,
    }
