"""Peak memory of LoRA beside full fine-tuning, and of each rank at ZeRO stages 0 to 3.

Stable Diffusion 1.5's blocks at reduced width (64 to 256 channels), 32 x 32 latents, fp32, three steps of raysd's loop.
Peak resident memory (VmHWM) less what the process held after its imports; each case in fresh processes. Over all steps
(with the building of the model), and over the last step alone, when all is in place.
"""

import gc
import importlib
import os
from itertools import islice, pairwise
from statistics import median

import torch

from benchmarks import bases, caches, spawned
from benchmarks.loops import Task, raysd_loop, spec_of
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

BOUND = 0.6
WORLD = 4
STEPS = 3
MIB = 2**20
STATUS = "/proc/self/status"


def run(options: Options) -> Result:
    # The allocator gives large blocks back to the system at once: what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    repeats, shape = (1, bases.SMALL) if options.quick else (3, bases.REDUCED)
    side, width = shape["sample_size"], shape["cross_attention_dim"]
    base = bases.denoiser_only(options.work / "base", shape)
    caches.fill(options.work, 8, side=side, tokens=77, width=width)
    kinds: dict[str, list[Peaks]] = {"lora": [], "full": []}
    stages: dict[int, list[list[Peaks]]] = {stage: [] for stage in ((0, 3) if options.quick else range(4))}
    for _ in range(repeats):
        for kind, found in kinds.items():
            found.append(spawned.alone(_peak, Task(base, options.work, 8, spec_of(kind, 1, 8 * side))))
    for stage, found_of_ranks in stages.items():
        task = Task(base, options.work, 8, spec_of("full", WORLD, 8 * side))
        sharded = task.changed(scale__workers=WORLD, scale__zero_stage=stage)
        found_of_ranks.append(spawned.ranks(WORLD, _peak_of_rank, sharded))
    return _result(kinds, stages, {"shape": shape, "batch_a_worker": 1, "precision": "fp32", "steps": STEPS})


Peaks = list[float]
"""MiB over all steps, and over the last one."""


def _peak(task: Task) -> Peaks:
    _import("diffusers", "peft")
    return _grown(task, 0, 1)


def _peak_of_rank(rank: int, task: Task) -> Peaks:
    _import("diffusers", "peft", "raysd.train.deepspeed_engine")
    from raysd.train.deepspeed_engine import _import_deepspeed

    _import_deepspeed(torch.device("cpu"))
    return _grown(task, rank, WORLD)


def _grown(task: Task, rank: int, world: int) -> Peaks:
    """By how much the peaks lie over what is held now."""
    _warm_up()
    gc.collect()
    _forget_peak()
    before = _status("VmRSS")
    loop = raysd_loop(task, torch.device("cpu"), rank, world)
    for _ in islice(loop, STEPS - 1):
        pass
    first = _status("VmHWM")
    gc.collect()
    _forget_peak()
    next(loop)
    last = _status("VmHWM")
    return [(max(first, last) - before) / MIB, (last - before) / MIB]


def _forget_peak() -> None:
    """From here on, the peak is what is held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _warm_up() -> None:
    """One convolution and one product, backward too: what torch loads at first use is no model's memory."""
    layer, picture = torch.nn.Conv2d(4, 4, 3), torch.randn(1, 4, 8, 8)
    (layer(picture).flatten() @ torch.randn(144)).backward()


def _import(*modules: str) -> None:
    from diffusers import UNet2DConditionModel  # noqa: F401

    for module in modules:
        importlib.import_module(module)


def _status(field: str) -> int:
    """Bytes, from a line like 'VmHWM:   123456 kB'."""
    with open(STATUS) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def _result(kinds: dict[str, list[Peaks]], stages: dict[int, list[list[Peaks]]], settings: dict[str, object]) -> Result:
    whole = {kind: [median(found[place] for found in runs) for place in (0, 1)] for kind, runs in kinds.items()}
    ratio = whole["lora"][0] / whole["full"][0]
    methods = [[kind, *(round(peak) for peak in peaks)] for kind, peaks in whole.items()]
    ranks = {stage: [_largest(found, place) for place in (0, 1)] for stage, found in stages.items()}
    sharded = [[stage, round(peak), round(last), round(last / ranks[0][1], 3)] for stage, (peak, last) in ranks.items()]
    lasts = [last for _, last in ranks.values()]
    falls = all(later < earlier for earlier, later in pairwise(lasts))
    samples = {kind: [found[0] for found in runs] for kind, runs in kinds.items()} | {
        f"full, ZeRO {stage}, rank {rank}, last step": [each[rank][1] for each in found]
        for stage, found in stages.items()
        for rank in range(WORLD)
    }
    columns = ["ZeRO stage", "larger rank's peak, MiB", "in the last step, MiB", "of stage 0"]
    return Result(
        [
            Target("peak memory, LoRA / full", ratio, BOUND, at_least=False),
            Target("memory a rank in a step falls with each ZeRO stage", float(falls), 1.0, at_least=True, unit=""),
        ],
        [
            Table("One worker", ["method", "peak over imports, MiB", "in the last step, MiB"], methods),
            Table(f"Full, {WORLD} workers", columns, sharded),
        ],
        samples,
        settings,
        ["Each rank builds the whole model before its weights are sharded: the peak over all steps has that in it."],
    )


def _largest(found: list[list[Peaks]], place: int) -> float:
    return median(max(rank[place] for rank in ranks) for ranks in found)
