"""A model's networks in PyTorch, for drawing."""

import threading
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raysd.models import Family

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Backend(Protocol):
    """One base and the adapters put on it, shared by threads. Tensors in and out are fp32, on the CPU or `device`.

    Raises torch.OutOfMemoryError for what does not fit, whatever runs the networks.
    """

    device: torch.device

    def denoise(self, latents: Tensor, timesteps: Tensor, conditioning: Tensor, adapter: str | None) -> Tensor:
        """[B, C, h, w], [B], [B, L, D] -> the denoiser's output [B, C, h, w], with that adapter or bare."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pictures [B, 3, H, W], about [-1, 1]."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> mean and log-variance of the latents' posterior [B, 2C, h, w]."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]"""
        ...

    def add_adapter(self, name: str, lora: Path) -> None: ...

    def remove_adapter(self, name: str) -> None: ...


class TorchBackend:
    """The family's networks on one device. `precision` is the arithmetic's: fp32, bf16 or fp16."""

    def __init__(
        self, family: Family, folder: Path, device: torch.device, precision: str = "fp32", *, compiled: bool = False
    ):
        self.device, self.family = device, family
        self.dtype = PRECISIONS[precision]
        self._denoiser = self._place(family.denoiser(folder))
        self._autoencoder = self._place(family.autoencoder(folder), at_least=torch.bfloat16)
        for network in (self._denoiser, self._autoencoder):
            # Convolutions run a fifth to a third faster so, on CPUs and on tensor cores.
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._text_encoder = self._place(family.text_encoder(folder))
        self._call: Any = torch.compile(self._denoiser, dynamic=True) if compiled else self._denoiser
        self._adapter: str | None = None
        self._turn = threading.Lock()  # an adapter is put on or taken off between two steps, not within one

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timesteps: Tensor, conditioning: Tensor, adapter: str | None) -> Tensor:
        noisy = latents.to(self.device, self.dtype, memory_format=torch.channels_last)
        text = conditioning.to(self.device, self.dtype)
        with self._turn:
            if adapter != self._adapter:
                self.family.use_adapter(self._denoiser, adapter)
                self._adapter = adapter
            return self.family.predict(self._call, noisy, timesteps.to(self.device), text).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        dtype = next(self._autoencoder.parameters()).dtype
        ready = latents.to(self.device, dtype, memory_format=torch.channels_last)
        return self.family.pixels(self._autoencoder, ready).float()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        ready = pixels.to(self.device, next(self._autoencoder.parameters()).dtype)
        return self.family.moments(self._autoencoder, ready).float()

    @torch.inference_mode()
    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.family.conditioning(self._text_encoder, tokens.to(self.device)).float()

    def add_adapter(self, name: str, lora: Path) -> None:
        with self._turn:
            self.family.add_adapter(self._denoiser, lora, name)
            self._denoiser.to(self.device, self.dtype)
            self._adapter = None

    def remove_adapter(self, name: str) -> None:
        with self._turn:
            self.family.remove_adapter(self._denoiser, name)
            self.family.use_adapter(self._denoiser, None)
            self._adapter = None

    def _place(self, network: torch.nn.Module, at_least: torch.dtype | None = None) -> torch.nn.Module:
        """On the device, frozen. The autoencoder of some models overflows in fp16, so it gets bf16 at least."""
        dtype = at_least if at_least is not None and self.dtype == torch.float16 else self.dtype
        return network.requires_grad_(False).eval().to(self.device, dtype)
