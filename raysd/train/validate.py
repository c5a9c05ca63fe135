"""Validation loss with fixed noise and timesteps, and pictures from fixed prompts and seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from raysd.config.training import TrainingSpec
from raysd.diffusion import sample_posterior
from raysd.evaluate.losses import fixed_noise, middles
from raysd.methods import Batch, Method
from raysd.models import NoiseSchedule
from raysd.train.batches import Item, Source
from raysd.train.engine import Engine

PICTURE_SEED = 1000
PICTURE_STEPS = 25
PICTURE_GUIDANCE = 3.5


@torch.no_grad()
def validation_loss(
    engine: Engine,
    method: Method,
    items: Sequence[Item],
    source: Source,
    schedule: NoiseSchedule,
    spec: TrainingSpec,
    beat: Callable[[], None] = lambda: None,
) -> float | None:
    """Mean unweighted squared error over the held-out pictures at evenly spread timesteps; None without pictures.

    Noise depends on the picture's place and timestep alone, the latents are the posterior's means: the same weights give
    the same loss. COLLECTIVE: every rank makes the same number of forward passes (ZeRO-3 gathers weights in each), a
    rank that has run out repeats a pair with weight 0. `beat` is called after each of them.
    """
    if not items:
        return None
    pairs = [
        (n, t) for n in range(len(items)) for t in middles(len(schedule.alphas_cumprod), spec.validation.timesteps)
    ]
    size = spec.optim.micro_batch or max(1, spec.optim.batch_size // engine.world)
    stride = size * engine.world
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    plain = _unweighted(spec)
    engine.module.eval()
    for first in range(0, len(pairs), stride):
        chunk = pairs[first + engine.rank * size : first + (engine.rank + 1) * size]
        batch = _batch(chunk or pairs[:1], items, source)
        if chunk:
            batch_errors = method.loss(engine, batch.to(engine.device), schedule, plain)
            total += batch_errors.double().sum()
        else:
            method.loss(engine, batch.to(engine.device), schedule, plain)
        beat()
    engine.module.train()
    if engine.world > 1:
        dist.all_reduce(total)
    return total.item() / len(pairs)


@torch.no_grad()
def pictures(engine: Engine, folder: Any, spec: TrainingSpec, beat: Callable[[], None] = lambda: None) -> list[Any]:
    """One picture for each of `validation.prompts`, drawn by the module as it stands.

    COLLECTIVE: every rank draws the same ones in lock-step (ZeRO-3 gathers weights in each forward pass). `beat` is called
    after each denoising step.
    """
    module: Any = engine.module
    modules = dict(module.named_modules())
    components = {part: modules[name] for name, part in module.family.trained_parts if name in modules}
    pipeline = module.family.pipeline(folder, **components).to(engine.device)
    if spec.loss.prediction != "base":  # as the published version's scheduler will say
        scheduler = pipeline.scheduler
        pipeline.scheduler = scheduler.from_config(scheduler.config, prediction_type=spec.loss.prediction)
    prompts = list(spec.validation.prompts)
    seeds = [torch.Generator().manual_seed(PICTURE_SEED + n) for n in range(len(prompts))]
    module.eval()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[spec.scale.precision]

    def stepped(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        beat()
        return values

    with torch.autocast(engine.device.type, dtype=dtype, enabled=dtype != torch.float32):
        images = pipeline(
            prompts,
            generator=seeds,
            num_inference_steps=PICTURE_STEPS,
            guidance_scale=PICTURE_GUIDANCE,
            callback_on_step_end=stepped,
        ).images
    module.train()
    return list(images)


def _batch(pairs: Sequence[tuple[int, int]], items: Sequence[Item], source: Source) -> Batch:
    moments = source.moments([items[n].latents[0] for n, _ in pairs])
    zeros = torch.zeros_like(moments[:, : moments.shape[1] // 2])
    scaling, shift = source.scale
    return Batch(
        latents=sample_posterior(moments, zeros, scaling, shift),
        noise=torch.stack([fixed_noise(n, t, zeros[0].shape) for n, t in pairs]),
        timesteps=torch.tensor([t for _, t in pairs]),
        text=source.texts([items[n].text for n, _ in pairs]),
    )


def _unweighted(spec: TrainingSpec) -> TrainingSpec:
    return spec.model_copy(update={"loss": spec.loss.model_copy(update={"min_snr_gamma": None})})
