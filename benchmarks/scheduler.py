"""Step-level batching beside a bare batched diffusers loop, and beside batching by request.

tiny-sd, fp32, guidance 3.5, all cores. With equal steps the scheduler can only lose: the loop is diffusers' pipeline on
full batches. With 4 to 50 steps all requests are there at the start; batching by request either lets the longest of a
batch decide (as a pipeline called with what is waiting would, had it steps of each picture's own) or batches only
requests of equal steps. Both run our own denoising step, so that nothing but the batching differs.
"""

import random
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks import spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

BATCH, GUIDANCE = 16, 3.5
SHORT = 8
"""Steps up to which a request is a short one."""


def run(options: Options) -> Result:
    count, turns = (16, 1) if options.quick else (64, 3)
    equal: dict[str, list[float]] = {"bare loop": [], "scheduler": []}
    mixed: dict[str, list[float]] = {"longest decides": [], "equal steps": [], "scheduler": []}
    short: dict[str, list[float]] = {name: [] for name in mixed}
    for _ in range(turns):
        equal["bare loop"].append(spawned.alone(bare_loop, count))
        equal["scheduler"].append(spawned.alone(_equal, count))
        for name in mixed:
            whole, late = spawned.alone(_mixed, name, count)
            mixed[name].append(whole)
            short[name].append(late)
    loads = [spawned.alone(_loads) for _ in range(turns)]
    speed = {name: count / median(seconds) for name, seconds in {**equal}.items()}
    typical = {name: median(seconds) for name, seconds in mixed.items()}
    best = min(("longest decides", "equal steps"), key=lambda name: typical[name])
    wait = {name: median(seconds) for name, seconds in short.items()}
    lora = median(adapter / base for base, adapter, *_ in loads)
    first = median(first / warm for *_, first, warm in loads)
    return Result(
        targets=[
            Target(
                "equal steps: pictures/s, scheduler / bare loop", speed["scheduler"] / speed["bare loop"], 0.95, True
            ),
            Target(f"4 to 50 steps: pictures/s, scheduler / {best}", typical[best] / typical["scheduler"], 1.3, True),
            Target(f"short requests' p95, scheduler / {best}", wait["scheduler"] / wait[best], 0.3, False),
            Target("a second LoRA of a loaded base: seconds, of the base's", lora, 0.2, False),
            Target("a warm replica's first picture: seconds, of its median", first, 1.2, False),
        ],
        tables=[
            Table("Equal steps", ["", "pictures/s"], [[name, round(value, 2)] for name, value in speed.items()]),
            Table(
                "4 to 50 steps, all there at the start",
                ["batching", "s for all", "p95 of the short ones, s"],
                [[name, round(typical[name], 2), round(wait[name], 2)] for name in mixed],
            ),
        ],
        samples={
            f"{part}: {name}": values
            for part, found in (("equal", equal), ("mixed", mixed))
            for name, values in found.items()
        },
        settings={"requests": count, "batch": BATCH, "guidance": GUIDANCE, "short": SHORT, "turns": turns},
    )


def bare_loop(count: int) -> float:
    import torch

    from raysd.assets import asset
    from raysd.models import family_of

    folder = asset("tiny-sd")
    pipeline: Any = family_of(folder).pipeline(folder)
    pipeline.unet.to(memory_format=torch.channels_last)

    def draw(first: int) -> None:
        numbers = range(first, min(first + BATCH, count))
        pipeline(
            [f"a red circle {number}" for number in numbers],
            num_inference_steps=25,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
        )

    pipeline(["warm"] * BATCH, num_inference_steps=2, guidance_scale=GUIDANCE)
    began = time.perf_counter()
    for first in range(0, count, BATCH):
        draw(first)
    return time.perf_counter() - began


def _equal(count: int) -> float:
    began, ends = _drawn([25] * count)
    return max(ends) - began


def _mixed(kind: str, count: int) -> tuple[float, float]:
    """Seconds for all, and the 95th percentile of the short ones."""
    steps = [random.Random(number).randint(4, 50) for number in range(count)]
    if kind == "scheduler":
        began, ends = _drawn(steps)
    else:
        began, ends = _by_request(steps, _groups(kind, steps))
    late = [end - began for end, number in zip(ends, steps, strict=True) if number <= SHORT]
    return max(ends) - began, quantiles(late, n=20)[-1] if len(late) > 1 else max(late, default=0.0)


def _groups(kind: str, steps: Sequence[int]) -> list[list[int]]:
    """Requests drawn together, in order of arrival."""
    order = list(range(len(steps)))
    if kind == "longest decides":
        return [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    groups: list[list[int]] = []
    for number in order:
        same = [group for group in groups if steps[group[0]] == steps[number] and len(group) < BATCH]
        same[0].append(number) if same else groups.append([number])
    return groups


def _predictor() -> Any:
    import torch

    from raysd.assets import asset
    from raysd.models import family_of
    from raysd.serve.predictor import Predictor
    from raysd.serve.torch_backend import TorchBackend

    folder = asset("tiny-sd")
    family = family_of(folder)
    return Predictor(family, folder, TorchBackend(family, folder, torch.device("cpu")))


def _wish(number: int, steps: int) -> Any:
    from raysd.serve.drawing import Drawing

    return Drawing(prompt=f"a red circle {number}", seed=number, steps=steps, guidance=GUIDANCE)


def _drawn(steps: Sequence[int]) -> tuple[float, list[float]]:
    """When the scheduler began, and when each picture was there."""
    from raysd.serve.scheduler import Picture, Scheduler

    predictor = _predictor()
    _warm(predictor)
    scheduler = Scheduler(rows=2 * BATCH, admitted=len(steps), waiting=len(steps))
    pictures = [Picture(predictor, _wish(number, count)) for number, count in enumerate(steps)]
    ends: dict[int, float] = {}
    for number, picture in enumerate(pictures):
        picture.future.add_done_callback(lambda _, number=number: ends.setdefault(number, time.perf_counter()))
    began = time.perf_counter()
    scheduler.submit(pictures)
    while scheduler.turn():
        pass
    return began, [ends[number] for number in range(len(steps))]


def _by_request(steps: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[float, list[float]]:
    """Each group from its first step to its last one's end, all of it handed out together."""
    predictor = _predictor()
    _warm(predictor)
    ends = [0.0] * len(steps)
    began = time.perf_counter()
    for group in groups:
        longest = max(steps[number] for number in group)
        samples = [predictor.begin(_wish(number, longest)) for number in group]
        for _ in range(longest):
            predictor.advance(samples, None)
        predictor.pictures([sample.latents for sample in samples])
        for number in group:
            ends[number] = time.perf_counter()
    return began, ends


def _warm(predictor: Any) -> None:
    samples = [predictor.begin(_wish(number, 2)) for number in range(BATCH)]
    predictor.advance(samples, None)
    predictor.pictures([sample.latents for sample in samples])


def _loads() -> tuple[float, float, float, float]:
    """Seconds of loading a base, of putting a LoRA on it, of the first picture after warming up, and of the median one."""
    import tempfile
    from pathlib import Path

    from benchmarks.bases import lora_of
    from raysd.serve.replica import warm

    began = time.perf_counter()
    predictor = _predictor()
    base = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        files = [lora_of(predictor.folder, Path(folder) / str(number), number) for number in range(2)]
        predictor.backend.add_adapter("first", files[0])
        began = time.perf_counter()
        predictor.backend.add_adapter("second", files[1])
        adapter = time.perf_counter() - began
    warm(predictor, 2 * BATCH)
    took = []
    for number in range(9):
        began = time.perf_counter()
        sample = predictor.begin(_wish(number, 10))
        while not sample.done:
            predictor.advance([sample], None)
        predictor.pictures([sample.latents])
        took.append(time.perf_counter() - began)
    return base, adapter, took[0], median(took)
