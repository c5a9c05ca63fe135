"""The real application, router and one replica's worker in one process, without Ray."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch

from raysd.config.serving import ServingSpec
from raysd.database import Database
from raysd.feedback.generations import Generations
from raysd.models import family_of
from raysd.serve.finish import Finish
from raysd.serve.http.application import build
from raysd.serve.keys import Keys
from raysd.serve.metrics import Metrics
from raysd.serve.pool import Pool
from raysd.serve.predictor import Predictor
from raysd.serve.queue import Queue
from raysd.serve.router import Router
from raysd.serve.routes import Routes
from raysd.serve.scheduler import Scheduler
from raysd.serve.torch_backend import TorchBackend
from raysd.serve.worker import Worker
from raysd.storage import Storage


class Replicas:
    """A worker called as Serve's handle calls a replica."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.draw, self.cancel = SimpleNamespace(remote=self._draw), SimpleNamespace(remote=worker.cancel)

    def options(self, **_: Any) -> "Replicas":
        return self

    async def _draw(self, id: str) -> AsyncIterator[tuple[int, int, bytes]]:
        previews: list[tuple[int, int, bytes]] = []
        work = await asyncio.to_thread(self.worker.take, id, lambda *preview: previews.append(preview))
        if work is not None:
            await asyncio.wrap_future(work)
        for preview in previews:
            yield preview


class House:
    """A service that draws `base` as cats. `told` has what its worker told its metrics: names, values, labels."""

    def __init__(self, root: Path, base: Path, finish: Finish | None = None):
        self.storage = storage = Storage(str(root))
        self.database = Database(f"sqlite:///{root}/raysd.db", storage)
        self.database.migrate()
        spec = ServingSpec.model_validate({"models": [{"ref": str(base), "name": "cats"}], "public": True})
        self.key = Keys(self.database).create("somebody", ("generate",))[1]
        family, self.queue = family_of(base), Queue(self.database)
        pool = Pool(storage, lambda at: Predictor(family, at.folder, TorchBackend(family, base, torch.device("cpu"))))
        self.told: list[tuple[str, float, dict[str, str]]] = []
        metrics = Metrics(lambda metric, value, labels: self.told.append((metric.name, value, labels)))
        self.worker = Worker("one", "cats", self.queue, storage, pool, Scheduler(), metrics, 8, finish)
        self.worker.scheduler.start()  # not `start`, which would claim what is to come by a call
        routes, generations = Routes(storage, spec.models), Generations(self.database, storage)
        calls = {"cats": Replicas(self.worker)}
        router = Router(self.queue, storage, routes, calls, Metrics.off(), {"cats": 9}, generations)
        self.app = build(router, self.queue, self.database, storage, spec, Metrics.off())

    async def ask(self, path: str, body: Any, **headers: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}", **headers}
        transport = httpx.ASGITransport(self.app)
        async with self.app.router.lifespan_context(self.app):
            async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=300) as client:
                answer = await client.post(path, json=body, headers=headers)
            await asyncio.to_thread(self.settle)
            return answer

    def settle(self) -> None:
        """Wait until the worker has done with what it was asked for: the answer goes out a little before."""
        while self.worker.in_work:
            time.sleep(0.01)
