"""One denoising step in ONNX Runtime beside PyTorch, fp32, on the CPU.

Stable Diffusion 1.5's blocks at reduced width (64 to 256 channels), 32 x 32 latents, 77 tokens, batch 2 (a picture with
guidance), random weights, all cores. Each case in fresh processes, in turns: their threads would disturb each other. The
export of a LoRA version has its adapter merged in; that of a base takes adapters as inputs, here none.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bases, spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

OVER_BEST, OVER_EAGER, CLOSE = 1.15, 1.5, 1e-3
BATCH = 2
TORCH = ("eager", "channels_last", "compiled", "compiled, channels_last")
MERGED, INPUTS = "ONNX Runtime", "ONNX Runtime, adapters as inputs"
Figures = dict[str, Any]


def run(options: Options) -> Result:
    turns, steps, warmup, shape = (1, 2, 1, bases.SMALL) if options.quick else (3, 10, 3, bases.REDUCED)
    base = bases.whole(options.work / "base", shape)
    spawned.alone(_export, base, options.work)
    found: dict[str, list[Figures]] = {name: [] for name in (*TORCH, MERGED, INPUTS)}
    for _ in range(turns):
        for name, figures in found.items():
            figures.append(spawned.alone(_measure, name, shape, options.work, steps, warmup))
    return _result(found, {"shape": shape, "batch": BATCH, "turns": turns, "steps_a_turn": steps})


def _export(base: Path, work: Path) -> None:
    """The base's graphs, and beside them those of a LoRA version, which differ in the denoiser alone."""
    from raysd.export.networks import Networks
    from raysd.export.onnx import export_graphs, save, trace
    from raysd.references import Located

    (work / INPUTS).mkdir()
    export_graphs(Networks(Located(str(base), base)), work / INPUTS, "fp32", lambda done, of: None)
    shutil.copytree(work / INPUTS, work / MERGED)
    lora = bases.lora_of(base, work / "lora", seed=0, spread=0.05)  # as large as the weights: more is chaos
    save(trace(Networks(Located("lora", base, lora)).graphs()[0]), work / MERGED / "denoiser.onnx")


def _measure(name: str, shape: dict[str, Any], work: Path, steps: int, warmup: int) -> Figures:
    """Seconds of each step, and how far its output lies from PyTorch's own."""
    import torch

    base, chance, side = work / "base", torch.Generator().manual_seed(0), shape["sample_size"]
    latents = torch.randn(BATCH, 4, side, side, generator=chance)
    given = (
        latents,
        torch.full((BATCH,), 500.0),
        torch.randn(BATCH, bases.TOKENS, shape["cross_attention_dim"], generator=chance),
    )
    step = _in_torch(name, base) if name in TORCH else _in_onnx(base, work / name)
    truth = _in_torch("eager", base, None if name != MERGED else next((work / "lora").iterdir()))(*given)
    distance = float((step(*given) - truth).abs().max() / truth.abs().max())
    seconds = []
    for number in range(warmup + steps):
        began = time.perf_counter()
        step(*given)
        if number >= warmup:
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "distance": distance}


def _in_onnx(base: Path, folder: Path) -> Callable[..., Any]:
    from raysd.export.runtime import Runtime
    from raysd.models import family_of

    family = family_of(base)
    runtime = Runtime(folder, family, family.geometry(base), providers=["CPUExecutionProvider"])
    return lambda *given: runtime.denoise(*given, None)


def _in_torch(name: str, base: Path, lora: Path | None = None) -> Callable[..., Any]:
    import torch

    from raysd.models import family_of

    family = family_of(base)
    denoiser: Any = family.denoiser(base).requires_grad_(False).eval()
    if lora is not None:
        family.add_adapter(denoiser, lora, "lora")
        family.use_adapter(denoiser, "lora")
    last = torch.channels_last if "channels_last" in name else torch.contiguous_format
    denoiser = denoiser.to(memory_format=last)
    call = torch.compile(denoiser) if "compiled" in name else denoiser

    @torch.inference_mode()
    def step(latents: Any, timesteps: Any, text: Any) -> Any:
        return family.predict(call, latents.contiguous(memory_format=last), timesteps, text)

    return step


def _result(found: dict[str, list[Figures]], settings: dict[str, object]) -> Result:
    typical = {name: median(s for one in figures for s in one["seconds"]) for name, figures in found.items()}
    best = min(TORCH, key=lambda name: typical[name])
    rows = [
        [name, round(1000 * seconds, 1), round(typical["eager"] / seconds, 2), f"{found[name][0]['distance']:.1e}"]
        for name, seconds in typical.items()
    ]
    return Result(
        [
            Target(f"a step, {best} / ONNX Runtime", typical[best] / typical[MERGED], OVER_BEST, True),
            Target("a step, eager / ONNX Runtime", typical["eager"] / typical[MERGED], OVER_EAGER, True),
            *(
                Target(
                    f"{name}: largest distance from PyTorch", max(one["distance"] for one in found[name]), CLOSE, False
                )
                for name in (MERGED, INPUTS)
            ),
        ],
        [Table("One step", ["", "ms", "times as fast as eager", "largest distance from eager"], rows)],
        {name: [s for one in figures for s in one["seconds"]] for name, figures in found.items()},
        settings,
        [f"Adapters as inputs cost {100 * (typical[INPUTS] / typical[MERGED] - 1):.0f} % of a step, with none put on."],
    )
