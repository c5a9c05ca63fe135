"""A search from spec to version: check everything, fill the caches once, let Ray Tune run the trials, publish the best."""

import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from raysd import cluster
from raysd.config import SearchSpec, TrainingSpec, override
from raysd.config.search import BudgetSpec
from raysd.errors import LeaseLost, NotFound, RequestError, TrainingFailed
from raysd.evaluate.prompts import Prompt
from raysd.lease import Lease
from raysd.references import locate
from raysd.registry import Version
from raysd.storage import Storage
from raysd.train import checkpoint, runs
from raysd.train.follow import Watch
from raysd.train.frozen import FrozenData, base_of, total_steps
from raysd.train.launch import fill_caches, train
from raysd.train.publish import publish
from raysd.train.request import frozen_for
from raysd.tune import records
from raysd.tune.nodes import Timeline
from raysd.tune.records import LEASE, SearchRecord, TrialRecord
from raysd.tune.room import Room, room_for, scales
from raysd.tune.scoring import judges, prompts_of, reference, wanted
from raysd.tune.space import check_choices, check_space, corners, grid_points, optuna_space, ray_space

DRIVER_MEMORY = 400 * 2**20
"""Of a trial's own process, bytes, where it has workers: it asks for no CPU, so that they can have them all."""
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
    if existing is not None and existing.search_spec() == spec and existing.published and not retrain:
        found = records.trials(store)
        return Outcome(existing, found, records.front(found, spec.objective))
    check_space(spec, training)
    if spec.searcher.kind == "optuna":
        check_choices(spec)
    _locate_bases(spec, root)
    known = FrozenData.load(store.child(records.PLAN)) if existing else None
    located = locate(base_of(training, known), root)
    frozen = known or frozen_for(training, root, located, watch)
    if not frozen.validation and (spec.scheduler.kind != "none" or "validation_loss" in spec.objective):
        raise RequestError("data.validation: no picture is held out, and no trial could report validation_loss")
    prompts = prompts_of(spec, frozen)
    if wanted(spec):
        judges(spec)  # trials would look for them when they are trained
    root.require_swap()
    watch({"kind": "phase", "text": "starting Ray"})
    cluster.join(max(scale.most_workers for scale in scales(spec, training)))
    room = room_for(spec, training)
    if spec.budget.gpu_hours is not None and not room.gpus:
        raise RequestError("budget.gpu_hours: trials have no GPU on this cluster; use budget.hours or budget.money")
    lease = Lease.acquire(store, LEASE)
    lost = threading.Event()
    lease.start(lambda reason: lost.set())
    try:
        if not existing:
            frozen.save(store.child(records.PLAN))
        body = existing or SearchRecord(name, {}, training.model_dump(mode="json"))
        body = replace(body, spec=spec.model_dump(mode="json"))
        pinned = training.model_copy(update={"base": located.ref})
        return Driver(spec, pinned, body, root, store, frozen, prompts, room, watch, lost).run(retrain)
    finally:
        lease.release()


class Driver:
    """A search while this process holds its lease."""

    def __init__(
        self,
        spec: SearchSpec,
        training: TrainingSpec,
        record: SearchRecord,
        root: Storage,
        store: Storage,
        frozen: FrozenData,
        prompts: tuple[Prompt, ...],
        room: Room,
        watch: Watch,
        lost: threading.Event,
    ):
        self.spec, self.training, self.record, self.root, self.store = spec, training, record, root, store
        self.frozen, self.prompts, self.room, self.watch, self.lost = frozen, prompts, room, watch, lost

    def run(self, retrain: bool) -> Outcome:
        fill_caches(self.frozen, self.root, self.training, self.watch)
        self.real = reference(self.spec, self.frozen, self.training.data.resolution)
        self.record = records.write(self.store, replace(self.record, status="running", ended_by=None))
        with Timeline(self.record.nodes, self.record.seconds) as self.timeline:
            outcome = self._search(retrain)
            return self._see_nodes_leave(outcome) if outcome.finished and self.timeline.grown else outcome

    def _search(self, retrain: bool) -> Outcome:
        ended_by = self._tune_and_count()
        self._settle(ended_by)
        if self.lost.is_set():
            raise LeaseLost(f"search {self.record.name}: another process has taken it over; nothing was published")
        found = records.trials(self.store)
        if ended_by == INTERRUPTED:
            return self._outcome("interrupted", ended_by, found, ())
        best = self._best(found)
        if not best:
            reasons = {trial.reason for trial in found if trial.status == "failed"}
            self._outcome("finished", "no trial finished", found, ())
            raise TrainingFailed(f"search {self.record.name}: no trial finished\n{next(iter(reasons), '')}".strip())
        versions = [
            self._publish(trial, self._retrain(trial) if retrain else trial.run, alias=trial is best[0])
            for trial in best
        ]
        return self._outcome("finished", ended_by, found, tuple(v for v in versions if v))

    def _best(self, found: list[TrialRecord]) -> list[TrialRecord]:
        """The front, of the trials that left weights: one that was cut short may have ended before its checkpoint."""
        kept = [trial for trial in found if checkpoint.latest(runs.storage_of(self.root, trial.run)) is not None]
        return records.front(kept, self.spec.objective)

    def _see_nodes_leave(self, outcome: Outcome) -> Outcome:
        """All is done and written; what is left is to see that the nodes that came are not kept."""
        self.watch({"kind": "phase", "text": "waiting for nodes to leave"})
        self.timeline.wait(self.lost)
        if self.lost.is_set():
            return outcome
        self.record = records.write(self.store, replace(self.record, nodes=tuple(self.timeline.rows)))
        return replace(outcome, record=self.record)

    def _outcome(self, status: Any, ended_by: str, found: list[TrialRecord], versions: tuple[str, ...]) -> Outcome:
        nodes = tuple(self.timeline.rows)
        self.record = records.write(
            self.store, replace(self.record, status=status, ended_by=ended_by, versions=versions, nodes=nodes)
        )
        return Outcome(self.record, found, self._best(found))

    def _tune_and_count(self) -> str:
        """As `_tune`, with the seconds that it took added to the record's."""
        self.began, self.before = time.monotonic(), self.record.seconds
        self._settle(INTERRUPTED)  # trials of a driver that was killed run no more, and cost no more
        try:
            return self._tune()
        finally:
            self.record = self._counted()

    def _counted(self) -> SearchRecord:
        return replace(self.record, seconds=self.before + time.monotonic() - self.began)

    def _note(self) -> None:
        """Now and then, so that the hours of a driver that is killed count."""
        records.write(self.store, replace(self._counted(), nodes=tuple(self.timeline.rows)))

    def _tune(self) -> str:
        """Run the trials; what ended them: "trials" (all are over), the budget's field, or INTERRUPTED."""
        from ray import tune

        from raysd.tune.follow import Budget, Progress, signals_given_back
        from raysd.tune.trial import Job, SearchTrial

        training = override(self.training, {"scale.cpus": self.room.cpus})
        here = self._one_worker()
        job = Job(
            root=self.root.url,
            search=self.record.name,
            spec=self.spec,
            training=training,
            shared_data=self._shared_data(),
            here=here,
            pictures=len(self.frozen.train),
            gpus=self.room.gpus,
            grows_to=os.environ.get(cluster.GROWS_TO, ""),
            prompts=self.prompts,
            real=self.real,
        )
        budget = Budget(self.spec.budget, self.store, self.record.seconds)
        progress = Progress(self.spec, budget, self.watch, self.store, self.lost, self._note)
        with tempfile.TemporaryDirectory(prefix="raysd-tune-") as scratch, signals_given_back():
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(SearchTrial, job=job),
                    tune.PlacementGroupFactory([self._bundle(here)]),
                ),
                param_space=ray_space(self.spec) if self.spec.searcher.kind == "random" else None,
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

    def _one_worker(self) -> bool:
        """Whether trials can be their own workers: one each, with the same resources, and with nothing to encode.

        Encoding asks the cluster for more than the trial has, and would wait for trials that wait for it.
        """
        alone = all(scale.most_workers == 1 for scale in scales(self.spec, self.training))
        same = not self.spec.space.keys() & {"scale.cpus", "scale.gpus", "scale.accelerator"}
        return alone and same and self._shared_data()

    def _bundle(self, here: bool) -> dict[str, float]:
        """What a trial's own process gets: a worker's share where it is the worker."""
        if not here:
            return {"CPU": 0, "memory": DRIVER_MEMORY}
        kind = self.training.scale.accelerator
        named = {f"accelerator_type:{kind}": 0.001} if kind else {}
        return {"CPU": self.room.cpus, "GPU": self.room.gpus, **named}

    def _tune_config(self) -> Any:
        from ray import tune

        spec = self.spec
        metrics = list(spec.objective)
        one = {"metric": metrics[0], "mode": "min"} if len(metrics) == 1 else {}
        searcher: Any
        if spec.searcher.kind == "optuna":
            import optuna
            from ray.tune.search.optuna import OptunaSearch

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            tried = [trial.values for trial in records.trials(self.store)]
            both: dict[str, Any] = one or {"metric": metrics, "mode": ["min"] * len(metrics)}
            # What is given is not drawn: with the same seed a search that goes on would draw its first settings again.
            seed = spec.searcher.seed + len(tried)
            searcher = OptunaSearch(space=optuna_space(spec), seed=seed, points_to_evaluate=tried or None, **both)
        elif spec.searcher.kind == "grid":
            from raysd.tune.grid import Grid

            searcher = Grid(grid_points(spec))
        else:
            from ray.tune.search.basic_variant import BasicVariantGenerator

            searcher = BasicVariantGenerator(random_state=spec.searcher.seed, max_concurrent=self.room.trials)
        return tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(spec, self._most_epochs()),
            num_samples=spec.trials,
            max_concurrent_trials=None if spec.searcher.kind == "random" else self.room.trials,
            reuse_actors=True,
            **({} if spec.scheduler.kind != "none" else one),
        )

    def _most_epochs(self) -> float:
        """The longest that a trial can take."""
        pictures = len(self.frozen.train)
        longest = 0.0
        for changes in corners(self.spec, ("optim.steps", "optim.epochs", "optim.batch_size")):
            spec = override(self.training, changes)
            longest = max(longest, total_steps(spec, pictures) * spec.optim.batch_size / pictures)
        return longest

    def _shared_data(self) -> bool:
        return not any(path == "base" or path == "seed" or path.startswith("data.") for path in self.spec.space)

    def _settle(self, ended_by: str) -> None:
        """Say of each trial that the budget cut short, or that nobody runs any more, what it is."""
        for trial in records.trials(self.store):
            if trial.status not in ("running", "interrupted"):
                continue
            if ended_by not in ("trials", INTERRUPTED):
                records.write_trial(self.store, replace(trial, status="cut", reason=f"{ended_by} is spent"))
            elif trial.status == "running":
                records.write_trial(self.store, replace(trial, status="interrupted"))

    def _publish(self, trial: TrialRecord, name: str, alias: bool) -> str | None:
        """The best weights of that run, the trial's own or its settings' on all pictures, as `publish.model` of the recipe.

        With `alias` the recipe's alias points there.
        """
        run = runs.storage_of(self.root, name)
        record = runs.read(self.root, name)
        named = self.training.publish.alias if alias else None
        spec = override(record.training_spec(), {"publish.model": self._model(), "publish.alias": named})
        scores = {metric: trial.best(metric) for metric in self.spec.objective}
        origin = {"search": {"name": self.record.name, "trial": trial.key, "values": trial.values, "scores": scores}}
        frozen = FrozenData.load(run)
        located = locate(base_of(spec, frozen), self.root)
        version: Version | None = publish(record, spec, self.root, run, located, frozen, origin)
        return version.ref if version else None

    def _retrain(self, trial: TrialRecord) -> str:
        """Train the trial's settings on all pictures, for as many epochs as were best. Returns the run's name."""
        best = min(trial.reports, key=lambda report: report.get("validation_loss", -report["epoch"]))
        changes = {**trial.values, "data.validation": 0.0, "validation.every": 0}
        if best["epoch"] > 0:  # else it never validated, and its own length is the best that is known
            changes.pop("optim.steps", None)
            changes["optim.epochs"] = best["epoch"]
        spec = override(self.training, {**changes, "publish.model": None, "publish.alias": None})
        name = records.run_on_all(self.record.name, trial, best["epoch"])
        if not train(spec, name, self.root, self.watch).finished:
            raise TrainingFailed(f"run {name} was interrupted; the same command with --retrain goes on")
        return name

    def _model(self) -> str:
        return self.training.publish.model or self.record.name


def _locate_bases(spec: SearchSpec, root: Storage) -> None:
    """Of a space over bases each one is looked for before anything starts. Raises RequestError that names it."""
    for base in spec.space["base"].extremes if "base" in spec.space else ():
        try:
            locate(base, root)
        except RequestError as error:
            raise RequestError(f"space.base: {error}") from None


def _existing(root: Storage, name: str, spec: SearchSpec, training: TrainingSpec) -> SearchRecord | None:
    try:
        record = records.read(root, name)
    except NotFound:
        return None
    if _searched(record.search_spec()) != _searched(spec) or record.training_spec() != training:
        raise RequestError(
            f"search {name} exists with other settings\n"
            f"choose another --name, or go on with it as it is: raysd tune resume {name}"
        )
    return record


def _searched(spec: SearchSpec) -> SearchSpec:
    """What makes it another search: not how much it may cost, nor how many trials run at once."""
    return spec.model_copy(update={"budget": BudgetSpec(), "concurrent": None})


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
