"""The driver's end of a run: takes records from the workers, keeps metrics.jsonl and the trackers, shows progress."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from raysd.storage import Storage
from raysd.train import runs
from raysd.train.link import PERIOD
from raysd.train.track import Trackers

WRITE_PERIOD = 5.0
"""Seconds between two writings of metrics.jsonl, more when writing takes long."""

TRACKED = ("loss", "lr", "grad_norm", "slowest_rank", "slowest_lag")

Watch = Callable[[dict[str, Any]], None]
"""Told what happens: {"kind": "phase" | "count" | "start" | "step" | "validation" | "checkpoint" | "notice", ...}."""


def tell(watch: Watch, notice: str | None) -> None:
    if notice is not None:
        watch({"kind": "notice", "text": notice})


class Follower:
    """Drains the link in the background until closed. The only writer of metrics.jsonl, while `holds` says that it is.

    Records of steps that are done again after a restart replace the former ones.
    """

    def __init__(
        self,
        run: Storage,
        link: Any,
        trackers: Trackers,
        watch: Watch,
        on_stop: Callable[[], None],
        holds: Callable[[], bool],
    ):
        self.run, self.link, self.trackers, self.watch = run, link, trackers, watch
        self.on_stop, self.holds = on_stop, holds
        self.rows = runs.metrics(run)
        self._ended = threading.Event()
        self._next_write = 0.0
        self._thread = threading.Thread(target=self._loop, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take what is left, write it, end."""
        self._ended.set()
        self._thread.join()
        self._drain()
        self._write()
        self.trackers.close()

    def _loop(self) -> None:
        next_look, said = 0.0, ""
        while not self._ended.wait(PERIOD):
            try:
                self._drain()
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + 2.0
                    if self.run.exists(runs.STOP):
                        self.on_stop()
                if time.monotonic() >= self._next_write:
                    self._write()
            except Exception as error:  # the run itself must not end because a store or a tracker has a bad minute
                text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                if text != said:  # it may last
                    self.watch({"kind": "notice", "text": text})
                said = text

    def _drain(self) -> None:
        for record in ray.get(self.link.take.remote()):
            kind = record["kind"]
            if kind == "start":
                self.rows = [row for row in self.rows if row["step"] <= record["step"]]
            elif kind == "step":
                self.rows.append({name: value for name, value in record.items() if name != "kind"})
                self.trackers.log(record["step"], {name: record[name] for name in TRACKED if name in record})
            elif kind == "validation":
                self._validation(record)
            elif kind == "usage" and self.holds():
                self.run.write(runs.USAGE, json.dumps(record).encode())
            elif kind == "checkpoint":
                self._next_write = 0.0  # a resume goes on from here: what led to it is written now
            self.watch(record)

    def _validation(self, record: dict[str, Any]) -> None:
        value = {"validation_loss": record["validation_loss"]}
        if self.rows and self.rows[-1]["step"] == record["step"]:
            self.rows[-1].update(value)
        else:
            self.rows.append({"step": record["step"], "time": record["time"], **value})
        self.trackers.log(record["step"], value)

    def _write(self) -> None:
        if not self.rows or not self.holds():
            return
        began = time.monotonic()
        self.run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        took = time.monotonic() - began
        self._next_write = time.monotonic() + max(WRITE_PERIOD, 20 * took)
