"""One trial: a whole run of `raysd.train`, seen by Ray Tune as a sequence of validations."""

import queue
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from ray import tune

from raysd.config import SearchSpec, TrainingSpec, override
from raysd.errors import RaysdError
from raysd.storage import Storage
from raysd.train.launch import train
from raysd.train.plan import Plan
from raysd.tune import records
from raysd.tune.records import TrialRecord
from raysd.tune.space import key_of

WORST = 1e9
"""What a failed trial reports, so that the searcher keeps away from such settings; it is in no record."""
OVER = "over"
"""In a trial's last result: it ended by itself, not by a decision of the scheduler or the budget."""
STOP_SECONDS = 120.0
"""How long a trial that is stopped may take to write its checkpoint."""


@dataclass(frozen=True)
class Job:
    """All that a trial is told besides its values."""

    root: str
    search: str
    spec: SearchSpec
    training: TrainingSpec
    shared_plan: bool  # whether all trials train on the same pictures and latents
    pictures: int
    gpus: int  # of one worker


def settings(job: Job, values: dict[str, Any]) -> TrainingSpec:
    """The training spec of a trial: validated every `scheduler.every` epochs, its best weights kept, unpublished."""
    spec = override(job.training, values)
    period = max(1, round(job.spec.scheduler.every * job.pictures / spec.optim.batch_size))
    changes = {"validation.every": period, "validation.best": True, "publish.model": None, "publish.alias": None}
    return override(spec, {"track.tensorboard": False, **changes})


class SearchTrial(tune.Trainable):
    """Trains in a thread; each `step` waits for the next validation.

    A trial that was tried before (its record is whole) repeats its reports without training. One that was interrupted
    repeats what it had reported and goes on from its run's last checkpoint.
    """

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        assert job is not None
        self.job = job
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ray Tune gives this process another trial: what was imported stays."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        while True:
            if self.past:
                report = self.past.pop(0)
                whole = not self.past and self.record.status in records.WHOLE
                return {**report, "done": whole, OVER: whole}
            kind, value = self.events.get()
            if kind == "end":
                return self._ended(value)
            if self._reported(value):
                return {**self.record.reports[-1], "done": False, OVER: False}

    def cleanup(self) -> None:
        """Stopped early: the run writes a checkpoint and gives back its workers. The driver knows who stopped it."""
        if self.thread is not None and self.thread.is_alive():
            self.asked.set()
            self.thread.join(STOP_SECONDS)
        if self.record.status == "running":
            self._write(status="interrupted")

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run keeps its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the run goes on from its own."""

    def _begin(self, values: dict[str, Any]) -> None:
        self.root = Storage(self.job.root)
        self.store = records.storage_of(self.root, self.job.search)
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.asked, self.thread = threading.Event(), None
        key = key_of(values)
        self.spec = settings(self.job, values)
        workers = self.spec.scale.most_workers
        new = TrialRecord(key, values, f"{self.job.search}-{key}", workers=workers, gpus=self.job.gpus * workers)
        self.record = records.read_trial(self.store, key) or new
        self.began, self.before = time.time(), self.record.seconds
        self.past = list(self.record.reports)
        if self.record.status in records.WHOLE:
            self.past = self.past or [{"epoch": 0.0, **self._worst()}]
            return
        self._write(status="running", reason=None)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        plan = Plan.load(self.store.child(records.PLAN)) if self.job.shared_plan else None
        try:
            outcome = train(self.spec, self.record.run, self.root, self._watch, plan, self.asked.is_set)
            self.events.put(("end", None if outcome.finished else "interrupted"))
        except (RaysdError, OSError, RuntimeError) as problem:
            self.events.put(("end", problem))

    def _watch(self, event: dict[str, Any]) -> None:
        if event["kind"] == "validation" and event["step"] > 0:
            self.events.put(("validation", event))

    def _reported(self, event: dict[str, Any]) -> bool:
        """Keep a validation; False for one that was reported before the run was interrupted."""
        step = event["step"]
        if self.record.reports and step <= self.record.reports[-1]["step"]:
            return False
        report = {
            "step": step,
            "epoch": step * self.spec.optim.batch_size / self.job.pictures,
            "validation_loss": event["validation_loss"],
            "seconds": self.before + time.time() - self.began,
        }
        self._write(reports=(*self.record.reports, report))
        return True

    def _ended(self, problem: Any) -> dict[str, Any]:
        if problem is None:
            self._write(status="finished")
        elif problem == "interrupted":
            self._write(status="interrupted")
        else:
            self._write(status="failed", reason=str(problem))
        last = self.record.reports[-1] if self.record.reports else {"epoch": 0.0}
        return {**last, **(self._worst() if self.record.status == "failed" else {}), "done": True, OVER: True}

    def _worst(self) -> dict[str, float]:
        return {metric: WORST for metric in self.job.spec.objective}

    def _write(self, **changes: Any) -> None:
        seconds = self.before + time.time() - self.began
        self.record = records.write_trial(self.store, replace(self.record, seconds=seconds, **changes))
