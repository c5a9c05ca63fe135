"""A run from spec to version: prepare the data, fill the caches, train through Ray Train, publish."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from raysd import cluster
from raysd.cluster import PREEMPTION_WATCHER
from raysd.config import TrainingSpec
from raysd.errors import LeaseHeld, LeaseLost, OutOfMemory, RaysdError, RequestError, TrainingFailed
from raysd.lease import Lease
from raysd.methods import METHODS
from raysd.plan.fit import check_fit
from raysd.references import Located, identity, locate
from raysd.storage import Storage
from raysd.train import checkpoint, runs
from raysd.train.checkpoint import Progress
from raysd.train.encode import fill_latents, fill_text, is_filled, keeping_caches
from raysd.train.follow import Follower, Watch, tell
from raysd.train.frozen import FrozenData, base_of, total_steps
from raysd.train.link import open_link
from raysd.train.memory import killed_for_memory, memory_remedy
from raysd.train.publish import publish
from raysd.train.request import check_devices, existing_run, frozen_for
from raysd.train.runs import LEASE, RunRecord
from raysd.train.track import Trackers
from raysd.train.worker import Job, train_worker


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished`, or interrupted with a checkpoint to go on from."""

    record: RunRecord
    finished: bool


def never() -> bool:
    return False


def train(
    spec: TrainingSpec,
    name: str,
    root: Storage,
    watch: Watch,
    frozen: FrozenData | None = None,
    asked: Callable[[], bool] = never,
    here: bool = False,
) -> Outcome:
    """Train `spec` as run `name`, going on from its last checkpoint if it was interrupted; a finished run is published.

    `frozen` is that of another run on the same data, which need not be checked again. From the moment that `asked` is
    true the run writes a checkpoint and ends. With `here` this process is the one worker (Ray Train's local mode), is not
    started again by the run, and ends where a worker would: for a caller that has a worker's resources, trains many
    runs whose caches are filled, and is an actor itself.

    Raises RequestError for a wrong request before anything is written, LeaseHeld if the run is held elsewhere,
    LeaseLost, OutOfMemory or TrainingFailed if it ends early.
    """
    run = runs.storage_of(root, name)
    existing = existing_run(root, name, spec)
    known = FrozenData.load(run) if existing else frozen
    if existing is None or existing.training_spec().scale != spec.scale:
        check_devices(spec)
    located = locate(base_of(spec, known), root)
    new_data = None if existing else frozen or frozen_for(spec, root, located, watch)
    root.require_swap()
    launch = Launch(spec, name, root, run, located, watch, asked, here)
    with launch.lease():
        held = existing_run(root, name, spec)
        if (held and held.id) != (existing and existing.id):
            raise LeaseHeld(f"run {name}: another process had it meanwhile; give the command again")
        record = held or RunRecord(name, {})
        if record.status != "finished":
            record = replace(record, spec=spec.model_dump(mode="json"))
        return launch.run_all(record, new_data)


class Launch:
    """A run while this process holds its lease."""

    def __init__(
        self,
        spec: TrainingSpec,
        name: str,
        root: Storage,
        run: Storage,
        located: Located,
        watch: Watch,
        asked: Callable[[], bool],
        here: bool = False,
    ):
        self.spec, self.name, self.root, self.run, self.located, self.watch = spec, name, root, run, located, watch
        self.asked, self.here = asked, here
        # Workers run in folders of their own, and an alias may move: they are told what the base is, not how it was named.
        self.pinned = spec.model_copy(update={"base": located.ref})
        self.lost: str | None = None
        self.link: Any = None

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the run. When the lease is lost the workers are ended, and what they write is refused by its token."""
        self.held = Lease.acquire(self.run, LEASE)
        self.held.start(self._on_lost)
        try:
            yield
        finally:
            self.held.release()

    def run_all(self, record: RunRecord, new_data: FrozenData | None) -> Outcome:
        if new_data is not None:
            new_data.save(self.run)
        frozen = new_data or self._frozen()
        total = total_steps(self.spec, len(frozen.train))
        self.run.delete(runs.STOP)
        record = runs.write(self.run, replace(record, status="running", total=total, error=None))
        try:
            if not self._done(total):
                self._train(record, frozen, total)
            return self._end(record, frozen, total)
        except LeaseLost:
            raise
        except BaseException as problem:
            status: runs.Status = "failed" if isinstance(problem, Exception) else "interrupted"
            runs.write(self.run, replace(record, status=status, error=str(problem) or type(problem).__name__))
            raise

    def _frozen(self) -> FrozenData:
        frozen = FrozenData.load(self.run)
        if identity(self.located.folder) != frozen.base_digest:
            raise RequestError(
                f"base {self.located.ref} is not the model this run began with; put it back or start a new run"
            )
        return frozen

    def _train(self, record: RunRecord, frozen: FrozenData, total: int) -> None:
        self.watch({"kind": "phase", "text": "starting Ray"})
        # The libraries that encode take as long to import as Ray's processes to start. They are waited for: a second
        # thread that imports diffusers meanwhile may get the module from before it has its names.
        importing = threading.Thread(target=self._import_to_encode, args=(frozen,), daemon=True)
        importing.start()
        cluster.join(self.spec.scale.most_workers)
        importing.join()
        tell(self.watch, check_fit(self.spec, self.located.folder))
        with keeping_caches(frozen, self.root):
            self._fill_and_fit(frozen, total)

    def _import_to_encode(self, frozen: FrozenData) -> None:
        if not is_filled(frozen, self.root):
            self.located.family.import_libraries()

    def _fill_and_fit(self, frozen: FrozenData, total: int) -> None:
        fill_caches(frozen, self.root, self.pinned, self.watch)
        self.held.check()  # until now there was nobody to end
        self.watch({"kind": "phase", "text": "starting workers", "total": total, "batch": self.spec.optim.batch_size})
        self.link = open_link()
        trackers = Trackers(self.run, self.name, self.spec, lambda text: tell(self.watch, text))
        follower = Follower(self.run, self.link, trackers, self.watch, self._stop, self._holds)
        try:
            with _on_signals(self._interrupt):
                problem = self._fit(self._job(total))
        finally:
            follower.close()
        self._raise_failure(problem)

    def _job(self, total: int) -> Job:
        notices = os.environ.get(PREEMPTION_WATCHER) != "0"
        return Job(
            self.root.url,
            self.name,
            self.held.token,
            self.held.nonce,
            total,
            self.pinned,
            self.link,
            notices,
            self.here,
        )

    def _fit(self, job: Job) -> BaseException | None:
        """Run the Ray Train controller in a thread, so that this one hears signals. Returns what it raised."""
        trainer = _trainer(job, self.run, f"{self.name}-{job.token}", self.here)
        raised: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if self.lost is not None:
                self._abandon()
            elif self.asked():
                self._stop()
        return raised[0] if raised else None

    def _raise_failure(self, problem: BaseException | None) -> None:
        import ray

        if self.lost is not None:
            raise self._loss()
        failure: RaysdError | None = ray.get(self.link.failure.remote())
        if failure is not None:
            raise failure
        if problem is not None and (killed := killed_for_memory(problem)):
            raise OutOfMemory(f"run {self.name}: {killed}\n{memory_remedy(self.spec)}")
        if problem is not None:
            raise TrainingFailed(
                f"run {self.name}: {_last_line(problem)}\n"
                f"the workers' logs: {_log_folder()}\ngo on from the last checkpoint: raysd runs resume {self.name}"
            )

    def _end(self, record: RunRecord, frozen: FrozenData, total: int) -> Outcome:
        newest = checkpoint.latest(self.run)
        progress = newest.progress if newest else Progress()
        record = replace(
            record,
            step=progress.step,
            checkpoint=newest.step if newest else None,
            best_step=progress.best_step,
            base_loss=progress.base_loss,
            loss=progress.best if self.spec.validation.keeps_best else progress.last,
        )
        if newest is None or not self._done(total):
            return Outcome(runs.write(self.run, replace(record, status="interrupted")), finished=False)
        self.watch({"kind": "phase", "text": "publishing"})
        self.held.renew()
        version = publish(record, self.spec, self.root, self.run, self.located, frozen)
        ref = version.ref if version else None
        return Outcome(runs.write(self.run, replace(record, status="finished", version=ref)), finished=True)

    def _done(self, total: int) -> bool:
        newest = checkpoint.latest(self.run)
        if newest is None:
            return False
        return newest.step >= total or newest.progress.exhausts(self.spec.validation.patience)

    def _interrupt(self, again: bool) -> None:
        if again:
            raise KeyboardInterrupt
        self.watch({"kind": "notice", "text": "stopping: a checkpoint is written first (again to stop at once)"})
        self._stop()

    def _on_lost(self, reason: str) -> None:
        self.lost = reason
        self._abandon()

    def _loss(self) -> LeaseLost:
        return LeaseLost(f"run {self.name}: {self.lost}\ngo on from the last checkpoint: raysd runs resume {self.name}")

    def _abandon(self) -> None:
        """Another may train this run in some seconds: there is no time for a step's end or a checkpoint."""
        if self.link is not None:
            self.link.abandon.remote(self._loss())

    def _stop(self) -> None:
        if self.link is not None:
            self.link.stop.remote()

    def _holds(self) -> bool:
        try:
            self.held.check()
        except LeaseLost:
            return False
        return True


def fill_caches(frozen: FrozenData, root: Storage, spec: TrainingSpec, watch: Watch) -> None:
    """Compute the latents and text embeddings that the caches lack. Needs a cluster joined, and a base that it can find."""

    def count(what: str, done: int, of: int) -> None:
        watch({"kind": "count", "text": what, "done": done, "of": of})

    fill_latents(frozen, root, spec, count)
    if not METHODS[spec.method.kind].trains_text(spec):
        fill_text(frozen, root, spec, count)


def _trainer(job: Job, run: Storage, name: str, here: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scale = job.spec.scale
    each = cluster.allot(scale)
    filesystem, path = run.for_arrow("ray")
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if each.gpus else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=0 if here else scale.workers,
            use_gpu=each.gpus > 0,
            accelerator_type=scale.accelerator,
            placement_strategy=scale.placement.upper(),
            resources_per_worker={"CPU": each.cpus, **({"GPU": 1} if each.gpus else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scale.restarts),
        ),
    )


@contextmanager
def _on_signals(handle: Callable[[bool], None]) -> Iterator[None]:
    """Call `handle(again)` on SIGINT and SIGTERM. Outside the main thread signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def caught(number: int, frame: Any) -> None:
        seen.append(number)
        handle(len(seen) > 1)

    before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[-1] if lines else type(problem).__name__)[:300]


def _log_folder() -> str:
    from ray._private.worker import global_worker

    return str(global_worker.node.get_logs_dir_path()) if global_worker.node else "ray's session folder"
