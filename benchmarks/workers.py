"""Two raysd workers of one core each (gloo, DeepSpeed ZeRO 1 and 2) beside two bare PyTorch loops that run at once.

fp32, global batch 16 (8 a worker; 8 a bare loop), the bundled base's shape at 64 px, LoRA of rank 4 and full. Without
Ray; each process pinned to its core, one thread each. Two bare loops exchange nothing; torch's DistributedDataParallel over
the same gloo shows what exchanging gradients costs here at least.
"""

import os

import torch
import torch.distributed as dist

from benchmarks import bases, caches, clock, spawned
from benchmarks.loops import Task, bare_loop, raysd_loop, spec_of
from benchmarks.options import Options, Skipped
from benchmarks.results import Result, Table, Target

BOUND = 0.9
BATCH = 16
WORLD = 2

Rank = dict[str, clock.Blocks]


def run(options: Options) -> Result:
    if len(os.sched_getaffinity(0)) < WORLD:
        raise Skipped(f"it needs {WORLD} cores")
    pictures, turns, steps, warmup = (32, 2, 2, 1) if options.quick else (512, 20, 5, 5)
    base = bases.tiny(options.work / "base")
    caches.fill(options.work, pictures, side=16, tokens=24, width=64)
    found = {}
    for kind in ("lora",) if options.quick else ("lora", "full"):
        for stage in (2,) if options.quick else (1, 2):
            task = Task(base, options.work, pictures, spec_of(kind, BATCH, 64)).changed(
                scale__workers=WORLD, scale__zero_stage=stage
            )
            found[f"{kind}, ZeRO {stage}"] = spawned.ranks(WORLD, _rank, task, turns, steps, warmup)
    settings = {"workers": WORLD, "batch": BATCH, "precision": "fp32", "turns": turns, "steps_a_turn": steps}
    return _result(found, settings)


def _rank(rank: int, task: Task, turns: int, steps: int, warmup: int) -> Rank:
    """Both loops on one rank; all ranks take turns together."""
    cpu = torch.device("cpu")
    single = task.changed(scale__workers=1, scale__zero_stage=0, optim__batch_size=BATCH // WORLD)
    loops = {
        "raysd": raysd_loop(task, cpu, rank, WORLD),
        "bare": bare_loop(single, cpu),
        "ddp": bare_loop(single, cpu, parallel=True),
    }
    return clock.alternated(loops, turns, steps, warmup, ready=dist.barrier)


def _result(found: dict[str, list[Rank]], settings: dict[str, object]) -> Result:
    rows, targets = [], []
    for case, by_rank in found.items():
        ours = BATCH / max(clock.typical(rank["raysd"]) for rank in by_rank)
        bare = sum(BATCH / WORLD / clock.typical(rank["bare"]) for rank in by_rank)
        ddp = BATCH / max(clock.typical(rank["ddp"]) for rank in by_rank)
        rows.append([case, round(ours, 1), round(bare, 1), round(ours / bare, 3), round(ddp, 1), round(ours / ddp, 3)])
        targets.append(Target(f"{case}: pictures/s, two workers / two bare loops", ours / bare, BOUND, at_least=True))
    columns = [
        "case",
        "two workers, pictures/s",
        "two bare loops, pictures/s",
        "ratio",
        "DDP, pictures/s",
        "raysd / DDP",
    ]
    samples = {
        f"{case} {name} rank {number}": clock.flat(blocks)
        for case, by_rank in found.items()
        for number, rank in enumerate(by_rank)
        for name, blocks in rank.items()
    }
    return Result(targets, [Table("Two workers", columns, rows)], samples, settings)
