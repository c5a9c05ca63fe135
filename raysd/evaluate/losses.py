"""The loss of a model on pictures, measured so that it means something: fixed noise, fixed timesteps, no weights.

Shapes: N pictures, B of a batch, C latent channels, h x w latent size, T training timesteps, E timesteps a band.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysd.diffusion import sample_posterior
from raysd.evaluate.intervals import Interval, bootstrap_difference, bootstrap_mean
from raysd.methods.base import Batch, TrainedModule, denoising_errors
from raysd.references import Located
from raysd.seeding import generator

ADAPTER = "measured"
BANDS = 4
Pictures = Sequence[tuple[Tensor, str]]
"""Pixels [3, H, W] in [-1, 1] and caption of each picture, all of one size."""
Errors = NDArray[np.float64]
"""[N, BANDS, E]"""


@dataclass(frozen=True)
class Losses:
    """Mean squared errors with bootstrap intervals over pictures; band 0 is the least noisy one."""

    validation: Interval
    bands: tuple[Interval, ...]
    train: Interval | None
    train_bands: tuple[Interval, ...]
    gap: Interval | None
    """Validation minus train: what the model knows of its training pictures alone."""


class Meter:
    """A located model, its adapter on, ready to be measured."""

    def __init__(self, located: Located):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.family = located.family
        self.autoencoder = self.family.autoencoder(located.folder).to(self.device)
        self.tokenizer = self.family.tokenizer(located.folder)
        self.text_encoder = self.family.text_encoder(located.folder).eval().to(self.device)
        self.schedule = self.family.noise_schedule(located.folder)
        self.scale = self.family.latent_scale(located.folder)
        self.model = TrainedModule(self.family, self._denoiser(located)).eval().to(self.device)

    def _denoiser(self, located: Located) -> nn.Module:
        denoiser = self.family.denoiser(located.folder)
        if located.lora is not None:
            self.family.add_adapter(denoiser, located.lora, ADAPTER)
            self.family.use_adapter(denoiser, ADAPTER)
        return denoiser

    @torch.no_grad()
    def errors(
        self, pictures: Pictures, each: int, batch: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> Errors:
        """Squared error of each picture at `each` timesteps of each band. [N, BANDS, each]

        Noise depends on the picture's place and the timestep alone, latents are the posterior's means: the same weights
        give the same numbers. `progress(done, total)` counts forward passes.
        """
        steps = middles(len(self.schedule.alphas_cumprod), BANDS * each)
        latents, text = self._encode(pictures, batch)
        pairs = [(place, step) for place in range(len(pictures)) for step in steps]
        parts: list[Tensor] = []
        for first in range(0, len(pairs), batch):
            chunk = pairs[first : first + batch]
            parts.append(self._errors(chunk, latents, text))
            if progress is not None:
                progress(first + len(chunk), len(pairs))
        return torch.cat(parts).double().numpy().reshape(len(pictures), BANDS, each)

    def _errors(self, pairs: Sequence[tuple[int, int]], latents: Tensor, text: Tensor) -> Tensor:
        places = [place for place, _ in pairs]
        made = Batch(
            latents=latents[places],
            noise=torch.stack([fixed_noise(place, step, latents.shape[1:]) for place, step in pairs]),
            timesteps=torch.tensor([step for _, step in pairs]),
            text=text[places],
        )
        return denoising_errors(self.model, made.to(self.device), self.schedule, self.schedule.prediction).cpu()

    def _encode(self, pictures: Pictures, batch: int) -> tuple[Tensor, Tensor]:
        """Latents [N, C, h, w] and text embeddings [N, L, D], on the CPU."""
        latents, text = [], []
        for first in range(0, len(pictures), batch):
            part = pictures[first : first + batch]
            pixels = torch.stack([pixels for pixels, _ in part]).to(self.device)
            moments = self.family.moments(self.autoencoder, pixels)
            mean = torch.zeros_like(moments[:, : moments.shape[1] // 2])
            latents.append(sample_posterior(moments, mean, *self.scale).cpu())
            tokens = self.family.tokens(self.tokenizer, [caption for _, caption in part])
            text.append(self.family.conditioning(self.text_encoder, tokens.to(self.device)).cpu())
        return torch.cat(latents), torch.cat(text)


def loss_terms(located: Located) -> tuple[object, ...]:
    """What a model's loss is the error of, and on which scale: losses of models that differ here do not compare."""
    schedule = located.family.noise_schedule(located.folder)
    return (schedule.prediction, *located.family.latent_scale(located.folder))


def losses(validation: Errors, train: Errors | None, seed: int = 0) -> Losses:
    """Sum up the errors of held-out pictures and, where there are any, of training pictures measured the same way."""
    per_picture = validation.mean(axis=(1, 2))
    return Losses(
        validation=bootstrap_mean(per_picture, seed=seed),
        bands=_bands(validation, seed),
        train=None if train is None else bootstrap_mean(train.mean(axis=(1, 2)), seed=seed),
        train_bands=() if train is None else _bands(train, seed),
        gap=None if train is None else bootstrap_difference(per_picture, train.mean(axis=(1, 2)), seed=seed),
    )


def middles(length: int, count: int) -> list[int]:
    """The middles of `count` equal bands of [0, length)."""
    return [int((band + 0.5) * length / count) for band in range(count)]


def fixed_noise(place: int, timestep: int, shape: torch.Size) -> Tensor:
    """The noise by which picture `place` is judged at a timestep, of any model and at any time."""
    return torch.randn(shape, generator=generator("validation", place, timestep))


def _bands(errors: Errors, seed: int) -> tuple[Interval, ...]:
    return tuple(bootstrap_mean(errors[:, band].mean(axis=1), seed=seed) for band in range(errors.shape[1]))
