"""A step at Stable Diffusion 1.5's shape, 512 x 512 pixels, bf16: raysd's loop beside a bare loop, on one GPU.

LoRA of rank 4 and full, batch 8, random weights, each measurement in a fresh process, in turns. MFU: operations of one forward
and backward pass as torch's FlopCounterMode counts them (nothing recomputed) over time and the GPU's dense bf16 peak.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import bases, caches, clock, hardware, spawned
from benchmarks.loops import Task, bare_loop, raysd_loop, spec_of
from benchmarks.options import Options, Skipped
from benchmarks.results import Result, Table, Target
from raysd.methods import METHODS
from raysd.models import family_of

BOUND = 1.05
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 operations a second, from NVIDIA's data sheets; the first name that the GPU's holds counts."""

Figures = dict[str, Any]


def run(options: Options) -> Result:
    if not options.small and not torch.cuda.is_available():
        raise Skipped("torch sees no GPU here; --small runs the same code at a small size on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, batch = (bases.SMALL, 2) if options.small else (bases.SD15, 8)
    repeats, steps, warmup = (1, 2, 1) if options.quick or options.small else (3, 30, 8)
    base = bases.denoiser_only(options.work / "base", shape)
    side, width = shape["sample_size"], shape["cross_attention_dim"]
    caches.fill(options.work, 64, side=side, tokens=77, width=width)
    found: dict[str, list[Figures]] = {}
    for kind in ("lora", "full"):
        task = Task(base, options.work, 64, spec_of(kind, batch, 8 * side, "bf16"))
        for _ in range(repeats):
            for which in ("raysd", "bare"):
                figures = spawned.alone(_measure, task, which, device, steps, warmup)
                found.setdefault(f"{kind} {which}", []).append(figures)
    operations = {kind: flops(base, spec_of(kind, batch, 8 * side, "bf16"), side, width) for kind in ("lora", "full")}
    settings = {"shape": shape, "batch": batch, "precision": "bf16", "steps": steps, "operations_a_step": operations}
    return _result(found, operations, settings, device == "cuda")


def _measure(task: Task, which: str, device: str, steps: int, warmup: int) -> Figures:
    """Seconds of each step, and the peak of allocated GPU memory in GiB."""
    place = torch.device(device)
    loop: Iterator[float] = raysd_loop(task, place) if which == "raysd" else bare_loop(task, place)
    clock.clocked(loop, warmup)
    seconds = clock.clocked(loop, steps)
    return {"seconds": seconds, "gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0}


def flops(base: Path, spec: Any, side: int, width: int) -> int:
    """Of one forward and backward pass of the denoiser, counted on tensors without data."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    size, meta = spec.optim.batch_size, torch.device("meta")
    denoiser = METHODS[spec.method.kind].build(family_of(base), base, spec).float().to(meta).denoiser
    noisy, text = torch.empty(size, 4, side, side, device=meta), torch.empty(size, 77, width, device=meta)
    timesteps = torch.empty(size, dtype=torch.int64, device=meta)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        denoiser(noisy, timesteps, text).sample.sum().backward()
    return int(counter.get_total_flops())


def _result(
    found: dict[str, list[Figures]], operations: dict[str, int], settings: dict[str, object], gpu: bool
) -> Result:
    typical = {case: median(s for one in figures for s in one["seconds"]) for case, figures in found.items()}
    rows = []
    for case, seconds in typical.items():
        gib = max(one["gib"] for one in found[case])
        rows.append([case, round(1 / seconds, 3), _mfu(operations[case.split()[0]] / seconds), round(gib, 2)])
    targets = [
        Target(
            f"{kind}: seconds a step, raysd / bare loop",
            typical[f"{kind} raysd"] / typical[f"{kind} bare"],
            BOUND,
            False,
        )
        for kind in operations
    ]
    samples = {case: [s for one in figures for s in one["seconds"]] for case, figures in found.items()}
    columns = ["loop", "steps/s", "MFU", "peak memory, GiB"]
    return Result(targets, [Table("Stable Diffusion 1.5, 512 px, bf16", columns, rows)], samples, settings, gpu=gpu)


def _mfu(rate: float) -> str:
    """Operations a second over the GPU's peak."""
    name = hardware.gpu_name() or ""
    peak = next((value for known, value in PEAKS.items() if known in name), None)
    return f"{100 * rate / peak:.1f} %" if peak else f"{rate / 1e9:.1f} GFLOP/s, peak unknown"
