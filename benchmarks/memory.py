"""Peak memory of LoRA beside full fine-tuning, and of each rank at ZeRO stages 0 to 3.

Stable Diffusion 1.5's blocks at reduced width (64 to 256 channels), 32 x 32 latents, fp32, three steps of raysd's loop.
Peak resident memory (VmHWM) less what the process held after its imports; each case in fresh processes.
"""

import gc
import importlib
from itertools import islice
from statistics import median

import torch

from benchmarks import bases, caches, spawned
from benchmarks.loops import Task, raysd_loop, spec_of
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

BOUND = 0.6
WORLD = 2
STEPS = 3
MIB = 2**20
STATUS = "/proc/self/status"


def run(options: Options) -> Result:
    repeats, shape = (1, bases.SMALL) if options.quick else (3, bases.REDUCED)
    side, width = shape["sample_size"], shape["cross_attention_dim"]
    base = bases.denoiser_only(options.work / "base", shape)
    caches.fill(options.work, 8, side=side, tokens=77, width=width)
    kinds: dict[str, list[float]] = {"lora": [], "full": []}
    stages: dict[int, list[list[float]]] = {stage: [] for stage in ((0, 3) if options.quick else range(4))}
    for _ in range(repeats):
        for kind, found in kinds.items():
            found.append(spawned.alone(_peak, Task(base, options.work, 8, spec_of(kind, 1, 8 * side))))
        for stage, found_of_ranks in stages.items():
            task = Task(base, options.work, 8, spec_of("full", WORLD, 8 * side))
            sharded = task.changed(scale__workers=WORLD, scale__zero_stage=stage)
            found_of_ranks.append(spawned.ranks(WORLD, _peak_of_rank, sharded))
    return _result(kinds, stages, {"shape": shape, "batch_a_worker": 1, "precision": "fp32", "steps": STEPS})


def _peak(task: Task) -> float:
    _import("diffusers", "peft")
    return _grown(task, 0, 1)


def _peak_of_rank(rank: int, task: Task) -> float:
    _import("diffusers", "peft", "raysd.train.deepspeed_engine")
    from raysd.train.deepspeed_engine import _import_deepspeed

    _import_deepspeed(torch.device("cpu"))
    return _grown(task, rank, WORLD)


def _grown(task: Task, rank: int, world: int) -> float:
    """MiB by which the peak of a few steps lies over what is held now."""
    _warm_up()
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is held now
    before = _status("VmRSS")
    for _ in islice(raysd_loop(task, torch.device("cpu"), rank, world), STEPS):
        pass
    return (_status("VmHWM") - before) / MIB


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


def _result(kinds: dict[str, list[float]], stages: dict[int, list[list[float]]], settings: dict[str, object]) -> Result:
    lora, full = median(kinds["lora"]), median(kinds["full"])
    methods = [["lora", round(lora), round(lora / full, 3)], ["full", round(full), 1.0]]
    peaks = {stage: median(max(ranks) for ranks in found) for stage, found in stages.items()}
    sharded = [[stage, round(peak), round(peak / peaks[0], 3)] for stage, peak in peaks.items()]
    samples = {kind: found for kind, found in kinds.items()} | {
        f"full, ZeRO {stage}, rank {rank}": [ranks[rank] for ranks in found]
        for stage, found in stages.items()
        for rank in range(WORLD)
    }
    return Result(
        [Target("peak memory, LoRA / full", lora / full, BOUND, at_least=False)],
        [
            Table("One worker", ["method", "peak over imports, MiB", "of full"], methods),
            Table("Full, two workers", ["ZeRO stage", "larger rank's peak, MiB", "of stage 0"], sharded),
        ],
        samples,
        settings,
        ["Pages that the allocator keeps after use count: resident memory, not live tensors."],
    )
