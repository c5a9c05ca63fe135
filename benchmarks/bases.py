"""Models to train: untrained weights, real shapes."""

import json
from pathlib import Path
from typing import Any

from benchmarks import spawned

REDUCED: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 192,
    "attention_head_dim": 8,
}
"""Stable Diffusion 1.5's blocks at a fifth of their width."""
SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""Stable Diffusion 1.5's U-Net, 860 M parameters; diffusers' defaults for the rest are its own."""

TOKENS = 77
"""Of a prompt, in Stable Diffusion 1.5."""
AUTOENCODER = {"scaling_factor": 0.18215, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512)}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny(folder: Path) -> Path:
    """The bundled base's shape, all components."""
    spawned.alone(_tiny, folder)  # writing it imports DeepSpeed, which a single worker never does
    return folder


def _tiny(folder: Path) -> None:
    from raysd.assets.make.skeleton import build

    build(folder)


def lora_of(base: Path, out: Path, seed: int, rank: int = 4, spread: float = 0.3) -> Path:
    """An adapter file of random weights; with this spread they change the pictures of a tiny base visibly."""
    import torch

    from raysd.config import TrainingSpec, load
    from raysd.methods.lora import Lora
    from raysd.models import family_of

    method = {"kind": "lora", "rank": rank}
    values = {"base": str(base), "data": {"source": "."}, "optim": {"lr": 1e-4, "steps": 1}, "method": method}
    spec = load(TrainingSpec, {**values, "seed": seed})
    module = Lora().build(family_of(base), base, spec)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(value.shape, generator=generator) * spread
        for name, value in module.named_parameters()
        if value.requires_grad
    }
    out.mkdir(parents=True)
    Lora().write(family_of(base), base, weights, spec, out)
    return next(out.iterdir())


def whole(folder: Path, shape: dict[str, Any]) -> Path:
    """A folder with a U-Net of this shape and small other components around it."""
    spawned.alone(_whole, folder, shape)
    return folder


def _whole(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from raysd.assets.make.skeleton import autoencoder
    from raysd.assets.make.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["cross_attention_dim"],
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**shape),
        scheduler=DDIMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def denoiser_only(folder: Path, shape: dict[str, Any]) -> Path:
    """A folder with a U-Net of this shape and what the loop reads besides: the latents' scale and the noise schedule."""
    spawned.alone(_denoiser_only, folder, shape)
    return folder


def _denoiser_only(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**shape).save_pretrained(folder / "unet")
    _write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    _write(folder / "vae" / "config.json", AUTOENCODER)
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)


def _write(path: Path, body: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
