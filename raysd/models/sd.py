"""Stable Diffusion 1.x and what is built like it: one CLIP text encoder, a U-Net, a 4-channel autoencoder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from raysd.errors import RequestError
from raysd.models.base import ADAPTER_ENDING, Geometry, NoiseSchedule
from raysd.models.weights import sort_header

LORA_FILE = f"pytorch_{ADAPTER_ENDING}"
CLIP_TOKENS = 77
"""Of a prompt, in every CLIP text encoder."""


class StableDiffusion:
    """The family `sd`. Imports of diffusers and transformers are inside: they take seconds."""

    name = "sd"
    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)
    single_file_prefix = "cond_stage_model."
    autoencoder_part = "vae"
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    trained_parts: tuple[tuple[str, str], ...] = (("denoiser", "unet"), ("text_encoder", "text_encoder"))
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def import_libraries(self) -> None:
        from diffusers import AutoencoderKL, StableDiffusionPipeline  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    def denoiser(self, folder: Path) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32, use_safetensors=True)

    def autoencoder(self, folder: Path) -> nn.Module:
        from diffusers import AutoencoderKL

        model = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, use_safetensors=True)
        return model.requires_grad_(False).eval()

    def text_encoder(self, folder: Path) -> nn.Module:
        from transformers import CLIPTextModel

        return CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
        )

    def blank_denoiser(self, folder: Path) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))

    def blank_text_encoder(self, folder: Path) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))

    def text_shape(self, folder: Path) -> tuple[int, int]:
        width = json.loads((folder / "unet" / "config.json").read_text()).get("cross_attention_dim", 1280)
        tokenizer = folder / "tokenizer" / "tokenizer_config.json"
        length = json.loads(tokenizer.read_text())["model_max_length"] if tokenizer.exists() else CLIP_TOKENS
        return length, width

    def tokenizer(self, folder: Path) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")

    def noise_schedule(self, folder: Path) -> NoiseSchedule:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(self.scheduler_config(folder))
        return NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def scheduler_config(self, folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))

    def guidance_width(self, folder: Path) -> int | None:
        width = json.loads((folder / "unet" / "config.json").read_text()).get("time_cond_proj_dim")
        return None if width is None else int(width)

    def geometry(self, folder: Path) -> Geometry:
        try:
            denoiser = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
            autoencoder = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
            factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
            # The U-Net halves its input once fewer than it has blocks; other sizes would not fit on the way up.
            unit = factor * 2 ** (len(denoiser["block_out_channels"]) - 1)
            return Geometry(autoencoder.get("latent_channels", 4), factor, int(denoiser["sample_size"]) * factor, unit)
        except (OSError, ValueError, KeyError, TypeError):
            raise RequestError(
                f"{folder}: unet/config.json and vae/config.json do not say at which sizes it draws: "
                "put sample_size and block_out_channels there"
            ) from None

    def latent_scale(self, folder: Path) -> tuple[float, float]:
        config = json.loads((folder / "vae" / "config.json").read_text())
        return float(config.get("scaling_factor", 0.18215)), float(config.get("shift_factor") or 0.0)

    def moments(self, autoencoder: nn.Module, pixels: Tensor) -> Tensor:
        encoder: Any = autoencoder
        return encoder.encode(pixels).latent_dist.parameters

    def pixels(self, autoencoder: nn.Module, latents: Tensor) -> Tensor:
        decoder: Any = autoencoder
        config = decoder.config
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return decoder.decode(unscaled, return_dict=False)[0]

    def tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        length = tokenizer.model_max_length
        return tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def conditioning(self, text_encoder: nn.Module, tokens: Tensor) -> Tensor:
        return text_encoder(tokens)[0]

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        return denoiser(noisy, timesteps, encoder_hidden_states=conditioning, return_dict=False)[0]

    def pipeline(self, folder: Path, lora: Path | None = None, **components: Any) -> Any:
        from diffusers import StableDiffusionPipeline

        extra = {"safety_checker": None, "requires_safety_checker": False, **components}
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **extra)
        if lora is not None:
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def open_single_file(self, file: Path, configurations: Path | None) -> Any:
        from diffusers import StableDiffusionPipeline

        local = {} if configurations is None else {"config": str(configurations), "local_files_only": True}
        return StableDiffusionPipeline.from_single_file(file, safety_checker=None, **local)

    def save_lora(self, tensors: dict[str, Tensor], metadata: dict[str, Any], folder: Path) -> None:
        from diffusers import StableDiffusionPipeline

        # peft has the targets in a set, whose order is another in each process.
        ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=ordered, weight_name=LORA_FILE
        )
        sort_header(folder / LORA_FILE)

    def lora_config(self, lora: Path) -> dict[str, Any]:
        with safe_open(lora, "pt") as file:
            header = json.loads(file.metadata()["lora_adapter_metadata"])
        return {name.removeprefix("unet."): value for name, value in header.items()}

    def add_adapter(self, denoiser: Any, lora: Path, name: str) -> None:
        denoiser.load_lora_adapter(lora.parent, weight_name=lora.name, prefix="unet", adapter_name=name)
        denoiser.requires_grad_(False).eval()
        self.use_adapter(denoiser, None)

    def use_adapter(self, denoiser: Any, name: str | None) -> None:
        if name is None:
            if getattr(denoiser, "peft_config", None):
                denoiser.disable_lora()
            return
        denoiser.enable_lora()
        denoiser.set_adapter(name)

    def remove_adapter(self, denoiser: Any, name: str) -> None:
        denoiser.delete_adapters(name)
