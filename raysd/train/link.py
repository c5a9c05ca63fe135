"""The wire between a run's workers and its driver: an actor that holds records until the driver takes them."""

import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

import ray

from raysd.errors import RaysdError
from raysd.train.hang import EXIT

Wish = Literal["go on", "stop", "end"]
"""What the driver wants of the workers: `stop` is with a checkpoint, `end` at once and without."""
PERIOD = 0.3
"""Seconds between two exchanges."""


@ray.remote(num_cpus=0)
class Link:
    """Records flow to the driver, what it wishes flows to the workers. Dies with the driver."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.wish: Wish = "go on"
        self.problem: RaysdError | None = None
        self.attempt: str | None = None

    def begin(self, attempt: str) -> None:
        """From rank 0 of a new attempt: whoever is left of those before it ends."""
        self.attempt = attempt

    def exchange(self, attempt: str, records: list[dict[str, Any]]) -> Wish:
        """From rank 0: take its records, tell it what the driver wishes."""
        self.attempt = self.attempt or attempt  # a link that was started again has forgotten it
        if attempt != self.attempt:
            return "end"
        self.records += records
        return self.wish

    def take(self) -> list[dict[str, Any]]:
        """From the driver: what has come since."""
        taken, self.records = self.records, []
        return taken

    def stop(self) -> None:
        """From the driver: write a checkpoint and end."""
        if self.wish == "go on":
            self.wish = "stop"

    def abandon(self, problem: RaysdError) -> None:
        """From the driver: end at once, write nothing more, and do not begin again."""
        self.wish = "end"
        self.fail(problem)

    def fail(self, problem: RaysdError) -> None:
        """From any rank: this cannot be mended by starting again."""
        self.problem = self.problem or problem

    def failure(self) -> RaysdError | None:
        return self.problem


def open_link() -> Any:
    """A link on the driver's own node: no host but the driver's takes it away. If its process dies it is started again."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Link.options(scheduling_strategy=here, max_restarts=-1, max_task_retries=-1).remote()  # type: ignore[attr-defined]


class Reporter:
    """Rank 0's end: collects records and exchanges them in the background, so that no step waits for Ray.

    Where the driver abandons the run, or another attempt at it has begun, this process ends in the midst of its step, and so
    takes the other ranks with it.
    """

    def __init__(self, link: Any, end: Callable[[int], None] = os._exit):
        self.link, self._end = link, end
        self.attempt = uuid.uuid4().hex
        self.stop_requested = False
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        ray.get(link.begin.remote(self.attempt))
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def record(self, **values: Any) -> None:
        with self._lock:
            self._records.append({**values, "time": time.time()})

    def confirm(self) -> None:
        """Return if this is still the attempt that the driver hears: one that it is cut off from waits here, or ends."""
        self._ask([])

    def close(self) -> None:
        """Send what is left."""
        self._ended.set()
        self._thread.join()
        self._exchange()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD):
            self._exchange()

    def _exchange(self) -> None:
        with self._lock:
            records, self._records = self._records, []
        self._ask(records)

    def _ask(self, records: list[dict[str, Any]]) -> None:
        wish: Wish = ray.get(self.link.exchange.remote(self.attempt, records))
        if wish == "end":
            self._end(EXIT)
        self.stop_requested = wish == "stop" or self.stop_requested
