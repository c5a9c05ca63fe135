"""A search from spec to version: check everything, fill the caches once, let Ray Tune run the trials, publish the best."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from raysd import cluster
from raysd.config import SearchSpec, TrainingSpec, override
from raysd.errors import LeaseLost, NotFound, RequestError, TrainingFailed
from raysd.evaluate.prompts import Prompt
from raysd.lease import Lease
from raysd.references import locate
from raysd.registry import Version
from raysd.storage import Storage
from raysd.train import runs
from raysd.train.launch import Watch, fill_caches, plan_for, train
from raysd.train.plan import Plan, total_steps
from raysd.train.publish import publish
from raysd.tune import records
from raysd.tune.records import LEASE, SearchRecord, TrialRecord
from raysd.tune.scoring import prompts_of, reference
from raysd.tune.space import check_choices, check_space, optuna_space, ray_space

DRIVER_MEMORY = 400 * 2**20
"""Of a trial's own process, bytes: it asks for no CPU, so that its workers can have them all."""
INTERRUPTED = "interrupted"
ACTOR_FAILURES = 3
"""How often a trial whose process died is started again; its run goes on from its checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a search ended."""

    record: SearchRecord
    trials: list[TrialRecord]
    best: list[TrialRecord]

    @property
    def finished(self) -> bool:
        return self.record.status == "finished"


def search(
    spec: SearchSpec, training: TrainingSpec, name: str, root: Storage, watch: Watch, retrain: bool = False
) -> Outcome:
    """Search, or go on with the search of that name; the best trial (each of the front) is published.

    `training` is what each trial starts from: the recipe with `spec.training` and the command's own options in it.

    With `retrain` the best settings are trained again on all pictures for as many epochs as were best. Raises
    RequestError before anything starts, LeaseHeld if the search runs elsewhere.
    """
    store = records.storage_of(root, name)
    existing = _existing(root, name, spec, training)
    check_space(spec, training)
    if spec.searcher.kind == "optuna":
        check_choices(spec)
    plan = (
        Plan.load(store.child(records.PLAN))
        if existing
        else plan_for(training, root, locate(training.base, root), watch)
    )
    if not plan.validation and (spec.scheduler.kind != "none" or "validation_loss" in spec.objective):
        raise RequestError("data.validation: no picture is held out, and no trial could report validation_loss")
    prompts = prompts_of(spec, plan)
    root.require_swap()
    watch({"kind": "phase", "text": "starting Ray"})
    cluster.join(training.scale.most_workers)
    room = room_for(spec, training)
    lease = Lease.acquire(store, LEASE)
    lost = threading.Event()
    lease.start(lambda reason: lost.set())
    try:
        if not existing:
            plan.save(store.child(records.PLAN))
        body = existing or SearchRecord(name, spec.model_dump(mode="json"), training.model_dump(mode="json"))
        return Driver(spec, training, body, root, store, plan, prompts, room, watch, lost).run(retrain)
    finally:
        lease.release()


@dataclass(frozen=True)
class Room:
    """How many trials run at once, and what each of their workers gets."""

    trials: int
    cpus: int
    gpus: int


def room_for(spec: SearchSpec, training: TrainingSpec) -> Room:
    """Share out the cluster, as large as it may become. Raises RequestError if it has no room for one trial."""
    scale = training.scale
    each = cluster.allot(scale)
    most = cluster.capacity()
    workers, asked = scale.most_workers, scale.cpus or 1
    rooms = [int(most.get("CPU", 1)) // (workers * asked)]
    if each.gpus:
        rooms.append(int(most.get("GPU", 0)) // workers)
    trials = min(spec.concurrent or max(1, min(rooms)), spec.trials)
    if scale.cpus or each.gpus:
        return Room(trials, each.cpus, each.gpus)
    return Room(trials, max(1, int(most.get("CPU", 1)) // (workers * trials)), 0)


class Driver:
    """A search while this process holds its lease."""

    def __init__(
        self,
        spec: SearchSpec,
        training: TrainingSpec,
        record: SearchRecord,
        root: Storage,
        store: Storage,
        plan: Plan,
        prompts: tuple[Prompt, ...],
        room: "Room",
        watch: Watch,
        lost: threading.Event,
    ):
        self.spec, self.training, self.record, self.root, self.store = spec, training, record, root, store
        self.plan, self.prompts, self.room, self.watch, self.lost = plan, prompts, room, watch, lost
        self.stopped: set[str] = set()  # keys that the scheduler or the budget stopped

    def run(self, retrain: bool) -> Outcome:
        fill_caches(self.plan, self.root, self.training, self.watch)
        self.real = reference(self.spec, self.plan, self.training.data.resolution)
        self.record = records.write(self.store, replace(self.record, status="running", ended_by=None))
        with self._clock():
            ended_by = self._tune()
        self._settle(ended_by)
        if self.lost.is_set():
            raise LeaseLost(f"search {self.record.name}: another process has taken it over; nothing was published")
        found = records.trials(self.store)
        if ended_by == INTERRUPTED:
            return self._outcome("interrupted", ended_by, found, ())
        best = records.front(found, self.spec.objective)
        if not best:
            reasons = {trial.reason for trial in found if trial.status == "failed"}
            self._outcome("finished", "no trial finished", found, ())
            raise TrainingFailed(f"search {self.record.name}: no trial finished\n{next(iter(reasons), '')}".strip())
        versions = [self._retrain(trial) if retrain else self._publish(trial) for trial in best]
        return self._outcome("finished", ended_by, found, tuple(v for v in versions if v))

    def _outcome(self, status: Any, ended_by: str, found: list[TrialRecord], versions: tuple[str, ...]) -> Outcome:
        self.record = records.write(
            self.store, replace(self.record, status=status, ended_by=ended_by, versions=versions)
        )
        return Outcome(self.record, found, records.front(found, self.spec.objective))

    def _tune(self) -> str:
        """Run the trials; what ended them: "trials" (all are over), the budget's field, or INTERRUPTED."""
        from ray import tune

        from raysd.tune.follow import Budget, Progress
        from raysd.tune.trial import Job, SearchTrial

        training = override(self.training, {"scale.cpus": self.room.cpus})
        job = Job(
            root=self.root.url,
            search=self.record.name,
            spec=self.spec,
            training=training,
            shared_plan=self._shared_plan(),
            pictures=len(self.plan.train),
            gpus=self.room.gpus,
            grows_to=os.environ.get(cluster.GROWS_TO, ""),
            prompts=self.prompts,
            real=self.real,
        )
        budget = Budget(self.spec.budget, self.store, self.record.seconds)
        progress = Progress(self.spec, budget, self.watch, self.stopped, self.lost)
        with tempfile.TemporaryDirectory(prefix="raysd-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(SearchTrial, job=job),
                    tune.PlacementGroupFactory([{"CPU": 0, "memory": DRIVER_MEMORY}]),
                ),
                param_space=None if self.spec.searcher.kind == "optuna" else ray_space(self.spec),
                tune_config=self._tune_config(),
                run_config=tune.RunConfig(
                    name=self.record.name,
                    storage_path=scratch,
                    stop=budget,
                    verbose=0,
                    callbacks=[progress],
                    failure_config=tune.FailureConfig(max_failures=ACTOR_FAILURES),
                ),
            )
            tuner.fit()
        return budget.spent or ("trials" if progress.done >= self.spec.trials else INTERRUPTED)

    def _tune_config(self) -> Any:
        from ray import tune

        spec = self.spec
        metrics = list(spec.objective)
        one = {"metric": metrics[0], "mode": "min"} if len(metrics) == 1 else {}
        searcher: Any = None
        samples = spec.trials
        if spec.searcher.kind == "optuna":
            import optuna
            from ray.tune.search.optuna import OptunaSearch

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            tried = [trial.values for trial in records.trials(self.store)]
            both: dict[str, Any] = one or {"metric": metrics, "mode": ["min"] * len(metrics)}
            searcher = OptunaSearch(
                space=optuna_space(spec), seed=spec.searcher.seed, points_to_evaluate=tried or None, **both
            )
        elif spec.searcher.kind == "grid":
            samples = 1
        if searcher is None:
            from ray.tune.search.basic_variant import BasicVariantGenerator

            searcher = BasicVariantGenerator(random_state=spec.searcher.seed, max_concurrent=self.room.trials)
        return tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(spec, self._most_epochs()),
            num_samples=samples,
            max_concurrent_trials=self.room.trials if spec.searcher.kind == "optuna" else None,
            reuse_actors=True,
            **({} if spec.scheduler.kind != "none" else one),
        )

    def _most_epochs(self) -> float:
        """The longest that a trial can take."""
        pictures = len(self.plan.train)
        longest = 0.0
        for changes in _corners(self.spec):
            spec = override(self.training, changes)
            longest = max(longest, total_steps(spec, pictures) * spec.optim.batch_size / pictures)
        return longest

    def _shared_plan(self) -> bool:
        return not any(path == "base" or path == "seed" or path.startswith("data.") for path in self.spec.space)

    def _settle(self, ended_by: str) -> None:
        """Say of each trial that the scheduler or the budget stopped that it is over."""
        for trial in records.trials(self.store):
            if trial.status not in ("running", "interrupted"):
                continue
            if trial.key in self.stopped:
                records.write_trial(self.store, replace(trial, status="stopped", reason="worse than others by then"))
            elif ended_by not in ("trials", INTERRUPTED):
                records.write_trial(self.store, replace(trial, status="stopped", reason=f"{ended_by} is spent"))
            elif trial.status == "running":
                records.write_trial(self.store, replace(trial, status="interrupted"))

    def _publish(self, trial: TrialRecord) -> str | None:
        """The trial's best weights, as `publish.model` of the recipe."""
        run = runs.storage_of(self.root, trial.run)
        record = runs.read(self.root, trial.run)
        spec = override(
            record.training_spec(), {"publish.model": self._model(), "publish.alias": self.training.publish.alias}
        )
        plan = Plan.load(run)
        version: Version | None = publish(record, spec, self.root, run, locate(spec.base, self.root), plan)
        return version.ref if version else None

    def _retrain(self, trial: TrialRecord) -> str | None:
        """Train the trial's settings on all pictures, for as many epochs as were best."""
        best = min(trial.reports, key=lambda report: report.get("validation_loss", -report["epoch"]))
        changes = {**trial.values, "data.validation": 0.0, "optim.epochs": best["epoch"], "validation.every": 0}
        spec = override(override(self.training, changes), {"publish.model": self._model()})
        outcome = train(spec, f"{trial.run}-all", self.root, self.watch)
        return outcome.record.version

    def _model(self) -> str:
        return self.training.publish.model or self.record.name

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Count the seconds and the nodes while the trials run."""
        began, before = time.monotonic(), self.record.seconds
        ended = threading.Event()
        nodes = list(self.record.nodes)

        def look() -> None:
            while not ended.wait(1.0):
                count = _nodes()
                if not nodes or nodes[-1][1] != count:
                    nodes.append((before + time.monotonic() - began, count))

        thread = threading.Thread(target=look, name="nodes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            seconds = before + time.monotonic() - began
            self.record = replace(self.record, seconds=seconds, nodes=tuple(nodes))


def _existing(root: Storage, name: str, spec: SearchSpec, training: TrainingSpec) -> SearchRecord | None:
    try:
        record = records.read(root, name)
    except NotFound:
        return None
    if record.search_spec() != spec or record.training_spec() != training:
        raise RequestError(
            f"search {name} exists with other settings\n"
            f"choose another --name, or go on with it as it is: raysd tune resume {name}"
        )
    return record


def _scheduler(spec: SearchSpec, longest: float) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule

    found = spec.scheduler
    if found.kind == "asha":
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            metric="validation_loss",
            mode="min",
            grace_period=found.grace,
            max_t=max(longest, found.grace) + 1,
            reduction_factor=found.reduction,
            stop_last_trials=False,
        )
    if found.kind == "median":
        return MedianStoppingRule(
            time_attr="epoch", metric="validation_loss", mode="min", grace_period=found.grace, hard_stop=True
        )
    return FIFOScheduler()


def _corners(spec: SearchSpec) -> Iterator[dict[str, Any]]:
    """Extremes of what decides how long a trial is."""
    from itertools import product

    paths = [path for path in ("optim.steps", "optim.epochs", "optim.batch_size") if path in spec.space]
    for values in product(*(spec.space[path].extremes for path in paths)):
        yield dict(zip(paths, values, strict=True))


def _nodes() -> int:
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"])
