"""A step of training while a checkpoint is being written, beside a step while none is.

Full fine-tuning of the bundled base's shape at 64 px, fp32, batch 16, all cores: weights and both moments of AdamW, into a
local folder. A checkpoint is gathered within the step that begins it, and written beside those after it; all of them, and the
one that makes it visible, count as steps while it is written.
"""

import time
from statistics import mean, median

import torch

from benchmarks import bases, caches
from benchmarks.loops import Task, raysd_training, spec_of
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target
from raysd.storage import Storage
from raysd.train.checkpoint import Progress, Saver

BATCH, WARMUP, EVERY = 16, 5, 25
BOUND = 1.1


def run(options: Options) -> Result:
    saves = 2 if options.quick else 12
    base = bases.tiny(options.work / "base")
    caches.fill(options.work, 64, side=16, tokens=24, width=64)
    plain, saving, size = _timed(Task(base, options.work, 64, spec_of("full", BATCH, 64)), saves, options)
    ratio = median(saving) / median(plain)
    whole = mean(plain + saving) / mean(plain)
    return Result(
        targets=[
            Target("seconds a step, while saving / while not, medians", ratio, BOUND, at_least=False),
            Target(f"all steps with a checkpoint every {EVERY} / without, means", whole, BOUND, at_least=False),
        ],
        tables=[
            Table(
                "One step",
                ["", "steps", "median, s", "mean, s", "longest, s"],
                [
                    [name, len(found), round(median(found), 3), round(mean(found), 3), round(max(found), 3)]
                    for name, found in (("no checkpoint is written", plain), ("one is written", saving))
                ],
            )
        ],
        samples={"plain": plain, "saving": saving},
        settings={"batch": BATCH, "precision": "fp32", "every": EVERY, "checkpoint_mib": round(size / 2**20)},
    )


def _timed(task: Task, saves: int, options: Options) -> tuple[list[float], list[float], int]:
    """Seconds of steps without and with a checkpoint on its way, and its bytes."""
    engine, loop = raysd_training(task, torch.device("cpu"))
    saver = Saver(Storage(str(options.work / "run")), engine, None, "1", lambda: None)
    for _ in range(WARMUP):
        next(loop)
    plain: list[float] = []
    saving: list[float] = []
    size = 0
    for step in range(1, saves * EVERY + 1):
        began, busy = time.perf_counter(), saver.pending is not None
        next(loop)
        if saver.written:
            size = sum(part["size"] for part in saver.finish().parts)
        if step % EVERY == 0:
            saver.begin(Progress(step=step))
            busy = True
        (saving if busy else plain).append(time.perf_counter() - began)
    saver.finish()
    return plain, saving, size
