"""What each Ray Train worker runs: build, resume, step, validate, checkpoint."""

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from raysd.config import TrainingSpec
from raysd.data.cache import TensorCache
from raysd.data.sampler import Sampler
from raysd.errors import OutOfMemory, RaysdError, TrainingFailed
from raysd.lease import check_fence
from raysd.methods import METHODS
from raysd.quiet import import_quickly
from raysd.references import locate
from raysd.storage import Storage
from raysd.train import checkpoint, validate
from raysd.train.batches import Batches, Source
from raysd.train.build import build_engine
from raysd.train.checkpoint import Checkpoint, Progress
from raysd.train.ema import Ema
from raysd.train.engine import Engine, leave
from raysd.train.frozen import FrozenData, captions
from raysd.train.hang import HangWatch
from raysd.train.link import Reporter
from raysd.train.loop import ADVICE, StepRecord, Votes, training_steps
from raysd.train.memory import is_out_of_memory, memory_advice
from raysd.train.profile import Profiler
from raysd.train.runs import LEASE
from raysd.train.usage import Usage

LOOK = 5.0
"""Seconds between two looks for notices that nodes are taken away."""


@dataclass(frozen=True)
class Job:
    """All that a worker is told; pictures and weights it fetches itself."""

    root: str
    run: str
    token: int
    nonce: str
    total: int
    spec: TrainingSpec
    link: Any
    notices: bool  # whether nodes may be taken away with notice
    here: bool = False  # whether this process is the driver too, and trains other runs after this one


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a rank. A problem that starting again cannot mend is told to the driver, and ends the next attempt."""
    import_quickly()
    job: Job = config["job"]
    if ray.get(job.link.failure.remote()) is not None:
        return
    try:
        Worker(job).run()
    except RaysdError as problem:
        ray.get(job.link.fail.remote(problem))
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = OutOfMemory(memory_advice(job.spec, error))
        ray.get(job.link.fail.remote(shortage))
        raise shortage from error
    finally:
        if job.here:
            leave()


class Worker:
    """One rank of one attempt."""

    def __init__(self, job: Job):
        self.job, self.spec = job, job.spec
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.storage = Storage(job.root)
        self.store = self.storage.child(f"runs/{job.run}")
        self.frozen = FrozenData.load(self.store)
        located = locate(self.spec.base, self.storage)
        self.family, self.folder = located.family, located.folder
        self.method = METHODS[self.spec.method.kind]
        self.schedule = self.family.noise_schedule(self.folder)
        self.reporter = Reporter(job.link) if self.rank == 0 else None
        self.hang = HangWatch(60 * self.spec.scale.hang_minutes, self._hung)
        self.leaving: set[str] = set()  # nodes whose notice was answered with a checkpoint
        self.next_look = 0.0

    def run(self) -> None:
        try:
            self._run()
        finally:
            self.hang.close()
            if self.reporter is not None:
                self.reporter.close()

    def _run(self) -> None:
        # Weights go into the module before the engine takes it over; optimiser state and average after.
        resumed, attempt = self._agreed()
        self.engine, self.ema = self._build(resumed)
        progress = resumed.progress if resumed else Progress()
        self.source = self._source()
        self.batches = self._batches()
        self.saver = self._saver(attempt)
        if resumed is None:
            progress = replace(progress, base_loss=self._validate(0))
            self._draw(0)
        self._report("start", step=progress.step, base_loss=progress.base_loss, world=self.world)
        patience = self.spec.validation.patience
        if progress.exhausts(patience):
            return
        began = progress.step
        profiler = Profiler(self.store) if self.spec.track.profile and self.rank == 0 else None
        for record in self._steps(progress.step):
            self._report("step", **_row(record), workers=self.world)
            if profiler is not None:
                profiler.step()
            progress = self._between(record, replace(progress, step=record.step))
            if self.saver.pending is not None and record.votes.written:
                self._finish_save()
            ends = record.votes.stop or progress.exhausts(patience) or record.step == self.job.total
            leaves = record.votes.look and self._notice()
            due = (
                self._due(self.spec.checkpoint.interval(self.job.total), record.step)
                or progress.best_step == record.step
            )
            if ends or leaves or due:
                self._save(progress)
            if ends or leaves:
                self._finish_save()
            if ends:
                break
        self._report("usage", **self.usage.body(self.world, progress.step - began))

    def _build(self, resumed: Checkpoint | None) -> tuple[Engine, Ema | None]:
        module = self.method.build(self.family, self.folder, self.spec)
        if resumed is not None:
            load_weights(module, self.store, resumed)
        module = module.to(self.device)
        self.usage = Usage(module, self.device)
        if self.spec.scale.channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.spec.scale.compile:
            torch.compiler.reset()  # it counts over all models of a process, and then stops compiling
            module.denoiser.compile()
        engine = build_engine(module, self.spec, device=self.device, rank=self.rank, world=self.world)
        ema = Ema(engine, self.spec.optim.ema) if self.spec.optim.ema else None
        if resumed is not None:
            checkpoint.load_state(self.store, resumed, engine, ema)
        return engine, ema

    def _agreed(self) -> tuple[Checkpoint | None, str]:
        """The checkpoint to resume from and the attempt's name. Rank 0 chooses; the others follow, so that all have the same."""
        chosen: list[Any] = [None, None]
        if self.reporter is not None:
            chosen = [checkpoint.latest(self.store), self.reporter.attempt]
        if self.world > 1:
            dist.broadcast_object_list(chosen)
        return chosen[0], chosen[1]

    def _source(self) -> Source:
        latents = TensorCache(self.storage.child(self.frozen.latents)).refresh()
        scale = self.family.latent_scale(self.folder)
        if not self.method.trains_text(self.spec):
            return Source(latents, TensorCache(self.storage.child(self.frozen.text)).refresh(), scale)
        tokenizer = self.family.tokenizer(self.folder)
        wanted = captions(self.frozen)
        tokens = self.family.tokens(tokenizer, list(wanted.values()))
        return Source(latents, dict(zip(wanted, tokens, strict=True)), scale)

    def _batches(self) -> Batches:
        variants = self.spec.data.augment.variants
        size = self.spec.optim.batch_size
        sampler = Sampler(len(self.frozen.train), size, self.spec.seed, variants, self.frozen.weights)
        return Batches(
            self.frozen.train, self.frozen.empty, self.source, sampler, self.schedule, self.spec, self.rank, self.world
        )

    def _steps(self, start: int) -> Iterator[StepRecord]:
        steps = training_steps(
            self.engine,
            self.method,
            self.batches,
            self.schedule,
            self.spec,
            self.ema,
            start,
            self.job.total,
            self._votes,
        )
        for record in steps:
            self.hang.beat()
            yield record

    def _votes(self) -> Votes:
        """Rank 0 is asked to stop, and says when it is time to look for notices."""
        asked = self.reporter is not None and self.reporter.stop_requested
        look = self.rank == 0 and self.job.notices and time.monotonic() >= self.next_look
        if look:
            self.next_look = time.monotonic() + LOOK
        return Votes(asked, self.saver.written, look)

    def _between(self, record: StepRecord, progress: Progress) -> Progress:
        """Validation and pictures, where they are due."""
        last = record.step == self.job.total
        if not (last or self._due(self.spec.validation.every, record.step)):
            return progress
        loss = self._validate(record.step)
        self._draw(record.step)
        return progress if loss is None else progress.judged(loss)

    def _validate(self, step: int) -> float | None:
        def measure() -> float | None:
            return validate.validation_loss(
                self.engine,
                self.method,
                self.frozen.validation,
                self.source,
                self.schedule,
                self.spec,
                self.hang.beat,
            )

        loss = self._with_average(measure)
        if loss is not None and not math.isfinite(loss):  # the same on every rank
            raise TrainingFailed(f"step {step}: the validation loss is {loss}; {ADVICE}")
        if loss is not None:
            self._report("validation", step=step, validation_loss=loss)
        return loss

    def _draw(self, step: int) -> None:
        if not self.spec.validation.prompts:
            return
        images = self._with_average(lambda: validate.pictures(self.engine, self.folder, self.spec, self.hang.beat))
        for number, image in enumerate(images if self.rank == 0 else []):
            body = io.BytesIO()
            image.save(body, "PNG")
            self.store.write(f"samples/{step:08d}-{number:02d}.png", body.getvalue())

    def _with_average(self, work: Callable[[], Any]) -> Any:
        """Do `work` with the moving average in the module's place, where the run keeps one."""
        if self.ema is None:
            return work()
        with self.ema.swapped():
            return work()

    def _saver(self, attempt: str) -> checkpoint.Saver:
        def fence() -> None:
            assert self.reporter is not None, "rank 0 has one"
            self.reporter.confirm()
            check_fence(self.store, LEASE, self.job.token, self.job.nonce)

        writer = f"{self.job.token:04d}-{attempt[:8]}"
        return checkpoint.Saver(self.store, self.engine, self.ema, writer, fence)

    def _save(self, progress: Progress) -> None:
        """Begin a checkpoint; training goes on while it is written. One that is begun already is finished first."""
        if self.saver.pending is not None:
            self._finish_save()
        self.saver.begin(progress)

    def _finish_save(self) -> None:
        progress = self.saver.finish().progress
        self.hang.beat()
        if self.rank == 0:
            best = progress.best_step if self.spec.validation.keeps_best else None
            checkpoint.prune(self.store, self.spec.checkpoint.keep, best)
        self._report("checkpoint", step=progress.step, best=progress.best, best_step=progress.best_step)

    def _notice(self) -> bool:
        """Whether a node of this run is about to be taken away and was not before. COLLECTIVE."""
        new = self._preempted() - self.leaving
        if new:
            self.leaving |= new
            self._report("notice", text=f"{len(new)} node(s) are about to be taken away: a checkpoint is written")
        return bool(new)

    def _preempted(self) -> set[str]:
        """Ids of nodes that are about to be taken away; all ranks are told the same."""
        if self.job.here:  # Ray Train looks for them in its controller, which local mode does without
            from ray._private.state import state

            return {ray.get_runtime_context().get_node_id()} & state.get_draining_nodes().keys()
        info = ray.train.get_preemption_info()
        return set(info.preempted_node_ids) if info is not None else set()

    def _hung(self, stacks: str) -> None:
        text = f"rank {self.rank} made no step for {self.spec.scale.hang_minutes:g} minutes"
        name = f"stacks/{int(time.time())}-rank-{self.rank:04d}.txt"
        if self.reporter is not None:
            self._report("notice", text=f"{text}: its stacks are in {self.store.url}/{name}; it is started again")
        self.store.write(name, f"{text} on {os.uname().nodename}\n\n{stacks}".encode())

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _report(self, kind: str, **values: Any) -> None:
        if self.reporter is not None:
            self.reporter.record(kind=kind, **values)


def _row(record: StepRecord) -> dict[str, Any]:
    """A step as metrics.jsonl has it; of more than one rank, which was the slowest and how many times the median."""
    row = {name: getattr(record, name) for name in ("step", "loss", "lr", "grad_norm", "epoch")}
    if len(record.seconds) == 1:
        return row
    rank, lag = record.slowest
    return {**row, "slowest_rank": rank, "slowest_lag": round(lag, 3)}


def load_weights(module: nn.Module, run: Storage, resumed: Checkpoint) -> None:
    """Put a checkpoint's weights into a module that no engine holds yet."""
    parameters = dict(module.named_parameters())
    with checkpoint.tensors(run, resumed) as readers, torch.no_grad():
        for name, read in readers.items():
            if name.startswith("weight/"):
                parameters[name.removeprefix("weight/")].copy_(read())
