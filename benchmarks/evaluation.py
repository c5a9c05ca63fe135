"""`evaluate` of tiny-sd, from pictures to scores, beside a bare batched diffusers loop that draws as many."""

import time
from statistics import median
from typing import Any

from benchmarks import spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

PICTURES, BATCH, STEPS, GUIDANCE, TURNS = 256, 32, 25, 3.5, 2
BOUND = 0.9


def run(options: Options) -> Result:
    pictures, turns = (32, 1) if options.quick else (PICTURES, TURNS)
    seconds: dict[str, list[float]] = {"bare loop": [], "evaluate": [], "evaluate, one Ray worker": []}
    for turn in range(turns):
        store = str(options.work / f"store-{turn}")
        seconds["bare loop"].append(spawned.alone(_bare, pictures))
        seconds["evaluate"].append(spawned.alone(_evaluate, store, pictures, None))
        seconds["evaluate, one Ray worker"].append(spawned.alone(_evaluate, f"{store}-ray", pictures, 1))
    typical = {name: median(values) for name, values in seconds.items()}
    rows = [
        [name, round(pictures / value, 2), round(typical["bare loop"] / value, 3)] for name, value in typical.items()
    ]
    return Result(
        targets=[
            Target(f"{name}: pictures/s, raysd / bare loop", typical["bare loop"] / typical[name], BOUND, True)
            for name in ("evaluate", "evaluate, one Ray worker")
        ],
        tables=[Table("Drawing and judging", ["", "pictures/s", "beside the bare loop"], rows)],
        samples=seconds,
        settings={"pictures": pictures, "batch": BATCH, "steps": STEPS, "guidance": GUIDANCE, "turns": turns},
        notes=[
            "evaluate: drawing, keeping the pictures, features and scores, without data; imports and Ray's start are counted",
            "By default, which on this machine draws in its own process; and with one Ray worker.",
        ],
    )


def _bare(pictures: int) -> float:
    """Seconds of drawing, imports and the pipeline's loading included as in evaluate's."""
    began = time.perf_counter()
    import torch
    from diffusers import StableDiffusionPipeline

    from raysd.assets import asset
    from raysd.evaluate.prompts import BUNDLED, read_prompts

    prompts = [prompt.text for prompt in read_prompts(BUNDLED)]
    pipeline: Any = StableDiffusionPipeline.from_pretrained(asset("tiny-sd"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, pictures, BATCH):
        numbers = range(first, min(first + BATCH, pictures))
        pipeline(
            [prompts[number % len(prompts)] for number in numbers],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
        )
    return time.perf_counter() - began


def _evaluate(store: str, pictures: int, workers: int | None) -> float:
    began = time.perf_counter()
    from raysd.config import EvaluationSpec, load
    from raysd.evaluate.evaluation import evaluate
    from raysd.storage import Storage

    values = {"count": pictures, "batch": BATCH, "steps": STEPS, "guidance": GUIDANCE, "workers": workers}
    spec = load(EvaluationSpec, {name: value for name, value in values.items() if value is not None})
    evaluate("tiny-sd", None, spec, Storage(store), lambda event: None)
    return time.perf_counter() - began
