"""The quality gate of an export: how far it is from PyTorch in numbers and in pictures, and what is allowed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raysd.errors import ExportRefused
from raysd.evaluate.features import matcher
from raysd.evaluate.prompts import BUNDLED, read_prompts
from raysd.evaluate.scores import clip_scores
from raysd.export.networks import Networks
from raysd.export.runtime import Runtime
from raysd.references import Located
from raysd.seeding import generator

PICTURES, STEPS, GUIDANCE = 8, 10, 3.5
TIMESTEPS = (1.0, 250.0, 500.5, 999.0)
BATCHES = (1, 3)
PEAK = 255.0


@dataclass(frozen=True)
class Figures:
    """What was measured. Relative distances are |difference| / |PyTorch|, Euclidean, the largest that was seen."""

    denoiser_relative: float
    denoiser_largest: float
    """Of any element, as are all that are called so."""
    adapter_relative: float
    """With an adapter on the denoiser; 0 where the graph takes none."""
    decoder_relative: float
    decoder_largest: float
    encoder_relative: float
    text_relative: float
    psnr: float
    """Of the least similar picture drawn by both from the same seed, in dB."""
    clip_difference: float
    """Mean difference of the pictures' CLIP scores, without its sign; the scores go to 100."""


@dataclass(frozen=True)
class Bounds:
    """What each relative distance and the CLIP scores may be at most, and the pictures at least."""

    relative: float
    psnr: float
    clip_difference: float


BOUNDS = {"fp32": Bounds(1e-3, 40, 0.1), "fp16": Bounds(1e-2, 30, 0.5), "int8": Bounds(2e-2, 25, 1.0)}
"""fp32 leaves room for the tensor cores of GPUs, which take 10 bits of each factor."""


def pass_gate(located: Located, networks: Networks, runtime: Runtime, precision: str) -> Figures:
    """Measure an export and refuse what is too far: ExportRefused with the figures."""
    figures = measure(located, networks, runtime)
    bounds = BOUNDS[precision]
    failed = [text for text, met in _judged(figures, bounds) if not met]
    if failed:
        raise ExportRefused(
            f"{located.ref}: the {precision} export is not kept: its pictures would not be the model's: "
            f"{'; '.join(failed)}\nuse --precision fp32, or draw with PyTorch"
        )
    return figures


def measure(located: Located, networks: Networks, runtime: Runtime) -> Figures:
    """Compare an export with the networks it was made from."""
    text = networks.encode_text(networks.tokens)
    bare = _denoiser(networks, runtime, text, adapted=False)
    adapted = _denoiser(networks, runtime, text, adapted=True) if networks.targets else [(torch.zeros(1),) * 2]
    latents = _latents(networks, BATCHES[-1], "decoder")
    decoded = [(networks.decode(latents), runtime.decode(latents))]
    pixels = decoded[0][0].clamp(-1, 1)
    encoded = [(networks.encode(pixels), runtime.encode(pixels))]
    texts = [(text, runtime.encode_text(networks.tokens))]
    psnr, clip = _pictures(located, networks, runtime)
    return Figures(
        denoiser_relative=_relative(bare),
        denoiser_largest=_largest(bare),
        adapter_relative=_relative(adapted),
        decoder_relative=_relative(decoded),
        decoder_largest=_largest(decoded),
        encoder_relative=_relative(encoded),
        text_relative=_relative(texts),
        psnr=psnr,
        clip_difference=clip,
    )


Compared = Sequence[tuple[Tensor, Tensor]]
"""PyTorch's tensor and the export's."""


def _denoiser(networks: Networks, runtime: Runtime, text: Tensor, *, adapted: bool) -> Compared:
    """At several timesteps and batch sizes."""
    pairs = networks.random_adapter(seed=0) if adapted else {}
    name = "gate" if adapted else None
    if name is not None:
        runtime.add_pairs(name, pairs, "the gate's adapter")
    found = []
    for batch in BATCHES:
        for timestep in TIMESTEPS:
            latents, times = _latents(networks, batch, timestep), torch.full((batch,), timestep)
            rows = text[torch.arange(batch) % len(text)]
            theirs = networks.denoise(latents, times, rows, pairs)
            found.append((theirs, runtime.denoise(latents, times, rows, name).cpu()))
    if name is not None:
        runtime.remove_adapter(name)
    return found


def _pictures(located: Located, networks: Networks, runtime: Runtime) -> tuple[float, float]:
    """(lowest PSNR, difference of mean CLIP scores) of pictures drawn by both."""
    prompts = [prompt.text for prompt in read_prompts(BUNDLED)]
    prompts = prompts[:: len(prompts) // PICTURES][:PICTURES]
    theirs = _draw(located, prompts, networks, lambda x, t, text: networks.denoise(x, t, text, {}))
    ours = _draw(located, prompts, runtime, lambda x, t, text: runtime.denoise(x, t, text, None))
    judge = matcher(None)
    texts = judge.texts(prompts)
    scores = [clip_scores(judge.pictures(pictures).vectors, texts) for pictures in (theirs, ours)]
    return min(map(_psnr, theirs, ours)), abs(float((scores[1] - scores[0]).mean()))


def _draw(
    located: Located,
    prompts: Sequence[str],
    model: Networks | Runtime,
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> list[Image.Image]:
    """One picture a prompt with DDIM (Song et al. 2021) and classifier-free guidance, from seeds of their own."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(located.family.scheduler_config(located.folder))
    scheduler.set_timesteps(STEPS)
    tokens = located.family.tokens(located.family.tokenizer(located.folder), [*prompts, *[""] * len(prompts)])
    text = model.encode_text(tokens).cpu()
    latents = _latents(model, len(prompts), "pictures") * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        rows = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        given, plain = denoise(rows, timestep.float().expand(len(rows)), text).cpu().chunk(2)
        latents = scheduler.step(plain + GUIDANCE * (given - plain), timestep, latents).prev_sample
    pixels = (model.decode(latents).cpu() / 2 + 0.5).clamp(0, 1).nan_to_num()
    return [Image.fromarray(picture) for picture in (pixels * PEAK).round().byte().permute(0, 2, 3, 1).numpy()]


def _latents(model: Networks | Runtime, batch: int, *parts: float | str) -> Tensor:
    """Standard normal, the same for the same words. [B, C, h, w]"""
    channels, height, width = model.geometry.latents(None, None)
    return torch.randn(batch, channels, height, width, generator=generator("gate", *map(str, parts)))


def _relative(compared: Compared) -> float:
    """The largest |difference| / |PyTorch|; inf where there are numbers that are none."""
    values = [float((ours.cpu() - theirs).norm() / theirs.norm().clamp(min=1e-12)) for theirs, ours in compared]
    return max(value if np.isfinite(value) else float("inf") for value in values)


def _largest(compared: Compared) -> float:
    values = [float((ours.cpu() - theirs).abs().max()) for theirs, ours in compared]
    return max(value if np.isfinite(value) else float("inf") for value in values)


def _psnr(one: Image.Image, two: Image.Image) -> float:
    """10 log10(255² / mean squared error), in dB; 99 for equal pictures."""
    error = np.square(np.asarray(one, float) - np.asarray(two, float)).mean()
    return float(min(99.0, 10 * np.log10(PEAK**2 / error))) if error else 99.0


def _judged(figures: Figures, bounds: Bounds) -> list[tuple[str, bool]]:
    """Each figure that has a bound, in words, and whether it is within it."""
    values = asdict(figures)
    judged = []
    for name in (field.name for field in fields(Figures) if field.name.endswith("_relative")):
        judged.append((f"{name} {values[name]:.2g}, at most {bounds.relative:g}", values[name] <= bounds.relative))
    judged.append((f"psnr {figures.psnr:.1f} dB, at least {bounds.psnr:g}", figures.psnr >= bounds.psnr))
    clip = f"clip_difference {figures.clip_difference:.2f}, at most {bounds.clip_difference:g}"
    return [*judged, (clip, figures.clip_difference <= bounds.clip_difference)]
