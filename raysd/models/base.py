"""What a model family is: everything that the trainer and the pictures need to know about one kind of model.

Shapes: B pictures, C latent channels, h x w latent size, L tokens, D width of the text encoder.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from raysd.errors import RequestError


@dataclass(frozen=True)
class NoiseSchedule:
    """The training noise: alphas_cumprod [T] and what the denoiser predicts."""

    alphas_cumprod: Tensor
    prediction: str


ADAPTER_ENDING = "lora_weights.safetensors"
"""Of the name of an adapter's file, as diffusers writes and looks for it."""
OUT_OF_SHAPE = 6
"""What a hundredth of a picture's aspect is worth in hundredths of its area, where multiples of `unit` cannot have both."""


@dataclass(frozen=True)
class Geometry:
    """Of pictures and latents: latent channels, pixels a latent, and the sizes in pixels that can be drawn.

    The channels are the autoencoder's: a denoiser may take more, as those for inpainting do.
    """

    channels: int
    factor: int
    size: int
    """Each side, where none is asked for."""
    unit: int
    """Sides are multiples of it."""

    def latents(self, width: int | None, height: int | None) -> tuple[int, int, int]:
        """(C, h, w) for a picture of so many pixels. Raises RequestError for a size that cannot be drawn."""
        for name, side in (("width", width), ("height", height)):
            if side is not None and side % self.unit:
                fits = f"this model draws multiples of {self.unit} pixels; its own size is {self.size}"
                raise RequestError(f"{name} {side}: {fits}")
        return self.channels, (height or self.size) // self.factor, (width or self.size) // self.factor

    def like(self, width: int, height: int, most: int) -> tuple[int, int]:
        """The size that a picture of so many pixels is drawn anew in: (width, height), neither above `most`.

        It has about the picture's aspect, and about the model's own area but no more, as a service may allow no more.
        """
        aspect, sides = math.log(width / height), range(self.unit, most + 1, self.unit)
        sizes = [(wide, high) for wide in sides for high in sides if wide * high <= self.size**2]

        def far(size: tuple[int, int]) -> float:
            wide, high = size
            return OUT_OF_SHAPE * abs(math.log(wide / high) - aspect) - math.log(wide * high)

        return min(sizes, key=far)


class Family(Protocol):
    """A kind of diffusion model in a diffusers folder. Components load one by one: a worker takes what it needs."""

    name: str
    pipelines: tuple[str, ...]
    """Pipeline classes whose folders belong to this family."""
    single_file_prefix: str
    """How names of tensors begin in single-file checkpoints of this family, and of no other."""
    autoencoder_part: str
    """The component of the folder that latents come from: their cache is named by its content."""
    text_parts: tuple[str, ...]
    """The components that conditioning comes from, tokenizers too: the cache of text is named by their content."""
    trained_parts: tuple[tuple[str, str], ...]
    """What may be trained: name in a `TrainedModule`, and the component of the folder and of the pipeline that it is."""
    lora_targets: tuple[str, ...]
    """Modules of the denoiser that get an adapter by default."""

    def import_libraries(self) -> None:
        """What encoding and drawing import, seconds of it: for a thread that has nothing else to do."""
        ...

    def denoiser(self, folder: Path) -> nn.Module: ...

    def autoencoder(self, folder: Path) -> nn.Module: ...

    def text_encoder(self, folder: Path) -> nn.Module: ...

    def blank_denoiser(self, folder: Path) -> nn.Module:
        """From its configuration alone, on whatever device torch's context names."""
        ...

    def blank_text_encoder(self, folder: Path) -> nn.Module: ...

    def text_shape(self, folder: Path) -> tuple[int, int]:
        """(L, D) of `conditioning`, from the configurations."""
        ...

    def tokenizer(self, folder: Path) -> Any: ...

    def noise_schedule(self, folder: Path) -> NoiseSchedule: ...

    def scheduler_config(self, folder: Path) -> dict[str, Any]:
        """The configuration that samplers are made from."""
        ...

    def guidance_width(self, folder: Path) -> int | None:
        """Width of the guidance embedding that the denoiser takes beside the timestep; None: it takes none.

        Models with one were distilled from guided ones (Luo et al. 2023, section 4.2) and draw wrongly without it.
        """
        ...

    def geometry(self, folder: Path) -> Geometry:
        """From the configurations. Raises RequestError where they do not say."""
        ...

    def latent_scale(self, folder: Path) -> tuple[float, float]:
        """(scaling factor, shift factor) of the latents, from the autoencoder's configuration."""
        ...

    def moments(self, autoencoder: nn.Module, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the posterior: [B, 3, H, W] in [-1, 1] -> [B, 2C, h, w]."""
        ...

    def pixels(self, autoencoder: nn.Module, latents: Tensor) -> Tensor:
        """Pictures of scaled latents: [B, C, h, w] -> [B, 3, H, W], about [-1, 1]"""
        ...

    def tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        """[B, L] token ids, padded and cut to the tokenizer's length."""
        ...

    def conditioning(self, text_encoder: nn.Module, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]

        One tensor, and all that the denoiser is told of a prompt. A family with more (pooled embeddings, the picture's size)
        has to widen what carries it: the cache of text, `Batch.text`, the backends' `encode_text` and the exported graphs.
        """
        ...

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        """[B, C, h, w], [B], [B, L, D] -> [B, C, h, w]"""
        ...

    def pipeline(self, folder: Path, lora: Path | None = None, **components: Any) -> Any:
        """A diffusers pipeline that draws with the folder's model; `components` replace its own."""
        ...

    def open_single_file(self, file: Path, configurations: Path | None) -> Any:
        """The diffusers pipeline of a single-file checkpoint. Raises whatever diffusers does.

        Configurations and tokenizer come from that folder, else from the hub's for the layout found.
        """
        ...

    def save_lora(self, tensors: dict[str, Tensor], metadata: dict[str, Any], folder: Path) -> None:
        """Write adapter tensors (names below the denoiser, `….lora_A.weight`) as the file that diffusers loads.

        Its name ends in `ADAPTER_ENDING`. Equal tensors and metadata are equal bytes, in any process.
        """
        ...

    def lora_config(self, lora: Path) -> dict[str, Any]:
        """What an adapter file of `save_lora` says of itself: `r`, `lora_alpha`, `target_modules`."""
        ...

    def add_adapter(self, denoiser: nn.Module, lora: Path, name: str) -> None:
        """Put an adapter file on the denoiser under a name, beside those that are there; none is in use after it."""
        ...

    def use_adapter(self, denoiser: nn.Module, name: str | None) -> None:
        """The denoiser with that adapter, or bare."""
        ...

    def remove_adapter(self, denoiser: nn.Module, name: str) -> None: ...
