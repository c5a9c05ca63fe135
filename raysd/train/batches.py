"""From the frozen data of a run and the caches to micro-batches with their randomness. Shapes as in methods/base.py."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from raysd.config.training import TrainingSpec
from raysd.data.cache import TensorCache
from raysd.data.sampler import Draw, Sampler, share
from raysd.diffusion import sample_posterior
from raysd.methods import Batch
from raysd.models import NoiseSchedule
from raysd.seeding import generator
from raysd.train.threads import preparing


@dataclass(frozen=True)
class Item:
    """One picture of a run."""

    latents: tuple[str, ...]  # cache keys of its variants
    caption: str
    text: str  # cache key of the caption
    path: str
    example: str  # sha256 of the file's bytes


class Source:
    """Latent moments and text of items, from the caches. Text is token ids where the method trains the text encoder."""

    def __init__(
        self,
        latents: TensorCache,
        text: TensorCache | dict[str, Tensor],
        scale: tuple[float, float],
    ):
        self.latents, self.text, self.scale = latents, text, scale

    def moments(self, keys: Sequence[str]) -> Tensor:
        return torch.stack(self.latents.read(keys))

    def texts(self, keys: Sequence[str]) -> Tensor:
        if isinstance(self.text, dict):
            return torch.stack([self.text[key] for key in keys])
        return torch.stack(self.text.read(keys))


class Batches:
    """The micro-batches of this rank, step by step; the next step's are read while the current one trains."""

    def __init__(
        self,
        items: Sequence[Item],
        empty: str,
        source: Source,
        sampler: Sampler,
        schedule: NoiseSchedule,
        spec: TrainingSpec,
        rank: int,
        world: int,
    ):
        self.items, self.empty, self.source, self.sampler = items, empty, source, sampler
        self.spec, self.rank, self.world = spec, rank, world
        self.timesteps = len(schedule.alphas_cumprod)
        self._reader = preparing(1, "batches")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def of(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step `step` (from 0)."""
        ready = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._reader.submit(self._make, step + 1))
        return ready

    def _make(self, step: int) -> list[Batch]:
        parts = share(self.sampler.batch(step), self.rank, self.world, self.spec.optim.micro_batch)
        return [self._batch(step, part) for part in parts]

    def _batch(self, step: int, draws: Sequence[Draw]) -> Batch:
        moments = self.source.moments([self.items[d.example].latents[d.variant] for d in draws])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        rows = [self._draw(step, draw, shape) for draw in draws]
        texts = [self.empty if row.dropped else self.items[d.example].text for d, row in zip(draws, rows, strict=True)]
        scaling, shift = self.source.scale
        return Batch(
            latents=sample_posterior(moments, torch.stack([row.posterior for row in rows]), scaling, shift),
            noise=torch.stack([row.noise for row in rows]),
            timesteps=torch.tensor([row.timestep for row in rows]),
            text=self.source.texts(texts),
        )

    def _draw(self, step: int, draw: Draw, shape: tuple[int, ...]) -> "Randomness":
        loss = self.spec.loss
        return draw_randomness(
            (self.spec.seed, "step", step, draw.index), shape, self.timesteps, loss.caption_dropout, loss.noise_offset
        )


@dataclass(frozen=True)
class Randomness:
    """The draws of one sample in one step."""

    dropped: bool
    timestep: int
    posterior: Tensor  # [C, h, w]
    noise: Tensor  # [C, h, w]


def draw_randomness(
    seed: tuple[int | str, ...], shape: tuple[int, ...], timesteps: int, caption_dropout: float, noise_offset: float
) -> Randomness:
    """All draws of a sample from one generator, in this order: caption dropout, timestep, posterior, noise, offset.

    The offset is a constant for each channel, which lets overall brightness move (Guttenberg 2023).
    """
    chooser = generator(*seed)
    dropped = torch.rand((), generator=chooser).item() < caption_dropout
    timestep = int(torch.randint(timesteps, (), generator=chooser))
    posterior = torch.randn(shape, generator=chooser)
    noise = torch.randn(shape, generator=chooser)
    if noise_offset:
        noise = noise + noise_offset * torch.randn((shape[0], 1, 1), generator=chooser)
    return Randomness(dropped, timestep, posterior, noise)
