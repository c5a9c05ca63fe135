"""How many nodes the cluster has while a search runs: what its trials brought up, and that it went again."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

LEAVE_SECONDS = 90.0
"""How long a search that has ended goes on looking for the nodes that came for it to leave."""
PERIOD = 1.0


def alive() -> int:
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"])


class Timeline:
    """(seconds, nodes alive) where the number changed, looked at once a second in a thread of its own.

    `rows` are those of the search's earlier attempts, which took `before` seconds.
    """

    def __init__(self, rows: Iterable[tuple[float, int]], before: float, count: Callable[[], int] = alive):
        self.rows, self.count = list(rows), count
        self.began = time.monotonic() - max([before, *(when for when, _ in self.rows)])
        self.ended = threading.Event()
        self.first = self.most = self._look()

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.ended.set()
        self.thread.join()

    @property
    def grown(self) -> bool:
        """Whether nodes came since this began and have not all gone."""
        return self.most > self.first and self.rows[-1][1] > self.first

    def wait(self, given_up: threading.Event, most: float = LEAVE_SECONDS) -> None:
        """Until the nodes that came have gone, `most` seconds are over or `given_up` is set."""
        end = time.monotonic() + most
        while self.grown and time.monotonic() < end and not given_up.wait(PERIOD):
            continue

    def _watch(self) -> None:
        while not self.ended.wait(PERIOD):
            self.most = max(self.most, self._look())

    def _look(self) -> int:
        count = self.count()
        if not self.rows or self.rows[-1][1] != count:
            self.rows.append((time.monotonic() - self.began, count))
        return count
