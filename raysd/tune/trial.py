"""One trial: a whole run of `raysd.train`, seen by Ray Tune as a sequence of validations."""

import gc
import math
import os
import queue
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune

from raysd import cluster
from raysd.cluster import GROWS_TO
from raysd.config import SearchSpec, TrainingSpec, override
from raysd.errors import LeaseHeld, SpecError
from raysd.evaluate.prompts import Prompt
from raysd.lease import holder
from raysd.storage import Storage
from raysd.train import runs
from raysd.train.checkpoint import Progress
from raysd.train.frozen import FrozenData, total_steps
from raysd.train.hang import EXIT
from raysd.train.launch import Outcome, train
from raysd.tune import records
from raysd.tune.records import TrialRecord, cost_of
from raysd.tune.scoring import score_run, wanted
from raysd.tune.space import key_of

WORST = 1e9
"""What the searcher is told where a trial failed or has no value yet; it is in no record."""
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
    shared_data: bool  # whether all trials train on the same pictures and latents
    here: bool  # whether a trial's own process is its one worker
    pictures: int
    gpus: int  # of one worker
    grows_to: str  # RAYSD_CLUSTER_RESOURCES of the driver, or ""
    prompts: tuple[Prompt, ...]
    real: Any  # features of the data's pictures [N, D] for KID, or None


def settings(job: Job, values: dict[str, Any]) -> TrainingSpec:
    """The training spec of a trial: validated every `scheduler.every` epochs, its best weights kept, unpublished."""
    spec = override(job.training, values)
    period = max(1, round(job.spec.scheduler.every * job.pictures / spec.optim.batch_size))
    changes = {"validation.every": period, "validation.best": True, "publish.model": None, "publish.alias": None}
    return override(spec, {"track.tensorboard": False, **changes})


class SearchTrial(tune.Trainable):
    """Trains in a thread; each `step` waits for the next validation.

    The last validation and the end are one result: nobody is to stop a trial that has nothing left but its scores.

    Trials of one worker train in this very process, which goes from trial to trial: what a worker imports takes it longer
    than many a trial's steps. Those of several workers have a worker group each.

    A trial that was tried before (its record is whole) repeats its reports without training. One that was interrupted
    repeats what it had reported and goes on from its run's last checkpoint. One whose settings another one is training
    at this moment waits for it and repeats its reports.
    """

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        assert job is not None
        self.job = job
        os.environ[GROWS_TO] = job.grows_to  # this process's environment is that of its node
        if job.here and not job.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there are some nevertheless, they are others'
        self.spent = False
        self.next: dict[str, Any] | None = None  # the values of the trial that this process goes on to
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ray Tune gives this process another trial: what was imported stays.

        It begins with its first step: where a process dies before that, Ray Tune does not start the trial again.
        """
        self.next = new_config
        return True

    def step(self) -> dict[str, Any]:
        if self.next is not None:
            self._change(self.next)
        while True:
            if self.past:
                report = self.past.pop(0)
                whole = not self.past and (self.twin or self.record.status in records.WHOLE)
                if whole or self.past or not self._trained():
                    return self._result(report, over=whole)
            kind, value = self.events.get()
            if kind == "twin":
                self._take_over(value)
                if not value.reports:
                    return self._result({"epoch": 0.0}, over=True)
                continue
            if kind == "end":
                return self._ended(value)
            if self._reported(value) and not self._trained():
                return self._result(self.record.reports[-1], over=False)

    def cleanup(self) -> None:
        """Stopped early: the run writes a checkpoint and gives back its workers. The driver knows who stopped it."""
        if self.thread is not None and self.thread.is_alive():
            self.asked.set()
            self.thread.join(STOP_SECONDS)
        if self.record.status == "running":
            self._write(status="interrupted")

    def _change(self, values: dict[str, Any]) -> None:
        """To another trial. A process that cannot be trusted with one ends, and Ray Tune gives the trial a new one."""
        self.cleanup()
        busy = self.thread is not None and self.thread.is_alive()
        if self.job.here and (busy or self.spent):
            os._exit(EXIT)
        self.next = None
        self._begin(values)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run keeps its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the run goes on from its own."""

    def _begin(self, values: dict[str, Any]) -> None:
        self.root = Storage(self.job.root)
        self.store = records.storage_of(self.root, self.job.search)
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.asked, self.thread, self.twin = threading.Event(), None, False
        key = key_of(values)
        new = TrialRecord(key, values, records.run_of(self.job.search, key))
        self.record = records.read_trial(self.store, key) or new
        self.began, self.before = time.time(), self.record.seconds
        self.lowest = WORST  # validation loss that Ray Tune has been told of so far
        self.past = list(self.record.reports)
        if self.record.status in records.WHOLE:
            self.past = self.past or [{"epoch": 0.0}]
            return
        try:
            self.spec = settings(self.job, values)
        except SpecError as problem:
            self.events.put(("end", problem))
            return
        workers = self.spec.scale.most_workers
        gpus = 0 if self.spec.scale.gpus is False else self.job.gpus * workers
        self._write(status="running", reason=None, workers=workers, gpus=gpus)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        gc.collect()  # models are in circles, and the last trial's may be here
        frozen = FrozenData.load(self.store.child(records.PLAN)) if self.job.shared_data else None
        try:
            outcome = self._train_alone(frozen)
            if outcome is not None:
                self.events.put(("end", self._scores() if outcome.finished else "interrupted"))
        except Exception as problem:  # whatever it is: `step` waits for an end
            self.events.put(("end", problem))

    def _train_alone(self, frozen: FrozenData | None) -> Outcome | None:
        """None where another trial has these settings and came to an end: what it told is told again.

        A lease whose holder has died with its node holds for a while, and then this trial goes on.
        """
        while True:
            try:
                return train(
                    self.spec, self.record.run, self.root, self._watch, frozen, self.asked.is_set, self.job.here
                )
            except LeaseHeld:
                self.twin = True
            record = self._others_end()
            if record.status in records.WHOLE or self.asked.is_set():
                self.events.put(("twin", record))
                return None
            self.twin = False

    def _take_over(self, record: TrialRecord) -> None:
        """What the other one reported is what this one has to report."""
        self.record, self.past = record, list(record.reports)

    def _others_end(self) -> TrialRecord:
        """The record of the trial with these settings that another process trains, once that has ended or stopped."""
        run = runs.storage_of(self.root, self.record.run)
        while not self.asked.wait(1.0):
            record = records.read_trial(self.store, self.record.key)
            training = holder(run, runs.LEASE)
            if record is not None and (record.status in records.WHOLE or training is None or not training.alive):
                return record
        return self.record

    def _scores(self) -> dict[str, float]:
        """Of the pictures that the trained weights draw, where the objective asks for them."""
        if not wanted(self.job.spec):
            return {}
        arguments = (self.job.spec, self.spec, self.job.root, self.record.run, self.job.prompts, self.job.real)
        if self.job.here:
            return score_run(*arguments)
        workers = {"num_cpus": self.spec.scale.cpus or 1, "num_gpus": min(1, self.record.gpus)}
        task = ray.remote(**workers, scheduling_strategy="DEFAULT")(score_run)  # not in this process's group of no CPU
        found: dict[str, float] = cluster.result(task.remote(*arguments), "scoring")
        return found

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

    def _trained(self) -> bool:
        """Whether the run's last validation is among the reports, so that its end is what comes next.

        Where trials are stopped they all have the same number of pictures: `check_space` lets nothing vary that changes it.
        """
        progress = Progress()
        for report in self.record.reports:
            progress = replace(progress, step=int(report["step"])).judged(report["validation_loss"])
        ended = progress.step >= total_steps(self.spec, self.job.pictures)
        return ended or progress.exhausts(self.spec.validation.patience)

    def _ended(self, how: Any) -> dict[str, Any]:
        """`how`: the scores of a trial that finished, "interrupted", or what it raised."""
        if isinstance(how, dict):
            reports = self.record.reports or ({"step": 0, "epoch": 0.0},)
            last = {**reports[-1], **how, "seconds": self.before + time.time() - self.began}
            self._write(status="finished", reports=(*reports[:-1], last))
        elif how == "interrupted":
            self._write(status="interrupted")
        else:
            self.spent = True  # its memory, or a device's, may not be what it was
            self._write(status="failed", reason=str(how) or type(how).__name__)
        return self._result(self.record.reports[-1] if self.record.reports else {"epoch": 0.0}, over=True)

    def _result(self, report: dict[str, float], over: bool) -> dict[str, Any]:
        """What Ray Tune sees: every metric, lower being better.

        Of the validation loss the lowest so far, since the best checkpoint is what a trial publishes: one that rises
        after its best is no worse for it. The record keeps what was measured.
        """
        failed = self.record.status == "failed" and over
        self.lowest = min(self.lowest, report.get("validation_loss", WORST))
        seen = {**report, "validation_loss": self.lowest}
        costs: dict[str, float] = {
            metric: cost_of(metric, seen[metric]) if not failed and math.isfinite(seen.get(metric, math.nan)) else WORST
            for metric in {"validation_loss", *self.job.spec.objective}
        }
        return {"epoch": report["epoch"], **costs, "done": over, OVER: over}

    def _write(self, **changes: Any) -> None:
        if self.twin:  # the record is the other one's
            return
        seconds = self.before + time.time() - self.began
        changes = {"seconds": seconds, "written": time.time(), **changes}
        self.record = records.write_trial(self.store, replace(self.record, **changes))
