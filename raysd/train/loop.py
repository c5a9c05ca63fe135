"""The training loop: a generator of step records. It knows PyTorch and an engine, and nothing of Ray.

What happens between two records (validation, checkpoints, early stopping, reports) is its caller's.
"""

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
class StepRecord:
    """One finished optimiser step, as all ranks see it."""

    step: int  # steps done, this one included
    loss: float  # mean weighted loss over the global batch
    lr: float
    grad_norm: float  # before clipping
    epoch: float  # passes done
    stop: bool  # a rank was asked to stop; all ranks learn it at the same step


def training_steps(
    engine: Engine,
    method: Method,
    batches: Batches,
    schedule: NoiseSchedule,
    spec: TrainingSpec,
    ema: Ema | None,
    start: int,
    total: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepRecord]:
    """Steps `start` to `total` (exclusive), one record each. Every rank runs it in lock-step.

    Raises TrainingFailed when the loss is no longer finite.
    """
    engine.module.train()
    for step in range(start, total):
        # Each rank takes its part of the global batch; its draws depend on (seed, step, index), not on the rank.
        micro_batches = batches.of(step)

        # Forward and backward. Sums over the global batch, not means of means: uneven parts count rightly. The engine
        # averages over ranks, hence the factor `world`.
        local = torch.zeros((), device=engine.device)
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(seed_of(spec.seed, "dropout", step, engine.rank, number))
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

        # All ranks agree on the loss and on stopping: one small all-reduce a step.
        loss_sum, asked = _agree(engine, local, stop())
        mean = loss_sum / spec.optim.batch_size
        if not torch.isfinite(torch.tensor(mean)):
            raise TrainingFailed(
                f"step {step + 1}: the loss is {mean}; lower optim.lr, or use scale.precision bf16 or fp32"
            )
        yield StepRecord(step + 1, mean, rate, norm, batches.sampler.epoch_of(step + 1), asked)


def _agree(engine: Engine, loss_sum: Tensor, stop: bool) -> tuple[float, bool]:
    both = torch.stack([loss_sum.double(), torch.tensor(float(stop), dtype=torch.float64, device=loss_sum.device)])
    if engine.world > 1:
        dist.all_reduce(both)
    total, asked = both.tolist()
    return total, asked > 0
