"""The two loops that are compared: raysd's own, and the shortest PyTorch loop that trains the same module."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import caches
from raysd.config import TrainingSpec, load, override
from raysd.data.sampler import Sampler
from raysd.diffusion import add_noise, sample_posterior
from raysd.methods import METHODS, TrainedModule
from raysd.models import family_of
from raysd.train.batches import Batches, Source
from raysd.train.build import build_engine
from raysd.train.engine import AUTOCAST, Engine
from raysd.train.loop import training_steps

ENDLESS = 10**9


@dataclass(frozen=True)
class Task:
    """A model, filled caches, and how to train: picklable, for other processes."""

    base: Path
    root: Path
    pictures: int
    spec: TrainingSpec

    def changed(self, **changes: Any) -> "Task":
        """The same with other settings; `__` in a keyword stands for the dot of a path."""
        paths = {path.replace("__", "."): value for path, value in changes.items()}
        return Task(self.base, self.root, self.pictures, override(self.spec, paths))


def spec_of(kind: str, batch: int, resolution: int, precision: str = "fp32") -> TrainingSpec:
    """Plain settings: AdamW at a constant rate, gradients clipped at 1, no extras of the loss."""
    rank = {"rank": 4} if kind == "lora" else {}
    return load(
        TrainingSpec,
        {
            "data": {"source": "made-up", "resolution": resolution},
            "method": {"kind": kind, **rank},
            "optim": {"steps": ENDLESS, "batch_size": batch, "lr": 1e-5},
            "scale": {"precision": precision},
        },
    )


def raysd_loop(task: Task, device: torch.device, rank: int = 0, world: int = 1) -> Iterator[float]:
    """raysd's steps over the caches, without Ray; yields losses."""
    return raysd_training(task, device, rank, world)[1]


def raysd_training(task: Task, device: torch.device, rank: int = 0, world: int = 1) -> tuple[Engine, Iterator[float]]:
    """The engine, and the losses of its steps."""
    family, spec = family_of(task.base), task.spec
    schedule, method = family.noise_schedule(task.base), METHODS[spec.method.kind]
    engine = build_engine(_module(task, device, world), spec, device=device, rank=rank, world=world)
    source = Source(*caches.opened(task.root), family.latent_scale(task.base))
    sampler = Sampler(task.pictures, spec.optim.batch_size, spec.seed)
    items = caches.items(task.pictures)
    batches = Batches(items, caches.EMPTY, source, sampler, schedule, spec, rank, world)
    steps = training_steps(engine, method, batches, schedule, spec, None, 0, ENDLESS)
    return engine, (record.loss for record in steps)


def bare_loop(task: Task, device: torch.device, parallel: bool = False) -> Iterator[float]:
    """One process, all latents and embeddings in memory, torch's fused AdamW; yields losses.

    With `parallel` torch's DistributedDataParallel averages the gradients of the default group's ranks.
    """
    spec, optim = task.spec, task.spec.optim
    denoiser = _module(task, device, 1).denoiser
    if parallel:
        denoiser = nn.parallel.DistributedDataParallel(denoiser)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, optim.lr, optim.betas, optim.eps, optim.weight_decay, fused=True)
    draw = BareBatches(task, device)
    while True:
        noisy, noise, timesteps, text = draw(optim.batch_size)
        with _autocast(spec, device):
            predicted = denoiser(noisy, timesteps, text).sample
        loss = nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, optim.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


class BareBatches:
    """Random pictures with fresh noise, all tensors on the device from the start."""

    def __init__(self, task: Task, device: torch.device):
        family = family_of(task.base)
        self.moments, self.text = (t.to(device) for t in caches.in_memory(task.root, task.pictures))
        self.alphas = family.noise_schedule(task.base).alphas_cumprod.to(device)
        self.scale = family.latent_scale(task.base)
        self.layout = torch.channels_last if task.spec.scale.channels_last else torch.contiguous_format

    def __call__(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, noise, timesteps, embeddings."""
        device = self.moments.device
        chosen = torch.randint(len(self.moments), (size,), device=device)
        moments = self.moments[chosen]
        noise = torch.randn_like(moments[:, :4])
        timesteps = torch.randint(len(self.alphas), (size,), device=device)
        latents = sample_posterior(moments, torch.randn_like(noise), *self.scale)
        noisy = add_noise(latents, noise, self.alphas, timesteps).contiguous(memory_format=self.layout)
        return noisy, noise, timesteps, self.text[chosen]


def _module(task: Task, device: torch.device, world: int) -> TrainedModule:
    """The module as a raysd worker prepares it (train/worker.py) before the engine takes it."""
    scale = task.spec.scale
    module = METHODS[task.spec.method.kind].build(family_of(task.base), task.base, task.spec).to(device)
    if scale.channels_last:
        module.layout = torch.channels_last
        if world == 1 and scale.zero_stage == 0:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _autocast(spec: TrainingSpec, device: torch.device) -> Any:
    dtype = AUTOCAST.get(spec.scale.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
