"""One step of raysd's loop, with real caches, beside the shortest PyTorch loop that trains the same module.

fp32, batch 16, the bundled base's shape at 64 px, LoRA of rank 4 and full, one process, all cores.
"""

import torch

from benchmarks import bases, caches, clock
from benchmarks.loops import Task, bare_loop, raysd_loop, spec_of
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

BOUND = 1.05
BATCH = 16


def run(options: Options) -> Result:
    pictures, turns, steps, warmup = (32, 2, 2, 1) if options.quick else (512, 30, 5, 5)
    base = bases.tiny(options.work / "base")
    caches.fill(options.work, pictures, side=16, tokens=24, width=64)
    blocks = {}
    for kind in ("lora", "full"):
        blocks[kind] = _measure(Task(base, options.work, pictures, spec_of(kind, BATCH, 64)), turns, steps, warmup)
    return _result(blocks, {"batch": BATCH, "precision": "fp32", "turns": turns, "steps_a_turn": steps})


def _measure(task: Task, turns: int, steps: int, warmup: int) -> dict[str, clock.Blocks]:
    cpu = torch.device("cpu")
    loops = {"raysd": raysd_loop(task, cpu), "bare": bare_loop(task, cpu)}
    return clock.alternated(loops, turns, steps, warmup)


def _result(blocks: dict[str, dict[str, clock.Blocks]], settings: dict[str, object]) -> Result:
    rows, targets = [], []
    for kind, found in blocks.items():
        ours, bare = clock.typical(found["raysd"]), clock.typical(found["bare"])
        rows.append([kind, round(ours, 4), round(bare, 4), round(ours / bare, 3), clock.spread(*found.values())])
        targets.append(Target(f"{kind}: seconds a step, raysd / bare loop", ours / bare, BOUND, at_least=False))
    columns = ["method", "raysd, s a step", "bare loop, s a step", "ratio", "quartiles over the turns"]
    samples = {f"{kind} {name}": clock.flat(b) for kind, found in blocks.items() for name, b in found.items()}
    return Result(targets, [Table("One step", columns, rows)], samples, settings)
