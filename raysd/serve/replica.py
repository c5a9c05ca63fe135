"""A process that draws with one served model, as Ray Serve sees it."""

import asyncio
import logging
import os
import platform
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from raysd.config.serving import ModelSpec
from raysd.serve.metrics import Metrics

if TYPE_CHECKING:
    from raysd.export.kept import Watch
    from raysd.references import Located
    from raysd.serve.predictor import Predictor
    from raysd.serve.routes import Target
    from raysd.serve.torch_backend import Backend
    from raysd.storage import Storage

log = logging.getLogger(__name__)
STUCK = 300.0
"""Seconds without a denoising step, with work at hand, after which a replica is taken for stuck and replaced."""

RETRY = 30.0
"""Seconds after which an export that could not be made is tried again."""

NOT_FINITE = 5
"""Pictures in a row that held NaN, and none that did not, after which a replica is taken for broken and replaced."""


class Replica:
    """Claims predictions of its model and draws them. Ready once the deployed version is loaded."""

    def __init__(self, spec: ModelSpec, storage: str, database: str | None, keep: float, signers: Sequence[str] = ()):
        from raysd.quiet import import_quickly, quiet_libraries

        quiet_libraries()
        import_quickly()
        import torch

        from raysd.database import Database
        from raysd.serve import tracing
        from raysd.serve.finish import open_finish
        from raysd.serve.pool import GIB, Pool
        from raysd.serve.queue import Queue
        from raysd.serve.routes import Routes
        from raysd.serve.scheduler import Picture, Scheduler
        from raysd.serve.worker import Worker
        from raysd.storage import Storage

        tracing.configure("replica")
        store = Storage(storage)
        self.spec, self._metrics, model = spec, Metrics.to_ray(), spec.served_name

        def stepped(batch: Sequence[Picture], seconds: float) -> None:
            self._metrics.stepped(model, batch[0].label, seconds, len(batch))

        def loaded(ref: str, seconds: float, adapter: bool) -> None:
            self._metrics.loaded(model, ref, "succeeded")
            if adapter:
                self._metrics.lora_loaded(model, ref, seconds)

        torch.set_num_threads(max(1, int(spec.cpus)))  # of the threads that begin after this
        self._scheduler = Scheduler(spec.rows, spec.admitted, spec.waiting + spec.admitted * 10, stepped)
        memory = spec.memory and spec.memory * GIB
        self._pool = Pool(
            store,
            lambda located: open_base(spec, located, store, signed=bool(signers)),
            spec.bases,
            spec.adapters,
            loaded,
            signers,
            memory,
        )
        queue = Queue(Database(database, store), keep_pictures=keep, metrics=self._metrics)
        name = f"{platform.node()}/{os.getpid()}"
        finish = open_finish(spec)
        self._worker = Worker(
            name, model, queue, store, self._pool, self._scheduler, self._metrics, spec.admitted, finish
        )
        self._store, self._exporting = store, threading.Lock()
        self._routes = Routes(store, [spec], signers)
        for target in self._routes.targets():
            self._load(target)
        self._routes.on_change, self._routes.on_unexported = self._load, self._export
        self._routes.on_refused = lambda target: self._metrics.loaded(model, target.ref, "failed")
        self._pool.watch()
        self._worker.start()
        self._metrics.ready(model)

    async def draw(self, id: str) -> AsyncIterator[tuple[int, int, bytes]]:
        """Draw a prediction if it is free, and tell of its previews (picture, index, PNG). Ends when it has ended."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[int, int, bytes] | None] = asyncio.Queue()

        def watch(number: int, index: int, png: bytes) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (number, index, png))

        work = await asyncio.to_thread(self._worker.take, id, watch)
        if work is None:
            return
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(told.put_nowait, None))
        while (preview := await told.get()) is not None:
            yield preview

    def cancel(self, id: str) -> None:
        """End a prediction at its next step, if it is drawn here."""
        self._worker.cancel(id)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scaling` goes by. Serve asks every few seconds."""
        return {
            "pictures": float(self._scheduler.load),
            "occupancy": self._scheduler.occupancy,
            "queued": float(self._worker.queued),
        }

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._scheduler.stuck(STUCK):
            raise RuntimeError(f"no denoising step for {STUCK:.0f} s")
        if len(self._scheduler.not_finite) >= NOT_FINITE:
            raise RuntimeError(
                f"the pictures of {len(self._scheduler.not_finite)} requests in a row were not finite (NaN)"
            )
        if self._scheduler.broken:
            raise RuntimeError(f"{len(self._scheduler.failing)} requests in a row failed with errors of the engine")

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            self._metrics.ready(self.spec.served_name, yes=False)
            self._routes.close()
            self._pool.close()
            worker.stop()
            from raysd.serve import tracing

            tracing.flush()

    def _load(self, target: "Target") -> None:
        """Load a version before it is asked for. One that cannot be loaded is refused when it is."""
        from raysd.serve.threads import in_passing

        try:
            with self._pool.use(target.ref, target.digest) as ready:
                if ready.adapter is None:
                    in_passing(lambda: warm(ready.predictor, self.spec.rows))
        except Exception as error:  # whatever it is: others are loaded
            log.error("%s cannot be loaded: %s", target.ref, error)
            self._metrics.loaded(self.spec.served_name, target.ref, "failed")

    def _export(self, target: "Target") -> None:
        """Make the export that a version waits for, beside the drawing, one at a time; what fails is tried again later."""
        if self._exporting.acquire(blocking=False):
            threading.Thread(target=self._make_export, args=(target,), name="export", daemon=True).start()

    def _make_export(self, target: "Target") -> None:
        from raysd.export.kept import base_of, make
        from raysd.references import locate

        try:
            base = base_of(locate(target.ref, self._store), self._store)
            make(self._store, base, self.spec.export_precision, _say(base))
        except Exception as error:  # whatever it is: the version is not switched to
            log.error("%s: its export cannot be made: %s", target.ref, error)
            self._metrics.loaded(self.spec.served_name, target.ref, "failed")
            time.sleep(RETRY)
        finally:
            self._exporting.release()


def warm(predictor: "Predictor", rows: int) -> None:
    """One step of a full batch and of a lone picture, so that the first picture is no slower than the next."""
    from raysd.serve.drawing import Drawing

    drawing = Drawing(prompt="", steps=1)
    samples = [predictor.begin(drawing.of(number)) for number in range(max(2, rows // 2))]
    predictor.advance(samples[:1], None)
    predictor.advance(samples[1:], None)
    predictor.pictures([samples[0].latents])


def open_base(spec: ModelSpec, located: "Located", storage: "Storage", *, signed: bool = False) -> "Predictor":
    """A predictor for the base at or below `located`, on this process's device; `signed`: of signed files alone."""
    from raysd.serve.predictor import Predictor

    backend = _onnx(spec, located, storage, signed) if spec.backend == "onnx" else _torch(spec, located)
    return Predictor(located.family, located.folder, backend)


def _torch(spec: ModelSpec, located: "Located") -> "Backend":
    import torch

    from raysd.serve.torch_backend import TorchBackend

    device = torch.device("cuda" if spec.gpus and torch.cuda.is_available() else "cpu")
    precision = spec.precision or ("bf16" if device.type == "cuda" else "fp32")
    return TorchBackend(located.family, located.folder, device, precision, compiled=spec.compile)


def _onnx(spec: ModelSpec, located: "Located", storage: "Storage", signed: bool) -> "Backend":
    from raysd.serve.onnx import OnnxBackend

    return OnnxBackend.open(storage, located, spec.export_precision, stored=not signed, watch=_say(located))


def _say(located: "Located") -> "Watch":
    """Of what takes a minute the log has a line."""

    def say(event: dict[str, Any]) -> None:
        if event["kind"] == "phase":
            log.warning("%s: %s", located.ref, event["text"])

    return say
