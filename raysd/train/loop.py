"""The training loop: a generator of step records. It knows PyTorch and an engine, and nothing of Ray.

What happens between two records (validation, checkpoints, early stopping, reports) is its caller's.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from raysd.config.training import TrainingSpec
from raysd.errors import TrainingFailed
from raysd.methods import Method
from raysd.models import NoiseSchedule
from raysd.seeding import seed_of
from raysd.train.batches import Batches
from raysd.train.ema import Ema
from raysd.train.engine import Engine
from raysd.train.schedule import factor

ADVICE = "lower optim.lr, or use scale.precision bf16 or fp32"


@dataclass(frozen=True)
class Votes:
    """What a rank tells the others at the end of a step."""

    stop: bool = False  # it was asked to stop
    written: bool = False  # its part of a checkpoint is written
    look: bool = False  # it is time to look for notices that nodes go away


@dataclass(frozen=True)
class StepRecord:
    """One finished optimiser step, as all ranks see it."""

    step: int  # steps done, this one included
    loss: float  # mean weighted loss over the global batch
    lr: float
    grad_norm: float  # before clipping
    epoch: float  # passes done
    votes: Votes  # stop and look: any rank's; written: all ranks'. All learn it at the same step
    seconds: tuple[float, ...]  # of each rank: waiting for its batch, and its forward pass

    @property
    def slowest(self) -> tuple[int, float]:
        """The rank that took longest, and how many times as long as the median one.

        At ZeRO stage 3 the forward pass gathers weights, and all ranks wait in it for the slowest.
        """
        rank = max(range(len(self.seconds)), key=self.seconds.__getitem__)
        typical = sorted(self.seconds)[(len(self.seconds) - 1) // 2]
        return rank, self.seconds[rank] / max(typical, 1e-9)


def training_steps(
    engine: Engine,
    method: Method,
    batches: Batches,
    schedule: NoiseSchedule,
    spec: TrainingSpec,
    ema: Ema | None,
    start: int,
    total: int,
    votes: Callable[[], Votes] = Votes,
) -> Iterator[StepRecord]:
    """Steps `start` to `total` (exclusive), one record each. Every rank runs it in lock-step.

    Raises TrainingFailed when the loss is no longer finite.
    """
    engine.module.train()
    for step in range(start, total):
        # Each rank takes its part of the global batch; its draws depend on (seed, step, index), not on the rank.
        own = Stopwatch(engine.device)
        with own:
            micro_batches = batches.of(step)

        # Forward and backward. Sums over the global batch, not means of means: uneven parts count rightly. The engine
        # averages over ranks, hence the factor `world`.
        local = torch.zeros((), device=engine.device)
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(seed_of(spec.seed, "dropout", step, engine.rank, number))
            with own:
                errors = method.loss(engine, batch.to(engine.device), schedule, spec)
            loss = errors.sum() * (engine.world / spec.optim.batch_size)
            engine.backward(loss, last=number == len(micro_batches) - 1)
            local += errors.detach().sum()

        # One optimiser step, the same on every rank, and the moving average after it.
        rate = spec.optim.lr * factor(step, total, spec.optim)
        norm = engine.step(rate)
        if engine.skipped and spec.scale.precision != "fp16":
            raise TrainingFailed(f"step {step + 1}: the gradients are no longer finite; {ADVICE}")
        if ema is not None:
            ema.update(step)

        # All ranks agree on the loss and on what they were asked for: one small all-reduce a step.
        loss_sum, agreed, seconds = _agree(engine, local, votes(), own)
        mean = loss_sum / spec.optim.batch_size
        if not math.isfinite(mean):
            raise TrainingFailed(f"step {step + 1}: the loss is {mean}; {ADVICE}")
        yield StepRecord(step + 1, mean, rate, norm, batches.sampler.epoch_of(step + 1), agreed, seconds)


class Stopwatch:
    """Sums up the seconds of `with` blocks on a device. On a GPU they are known once it has been synchronised."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._total, self._began = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def __exit__(self, *raised: object) -> None:
        self._total += time.perf_counter() - self._began
        if self._on_gpu:
            self._events[-1][1].record()

    @property
    def seconds(self) -> float:
        return max(self._total, sum(first.elapsed_time(last) for first, last in self._events) / 1000)


def _agree(engine: Engine, loss_sum: Tensor, own: Votes, watch: Stopwatch) -> tuple[float, Votes, tuple[float, ...]]:
    """(loss of the global batch, what was voted, own seconds of each rank)."""
    flags = torch.tensor([own.stop, own.written, own.look], dtype=torch.float64)
    if engine.world == 1:
        return float(loss_sum), own, (watch.seconds,)
    loss = loss_sum.double().cpu()  # waits for the device: from here on the watch knows its seconds
    seconds = torch.zeros(engine.world, dtype=torch.float64)
    seconds[engine.rank] = watch.seconds
    told = torch.cat([loss.reshape(1), flags, seconds]).to(engine.device)
    dist.all_reduce(told)
    total, stop, written, look, *all_seconds = told.tolist()
    return total, Votes(stop > 0, written == engine.world, look > 0), tuple(all_seconds)
