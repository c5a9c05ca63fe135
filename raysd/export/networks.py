"""A model's networks in PyTorch as they are exported, and as what an export is compared with.

Shapes: B pictures, C latent channels, h x w latent size, L tokens, D width of the text encoder, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from raysd.export.adapters import DOWN, UP, Pair, adaptable, attach, merge, read_adapter
from raysd.references import Located

BATCH, RANK = 2, 2
"""Of the tensors that graphs are traced with; both are free in the graph. 1 would be taken for a constant."""
TRACED_BATCH = 63
"""diffusers copies larger batches before it enlarges them, a matter of memory layout: tracing needs to know that this one
is not. The graph is the same for any batch."""


@dataclass(frozen=True)
class Graph:
    """One network to export: inputs by name with the axes that stay free, and tensors to trace it with."""

    name: str
    module: nn.Module
    example: tuple[Any, ...]
    free: tuple[Any, ...]
    inputs: tuple[str, ...]
    output: str


class Networks:
    """The networks of a version. A LoRA is merged in; a whole model's denoiser takes adapters as further inputs.

    `dtype` is that of the denoiser and the text encoder; tensors in and out are fp32, but the adapters.
    """

    def __init__(self, located: Located, dtype: torch.dtype = torch.float32):
        self.family = family = located.family
        self.dtype = dtype
        self.geometry = family.geometry(located.folder)
        self.merged = located.lora is not None
        self.denoiser = family.denoiser(located.folder).requires_grad_(False).eval()
        self.autoencoder = family.autoencoder(located.folder)
        self.text_encoder = family.text_encoder(located.folder).requires_grad_(False).eval()
        tokenizer = family.tokenizer(located.folder)
        self.tokens = family.tokens(tokenizer, ["a picture", ""])
        self.targets: list[str] = []
        if located.lora is not None:
            merge(self.denoiser, read_adapter(family, located.lora))
        else:
            self.targets = adaptable(self.denoiser, family.lora_targets)
        self._pairs = attach(self.denoiser, self.targets)
        self.denoiser.to(dtype)
        self.text_encoder.to(dtype)

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timesteps: Tensor, text: Tensor, pairs: Mapping[str, Pair]) -> Tensor:
        """[B, C, h, w], [B], [B, L, D] -> [B, C, h, w], with an adapter or with none of its pairs."""
        return self._denoise(self.denoiser, latents, timesteps, text, pairs)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W]"""
        return self.family.pixels(self.autoencoder, latents)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2C, h, w]"""
        return self.family.moments(self.autoencoder, pixels)

    @torch.inference_mode()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]"""
        return self._embed(self.text_encoder, tokens)

    def random_adapter(self, seed: int, rank: int = 4) -> dict[str, Pair]:
        """An adapter of random weights that changes what the denoiser says by about as much as a trained one."""
        chance = torch.Generator().manual_seed(seed)
        pairs = {}
        for name in self.targets:
            width, height = self._sides(name)
            down = torch.randn(rank, width, generator=chance) / width**0.5
            pairs[name] = Pair(down, torch.randn(height, rank, generator=chance) / rank**0.5)
        return pairs

    def graphs(self) -> list[Graph]:
        """What is exported."""
        return [self._denoiser(), self._decoder(), self._encoder(), self._text_encoder()]

    def _denoiser(self) -> Graph:
        latents, (batch, *free) = self._latents(), self._free(self.geometry.unit // self.geometry.factor)
        text = self.encode_text(self.tokens).clone()
        sides = [self._sides(name) for name in self.targets]
        down = [torch.zeros(RANK, width, dtype=self.dtype) for width, _ in sides]
        up = [torch.zeros(height, RANK, dtype=self.dtype) for _, height in sides]
        rank = Dim("rank")
        names = [*(name + DOWN for name in self.targets), *(name + UP for name in self.targets)]
        return Graph(
            "denoiser",
            _Calling(self.denoiser, self._traced),
            (latents, torch.tensor([1.0, 999.0]), text, down, up),
            (
                (
                    {0: batch, 2: free[0], 3: free[1]},
                    {0: batch},
                    {0: batch},
                    [{0: rank}] * len(down),
                    [{1: rank}] * len(up),
                ),
            ),
            ("latents", "timesteps", "conditioning", *names),
            "output",
        )

    def _traced(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        down: list[Tensor],
        up: list[Tensor],
    ) -> Tensor:
        pairs = {name: Pair(*sides) for name, *sides in zip(self.targets, down, up, strict=True)}
        return self._denoise(denoiser, latents, timesteps, text, pairs)

    def _denoise(
        self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor, pairs: Mapping[str, Pair]
    ) -> Tensor:
        self._pairs.clear()
        self._pairs.update(pairs)
        return self.family.predict(denoiser, latents.to(self.dtype), timesteps, text.to(self.dtype)).float()

    def _embed(self, text_encoder: nn.Module, tokens: Tensor) -> Tensor:
        return self.family.conditioning(text_encoder, tokens).float()

    def _decoder(self) -> Graph:
        batch, height, width = self._free(1)
        module = _Calling(self.autoencoder, self.family.pixels)
        free = {0: batch, 2: height, 3: width}
        return Graph("decoder", module, (self._latents(),), ((free,),), ("latents",), "pixels")

    def _encoder(self) -> Graph:
        batch, height, width = self._free(self.geometry.factor)
        module = _Calling(self.autoencoder, self.family.moments)
        side = self.geometry.factor * 16
        example, free = torch.zeros(BATCH, 3, side, 2 * side), {0: batch, 2: height, 3: width}
        return Graph("encoder", module, (example,), ((free,),), ("pixels",), "moments")

    def _text_encoder(self) -> Graph:
        module = _Calling(self.text_encoder, self._embed)
        return Graph("text_encoder", module, (self.tokens,), (({0: Dim("batch")},),), ("tokens",), "conditioning")

    def _latents(self) -> Tensor:
        """Sides that differ, so that neither is taken for the other."""
        unit, side = self.geometry.unit // self.geometry.factor, self.geometry.size // self.geometry.factor
        return torch.zeros(BATCH, self.geometry.channels, side, side + unit)

    def _free(self, unit: int) -> list[Any]:
        """Batch, height and width, the sides in multiples of `unit`."""
        return [
            Dim("batch", max=TRACED_BATCH),
            *(unit * Dim(name) if unit > 1 else Dim(name) for name in ("height", "width")),
        ]

    def _sides(self, name: str) -> tuple[int, int]:
        layer: Any = self.denoiser.get_submodule(name)
        return layer.in_features, layer.out_features


class _Calling(nn.Module):
    """A network called by one of its family's functions."""

    def __init__(self, network: nn.Module, call: Any):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *arguments: Any) -> Any:
        return self.call(self.network, *arguments)
