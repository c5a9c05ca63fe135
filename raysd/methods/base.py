"""What a training method is, and the module and the loss that denoising methods share.

Shapes: B pictures, C latent channels, h x w latent size, L tokens, D width of the text encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raysd import diffusion
from raysd.config.training import TrainingSpec
from raysd.models import Family, NoiseSchedule


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank, randomness included: what the loss is computed from."""

    latents: Tensor  # [B, C, h, w], scaled
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    text: Tensor  # [B, L, D] embeddings, or [B, L] token ids where the method trains the text encoder

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})

    def __len__(self) -> int:
        return len(self.timesteps)


class TrainedModule(nn.Module):
    """Everything that one engine trains, in one module: the denoiser and, where it is trained, the text encoder."""

    def __init__(self, family: Family, denoiser: nn.Module, text_encoder: nn.Module | None = None):
        super().__init__()
        self.family, self.denoiser, self.text_encoder = family, denoiser, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The denoiser's prediction. [B, C, h, w]"""
        if self.text_encoder is not None:
            text = self.family.conditioning(self.text_encoder, text)
        return self.family.predict(self.denoiser, noisy, timesteps, text)


class Method(Protocol):
    """What is trained: which parameters move, how a batch becomes a loss, and what a version's files are."""

    kind: str
    lighter: str | None
    """The kind of a method that needs less memory, for who has too little."""

    def check(self, family: Family, folder: Path, spec: TrainingSpec) -> None:
        """Raise RequestError for what cannot be trained on this base, before data are looked at or workers started."""
        ...

    def trains_text(self, spec: TrainingSpec) -> bool:
        """Whether batches carry token ids instead of embeddings."""
        ...

    def build(self, family: Family, folder: Path, spec: TrainingSpec) -> TrainedModule:
        """The module with its trainable parameters, fp32, on the CPU; the same on every rank."""
        ...

    def loss(self, model: Any, batch: Batch, schedule: NoiseSchedule, spec: TrainingSpec) -> Tensor:
        """Weighted loss of each sample. [B]. `model` is called as `TrainedModule.forward`."""
        ...

    def write(self, family: Family, base: Path, weights: Mapping[str, Tensor], spec: TrainingSpec, out: Path) -> None:
        """Write a version's files into `out` from the trained tensors, named as in `build`'s module."""
        ...


def denoising_loss(model: Any, batch: Batch, schedule: NoiseSchedule, spec: TrainingSpec) -> Tensor:
    """Squared error of the prediction, weighted by min-SNR where asked. [B]"""
    prediction = schedule.prediction if spec.loss.prediction == "base" else spec.loss.prediction
    errors = denoising_errors(model, batch, schedule, prediction)
    if spec.loss.min_snr_gamma is None:
        return errors
    ratio = diffusion.snr(schedule.alphas_cumprod, batch.timesteps)
    return errors * diffusion.min_snr_weights(prediction, ratio, spec.loss.min_snr_gamma)


def denoising_errors(model: Any, batch: Batch, schedule: NoiseSchedule, prediction: str) -> Tensor:
    """Squared error of each sample's prediction, unweighted. [B]"""
    alphas = schedule.alphas_cumprod
    noisy = diffusion.add_noise(batch.latents, batch.noise, alphas, batch.timesteps)
    wanted = diffusion.target(prediction, batch.latents, batch.noise, alphas, batch.timesteps)
    return diffusion.squared_error(model(noisy, batch.timesteps, batch.text), wanted)


def published_dtype(spec: TrainingSpec) -> torch.dtype:
    return {"fp16": torch.float16, "fp32": torch.float32}[spec.publish.precision]
