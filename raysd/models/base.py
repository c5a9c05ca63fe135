"""What a model family is: everything that the trainer and the pictures need to know about one kind of model.

Shapes: B pictures, C latent channels, h x w latent size, L tokens, D width of the text encoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class NoiseSchedule:
    """The training noise: alphas_cumprod [T] and what the denoiser predicts."""

    alphas_cumprod: Tensor
    prediction: str


class Family(Protocol):
    """A kind of diffusion model in a diffusers folder. Components load one by one: a worker takes what it needs."""

    name: str
    pipelines: tuple[str, ...]
    """Pipeline classes whose folders belong to this family."""
    lora_targets: tuple[str, ...]
    """Modules of the denoiser that get an adapter by default."""

    def import_libraries(self) -> None:
        """What encoding and drawing import, seconds of it: for a thread that has nothing else to do."""
        ...

    def denoiser(self, folder: Path) -> nn.Module: ...

    def autoencoder(self, folder: Path) -> nn.Module: ...

    def text_encoder(self, folder: Path) -> nn.Module: ...

    def tokenizer(self, folder: Path) -> Any: ...

    def noise_schedule(self, folder: Path) -> NoiseSchedule: ...

    def latent_scale(self, folder: Path) -> tuple[float, float]:
        """(scaling factor, shift factor) of the latents, from the autoencoder's configuration."""
        ...

    def moments(self, autoencoder: nn.Module, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the posterior: [B, 3, H, W] in [-1, 1] -> [B, 2C, h, w]."""
        ...

    def tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        """[B, L] token ids, padded and cut to the tokenizer's length."""
        ...

    def conditioning(self, text_encoder: nn.Module, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]"""
        ...

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        """[B, C, h, w], [B], [B, L, D] -> [B, C, h, w]"""
        ...

    def pipeline(self, folder: Path, lora: Path | None = None, **components: Any) -> Any:
        """A diffusers pipeline that draws with the folder's model; `components` replace its own."""
        ...

    def save_lora(self, tensors: dict[str, Tensor], metadata: dict[str, Any], folder: Path) -> None:
        """Write adapter tensors (names below the denoiser, `….lora_A.weight`) as the file that diffusers loads."""
        ...

    def lora_config(self, lora: Path) -> dict[str, Any]:
        """What an adapter file of `save_lora` says of itself: `r`, `lora_alpha`, `target_modules`."""
        ...
