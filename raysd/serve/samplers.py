"""Samplers as tables: one row of coefficients a denoising step, so that requests of different samplers share a batch.

A step is linear in what it knows. With x the sample, m the denoiser's output, D_0 the clean latents that it means, D_1
and D_2 those of the two steps before, l the sample that the former step kept, and n fresh noise:

    D_0 = x_of_x x + x_of_m m
    x'  = next . (x, l, D_0, D_1, D_2, n)
    l'  = kept . (x, l, D_0, D_1, D_2)

Timesteps and noise levels are those of diffusers' schedulers, from the model's own scheduler configuration; dynamic
thresholding and clipping are not linear and are left out, as Stable Diffusion's configurations do.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raysd.errors import RequestError

KNOWN = 6
"""What a step is a combination of: x, l, D_0, D_1, D_2, n."""


class Row(NamedTuple):
    """One step. `scale` multiplies the sample before the denoiser sees it."""

    timestep: float
    scale: float
    x_of_x: float
    x_of_m: float
    next: tuple[float, ...]
    kept: tuple[float, ...]


@dataclass(frozen=True)
class Timetable:
    """The steps of one request.

    `levels[i]` is what the sample before step i has of the clean latents and of the noise; there is one more at the end.
    """

    rows: tuple[Row, ...]
    levels: tuple[tuple[float, float], ...]
    start: float
    """The standard deviation of the noise that drawing from nothing starts with."""
    noisy: bool
    """Whether steps take fresh noise."""


def timetable(sampler: str, config: Mapping[str, Any], steps: int, strength: float = 1.0) -> Timetable:
    """The steps of `sampler` for a model with this scheduler configuration; below strength 1 the last ones alone.

    Raises RequestError for a sampler that does not fit the model.
    """
    return _timetable(sampler, json.dumps(dict(config), sort_keys=True, default=str), steps, strength)


@functools.lru_cache(512)
def _timetable(sampler: str, config: str, steps: int, strength: float) -> Timetable:
    values = {**json.loads(config), "thresholding": False, "clip_sample": False}
    flow = values.get("_class_name", "").startswith("FlowMatch")
    if flow != (sampler == "flow_euler"):
        fits = "flow_euler alone" if flow else "any sampler but flow_euler"
        raise RequestError(f"sampler {sampler}: the model takes {fits}")
    if sampler == "lcm" and values.get("_class_name") != "LCMScheduler":
        raise RequestError("sampler lcm: is for consistency models, whose scheduler is LCMScheduler; take another")
    begin = steps - max(1, min(steps, int(steps * strength)))
    return SAMPLERS[sampler](values, steps, begin)


def _ddim(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """Song et al. 2021, eq. 12, with eta 0."""
    from diffusers import DDIMScheduler

    scheduler = _scheduler(DDIMScheduler, config, steps)
    times = [int(t) for t in scheduler.timesteps]
    stride = scheduler.config.num_train_timesteps // steps
    alphas = [float(a) for a in scheduler.alphas_cumprod]
    rows, levels = [], []
    for t in times[begin:]:
        after = alphas[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        a, s = math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])
        a_after, s_after = math.sqrt(after), math.sqrt(1 - after)
        # eps = (x - a D) / s, whatever the model predicts
        to = (s_after / s, 0, a_after - s_after * a / s, 0, 0, 0)
        rows.append(Row(t, 1.0, *_clean(config, a, s), to, _NOTHING))
        levels.append((a, s))
    return Timetable(tuple(rows), (*levels, (1.0, 0.0)), 1.0, False)


def _euler(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """Karras et al. 2022, algorithm 2 without churn: x' = x + (x - D) / sigma (sigma' - sigma)."""
    from diffusers import EulerDiscreteScheduler

    return _exploding(_scheduler(EulerDiscreteScheduler, config, steps), config, begin, ancestral=False)


def _euler_ancestral(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """Euler to a lower noise level, and noise on top (k-diffusion, sample_euler_ancestral)."""
    from diffusers import EulerAncestralDiscreteScheduler

    return _exploding(_scheduler(EulerAncestralDiscreteScheduler, config, steps), config, begin, ancestral=True)


def _exploding(scheduler: Any, config: dict[str, Any], begin: int, ancestral: bool) -> Timetable:
    """Samples are clean latents + sigma noise; the denoiser wants them scaled to unit variance."""
    sigmas = [float(s) for s in scheduler.sigmas]
    rows = []
    for number in range(begin, len(scheduler.timesteps)):
        sigma, after = sigmas[number], sigmas[number + 1]
        up = math.sqrt(after**2 * (sigma**2 - after**2)) / sigma if ancestral else 0.0
        down = math.sqrt(max(after**2 - up**2, 0.0))
        scale = 1 / math.sqrt(sigma**2 + 1)
        # In unit variance the level is (scale, scale sigma); the sample there is scale x.
        of_x, of_m = _clean(config, scale, scale * sigma)
        to = (down / sigma, 0, 1 - down / sigma, 0, 0, up)
        rows.append(Row(float(scheduler.timesteps[number]), scale, of_x * scale, of_m, to, _NOTHING))
    levels = [(1.0, sigma) for sigma in sigmas[begin:]]
    return Timetable(tuple(rows), tuple(levels), float(scheduler.init_noise_sigma), ancestral)


def _dpmpp_2m(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """DPM-Solver++ (2M), midpoint (Lu et al. 2022, algorithm 2)."""
    from diffusers import DPMSolverMultistepScheduler

    exact = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    scheduler = _scheduler(DPMSolverMultistepScheduler, config | exact, steps)
    levels, ratios = _preserving(scheduler.sigmas)
    rows = []
    for number in range(begin, steps):
        (a, s), (a_after, s_after) = levels[number], levels[number + 1]
        h = ratios[number + 1] - ratios[number]
        phi = math.expm1(-h)
        last = number == steps - 1 and (
            scheduler.config.euler_at_final
            or (scheduler.config.lower_order_final and steps < 15)
            or scheduler.config.final_sigmas_type == "zero"
        )
        d0, d1 = -a_after * phi, 0.0
        if number > begin and not last:
            slope = 0.5 * -a_after * phi * h / (ratios[number] - ratios[number - 1])
            d0, d1 = d0 + slope, -slope
        to = (s_after / s, 0, d0, d1, 0, 0)
        rows.append(Row(float(scheduler.timesteps[number]), 1.0, *_clean(config, a, s), to, _NOTHING))
    return Timetable(tuple(rows), tuple(levels[begin:]), 1.0, False)


def _unipc(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """UniPC-2, B(h) = expm1(h), of the clean latents (Zhao et al. 2023, algorithms 5 and 6).

    A step first corrects its sample by what the denoiser now says of it (this is kept), then predicts the next.
    """
    from diffusers import UniPCMultistepScheduler

    exact = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True}
    scheduler = _scheduler(UniPCMultistepScheduler, config | exact, steps)
    disabled = set(scheduler.config.disable_corrector)
    levels, ratios = _preserving(scheduler.sigmas)
    rows = []
    for number in range(begin, steps):
        order = min(2, number - begin + 1)
        if scheduler.config.lower_order_final:
            order = min(order, steps - number)
        kept: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0)
        if number > begin and number - 1 not in disabled:
            kept = _corrected(levels, ratios, number, min(2, number - begin))
        past = ratios[number - 1] if order == 2 else None
        of_kept, d0, d1 = _predicted(levels[number], levels[number + 1], ratios[number], ratios[number + 1], past)
        to = [of_kept * value for value in kept]
        to[2] += d0
        to[3] += d1
        a, s = levels[number]
        rows.append(Row(float(scheduler.timesteps[number]), 1.0, *_clean(config, a, s), (*to, 0.0), kept))
    return Timetable(tuple(rows), tuple(levels[begin:]), 1.0, False)


def _predicted(
    here: tuple[float, float], there: tuple[float, float], ratio: float, after: float, past: float | None
) -> tuple[float, float, float]:
    """UniP: the factors of the corrected sample, D_0 and D_1."""
    h = after - ratio
    phi = math.expm1(-h)
    d0, d1 = -there[0] * phi, 0.0
    if past is not None:
        slope = -there[0] * phi * 0.5 * h / (past - ratio)
        d0, d1 = d0 - slope, slope
    return there[1] / here[1], d0, d1


def _corrected(
    levels: Sequence[tuple[float, float]], ratios: Sequence[float], number: int, order: int
) -> tuple[float, ...]:
    """UniC at step `number`: the factors of x, l, D_0 (of this step), D_1 and D_2."""
    (_, s_before), (a, s) = levels[number - 1], levels[number]
    h = ratios[number] - ratios[number - 1]
    phi = math.expm1(-h)
    of_new, of_slope, past = 0.5, 0.0, 1.0
    if order == 2:
        past = (ratios[number - 2] - ratios[number - 1]) / h
        b = phi / -h - 1
        first, second = b / phi, (b / -h - 0.5) * 2 / phi
        # [[1, 1], [past, 1]] (slope, new) = (first, second)
        of_slope = (first - second) / (1 - past)
        of_new = first - of_slope
    gain = -a * phi
    of_past = of_slope / past
    return (0.0, s / s_before, gain * of_new, gain * (1 - of_new - of_past), gain * of_past)


def _flow_euler(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """Euler along a rectified flow (Esser et al. 2024): x = (1 - sigma) clean + sigma noise, m = noise - clean."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = _scheduler(FlowMatchEulerDiscreteScheduler, config, steps)
    sigmas = [float(s) for s in scheduler.sigmas]
    rows = []
    for number in range(begin, steps):
        sigma, after = sigmas[number], sigmas[number + 1]
        to = (after / sigma, 0, 1 - after / sigma, 0, 0, 0)
        rows.append(Row(float(scheduler.timesteps[number]), 1.0, 1.0, -sigma, to, _NOTHING))
    return Timetable(tuple(rows), tuple((1 - s, s) for s in sigmas[begin:]), 1.0, False)


def _lcm(config: dict[str, Any], steps: int, begin: int) -> Timetable:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3)."""
    from diffusers import LCMScheduler

    most = int(config.get("original_inference_steps", LCM_STEPS))
    if steps > most:
        raise RequestError(f"steps: at most {most} with sampler lcm")
    scheduler = _scheduler(LCMScheduler, config, steps)
    times = [int(t) for t in scheduler.timesteps]
    alphas = [float(a) for a in scheduler.alphas_cumprod]
    rows, levels = [], []
    for number in range(begin, steps):
        a, s = math.sqrt(alphas[times[number]]), math.sqrt(1 - alphas[times[number]])
        skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(times[number]))
        after = math.sqrt(alphas[times[number + 1]]) if number < steps - 1 else 1.0
        to = (after * skip, 0, after * out, 0, 0, math.sqrt(max(1 - after**2, 0.0)))
        rows.append(Row(times[number], 1.0, *_clean(config, a, s), to, _NOTHING))
        levels.append((a, s))
    return Timetable(tuple(rows), (*levels, (1.0, 0.0)), 1.0, True)


SAMPLERS: dict[str, Callable[[dict[str, Any], int, int], Timetable]] = {
    "ddim": _ddim,
    "euler": _euler,
    "euler_a": _euler_ancestral,
    "dpmpp_2m": _dpmpp_2m,
    "unipc": _unipc,
    "flow_euler": _flow_euler,
    "lcm": _lcm,
}

LCM_STEPS = 50
"""Those that a consistency model was distilled with, where its configuration does not say."""
_NOTHING = (0.0,) * (KNOWN - 1)


def _scheduler(kind: Any, config: dict[str, Any], steps: int) -> Any:
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def _clean(config: Mapping[str, Any], a: float, s: float) -> tuple[float, float]:
    """(x_of_x, x_of_m) for a sample a clean + s noise: eps, or v = a eps - s clean (Salimans & Ho 2022)."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "epsilon":
        return 1 / a, -s / a
    if prediction == "v_prediction":
        return a, -s
    raise RequestError(f"the model predicts {prediction!r}: epsilon and v_prediction can be served")


def _preserving(sigmas: Sequence[Any]) -> tuple[list[tuple[float, float]], list[float]]:
    """Levels (alpha, sigma) with alpha^2 + sigma^2 = 1, and log(alpha / sigma), from noise-to-signal ratios."""
    levels, ratios = [], []
    for value in sigmas:
        sigma = float(value)
        alpha = 1 / math.sqrt(sigma**2 + 1)
        levels.append((alpha, alpha * sigma))
        ratios.append(-math.log(sigma) if sigma else math.inf)
    return levels, ratios
