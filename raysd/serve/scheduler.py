"""Continuous batching by denoising step (the idea of Orca, Yu et al. 2022, for diffusion): pictures join and leave between steps.

Each turn takes the admitted picture that has waited longest for a step, fills the batch with others of its kind (same
base, adapter and latent shape), longest waiting first, and steps them once. Between two steps of one picture every
other admitted one is at the head of at most one turn, so that a picture of s steps is done within s x `admitted` turns
of its admission, whatever comes after it. Admission is in order of arrival.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from PIL import Image

from raysd.errors import OutOfMemory, RaysdError
from raysd.serve import tracing
from raysd.serve.drawing import Drawing
from raysd.serve.predictor import Predictor, Sample

log = logging.getLogger(__name__)
FORGET = 0.1
"""Weight of the last step in the occupancy."""
CALM = 50
"""Steps that fit, after which the batch may be a row larger again than what did not."""
FAILING = 5
"""Requests in a row that ended in errors nobody expects, after which it is not theirs but the engine's fault."""


class Busy(RaysdError):
    """More waits than the scheduler takes: try again later."""


class Canceled(RaysdError):
    """The picture is no longer wanted, or its deadline has passed."""


class Picture:
    """One picture to draw. `future` has it in the end; `preview(index, image)` is called from the scheduler's thread.

    `label` is the version's name, for metrics; pictures of one request have the same `request`. Raises RequestError for
    a drawing that the model cannot do.
    """

    def __init__(
        self,
        predictor: Predictor,
        drawing: Drawing,
        *,
        adapter: str | None = None,
        image: bytes | None = None,
        mask: bytes | None = None,
        deadline: float | None = None,
        preview: Callable[[int, Image.Image], None] | None = None,
        label: str = "",
        request: str = "",
    ):
        self.predictor, self.drawing, self.adapter = predictor, drawing, adapter
        self.inputs = image, mask
        self.deadline, self.preview, self.label, self.request = deadline, preview, label, request
        self.future: Future[Image.Image] = Future()
        self.sample: Sample | None = None
        self.admitted = self.ended = 0.0
        self.canceled = False
        self.turn = 0  # when it was stepped last, or admitted
        self.trail = tracing.trail()
        predictor.check(drawing)
        steps = predictor.steps(drawing)
        shares = range(1, drawing.partial_images + 1) if preview else ()
        self.previews = {max(1, steps * n // (drawing.partial_images + 1)): n - 1 for n in shares}

    def cancel(self) -> None:
        """End it before its next step."""
        self.canceled = True

    @property
    def spent(self) -> float:
        """Seconds from admission to now, or to its end."""
        return (self.ended or time.monotonic()) - self.admitted if self.admitted else 0.0

    @property
    def started(self) -> Sample:
        assert self.sample is not None
        return self.sample

    @property
    def kind(self) -> tuple[int, str | None, torch.Size]:
        """What pictures of one batch have in common."""
        return id(self.predictor), self.adapter, self.started.latents.shape


class Scheduler:
    """Draws pictures of any number of bases in turns, on a thread of its own between `start` and `stop`.

    `rows` bounds the denoiser's batch (a picture with guidance has two); where memory is short it is smaller for a while.
    `admitted` bounds the pictures that take turns, `waiting` those that wait for admission. `stepped(batch, seconds)` is
    called after each step.
    """

    def __init__(
        self,
        rows: int = 16,
        admitted: int = 64,
        waiting: int = 256,
        stepped: "Callable[[Sequence[Picture], float], None] | None" = None,
    ):
        self.rows, self._most_rows, self._calm = rows, rows, 0
        self._most_admitted, self._most_waiting = admitted, waiting
        self._stepped = stepped or (lambda batch, seconds: None)
        self._waiting: deque[Picture] = deque()
        self._admitted: list[Picture] = []
        self._turn = 0
        self._filled = 0.0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._beat = time.monotonic()
        self.not_finite: set[str] = set()
        """Requests whose pictures held NaN or infinity, and no picture was finite since."""
        self.failing: set[str] = set()
        """Requests whose pictures ended in errors that nobody expects, and no picture was finished since."""

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Take all of them or none. Raises Busy."""
        with self._changed:
            if self._stopping or len(self._waiting) + len(pictures) > self._most_waiting:
                raise Busy(f"{len(self._waiting)} pictures wait already: try again later")
            if not self.load:
                self._beat = time.monotonic()  # there was nothing to do until now
            self._waiting.extend(pictures)
            self._changed.notify_all()

    @property
    def load(self) -> int:
        """Pictures here, waiting or taking turns."""
        return len(self._waiting) + len(self._admitted)

    @property
    def occupancy(self) -> float:
        """Rows that the last steps used, of those there are, as a mean that forgets; 0 where there is no work."""
        return self._filled if self.load else 0.0

    def stuck(self, seconds: float) -> bool:
        """Whether there was work and no turn for so long."""
        return self.load > 0 and time.monotonic() - self._beat > seconds

    @property
    def broken(self) -> bool:
        """Whether the engine fails whatever it draws, as after an error that spoils CUDA for the whole process."""
        return len(self.failing) >= FAILING

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what is here and end the thread."""
        with self._changed:
            self._stopping = True
            for picture in [*self._waiting, *self._admitted]:
                picture.cancel()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def turn(self) -> bool:
        """Admit, step one batch, hand out what is done. False where there was nothing to do."""
        self._beat = time.monotonic()
        self._drop()
        self._admit()
        if not self._admitted:
            return False
        batch = self._choose()
        began = time.monotonic()
        if not self._step(batch):
            return True
        seconds = time.monotonic() - began
        self._stepped(batch, seconds)
        for picture in batch:
            if picture.trail is not None:
                picture.trail.stepped(len(batch), seconds)
        self._hand_out(batch)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._admitted or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._waiting or self._admitted):
                    return
            self.turn()

    def _drop(self) -> None:
        """Cancelled pictures and those past their deadline leave."""
        now = time.time()
        for picture in [*self._waiting, *self._admitted]:
            late = picture.deadline is not None and now > picture.deadline
            if picture.canceled or late or picture.future.cancelled():
                self._end(picture, Canceled("its deadline has passed" if late else "canceled"))

    def _admit(self) -> None:
        while self._waiting and len(self._admitted) < self._most_admitted:
            with self._changed:
                picture = self._waiting.popleft()
                self._admitted.append(picture)
            # Behind all who wait already: newcomers never keep one waiting, however many come.
            picture.admitted, picture.turn = time.monotonic(), self._turn
            try:
                picture.sample = picture.predictor.begin(picture.drawing, *picture.inputs)
            except Exception as error:
                self._end(picture, error)

    def _choose(self) -> list[Picture]:
        """The batch of this turn."""
        by_wait = sorted(self._admitted, key=lambda picture: picture.turn)  # stable: then in order of admission
        kind, room = by_wait[0].kind, self.rows
        batch: list[Picture] = []
        for picture in by_wait:
            if picture.kind == kind and (picture.started.rows <= room or not batch):
                batch.append(picture)
                room -= picture.started.rows
        return batch

    def _step(self, batch: Sequence[Picture]) -> bool:
        """Step the batch. What does not fit is tried with half as many rows; what fails otherwise ends its pictures."""
        try:
            batch[0].predictor.advance([picture.started for picture in batch], batch[0].adapter)
        except torch.OutOfMemoryError as error:
            if len(batch) > 1:
                self.rows, self._calm = max(1, sum(picture.started.rows for picture in batch) // 2), 0
                log.warning("out of memory with %d pictures: %d rows for now", len(batch), self.rows)
                return False
            self._end(batch[0], error)
            return False
        except Exception as error:
            log.exception("a denoising step failed")
            for picture in batch:
                self._end(picture, error)
            return False
        self._turn += 1
        used = sum(picture.started.rows for picture in batch) / self.rows
        self._filled += FORGET * (min(1.0, used) - self._filled)
        for picture in batch:
            picture.turn = self._turn
        self._grow()
        return True

    def _grow(self) -> None:
        """What did not fit may do so later: with smaller pictures, or when another model has gone."""
        self._calm += 1
        if self._calm >= CALM:
            self.rows, self._calm = min(self._most_rows, self.rows + 1), 0

    def _hand_out(self, batch: Sequence[Picture]) -> None:
        """Decode the pictures that are done, and the previews that are due."""
        done = [picture for picture in batch if picture.started.done]
        for picture in [picture for picture in done if not torch.isfinite(picture.started.latents).all()]:
            self._end(picture, FloatingPointError("the model drew numbers that are none (NaN)"))
            done.remove(picture)
        for part in _parts(done, max(1, self.rows // 2)):
            for picture, image in zip(part, self._decoded(part, done=True), strict=True):
                self._end(picture, image)
        due = [picture for picture in batch if not picture.started.done and picture.started.step in picture.previews]
        for part in _parts(due, max(1, self.rows // 2)):
            for picture, image in zip(part, self._decoded(part, done=False), strict=True):
                if picture.preview is None or isinstance(image, Exception):
                    continue
                with suppress(Exception):  # whoever looks on does not disturb
                    picture.preview(picture.previews[picture.started.step], image)

    def _decoded(self, pictures: Sequence[Picture], done: bool) -> list[Image.Image | Exception]:
        """Of each picture its pixels, or why there are none."""
        latents = [picture.started.latents if done else picture.started.clean for picture in pictures]
        began = time.monotonic()
        try:
            images = pictures[0].predictor.pictures(latents)
            for trail in [picture.trail for picture in pictures if done and picture.trail]:
                trail.decoded(time.monotonic() - began)
            return list(images)
        except Exception as error:
            if len(pictures) == 1 or not isinstance(error, FloatingPointError | torch.OutOfMemoryError):
                log.exception("decoding failed")
                return [error.with_traceback(None)] * len(pictures)  # its frames hold tensors
        # Find out whose it is, or whether each fits alone; after the handler, for the same reason.
        return [image for picture in pictures for image in self._decoded([picture], done)]

    def _end(self, picture: Picture, result: Any) -> None:
        with self._changed:
            if picture in self._admitted:
                self._admitted.remove(picture)
            elif picture in self._waiting:
                self._waiting.remove(picture)
        picture.ended = time.monotonic()
        if picture.trail is not None:
            picture.trail.end()
        if isinstance(result, torch.OutOfMemoryError):
            result = OutOfMemory("one picture of this size does not fit: ask for a smaller one")
        if isinstance(result, FloatingPointError):
            self.not_finite.add(picture.request)
        elif isinstance(result, Image.Image):
            self.not_finite.clear()
            self.failing.clear()
        elif not isinstance(result, RaysdError):
            self.failing.add(picture.request)
        if not picture.future.set_running_or_notify_cancel():
            return
        if isinstance(result, BaseException):
            picture.future.set_exception(result)
        else:
            picture.future.set_result(result)


def _parts(pictures: Sequence[Picture], size: int) -> Iterable[Sequence[Picture]]:
    return (pictures[start : start + size] for start in range(0, len(pictures), size))
