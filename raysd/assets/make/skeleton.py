"""A whole Stable Diffusion folder of the bundled base's shapes, untrained but for the autoencoder it is given."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raysd.assets.make.tokenizer import LENGTH, build_tokenizer

WIDTH = 64  # of the text encoder and of cross-attention


def autoencoder() -> Any:
    """64 x 64 pixels -> 4 x 16 x 16 latents, 0.65 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def text_encoder(tokenizer: Any) -> Any:
    """2 layers of width 64. Embeddings start at std 0.3: the default 0.02 takes much longer to tell words apart."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    return model


def denoiser() -> Any:
    """16 x 16 latents; cross-attention at 8 x 8, where it costs a third of what it would above. 2.2 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build(folder: Path, vae_folder: Path | None = None, seed: int = 0) -> None:
    """Write the folder that `StableDiffusionPipeline.from_pretrained` loads; weights depend on the seed alone."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    vae = autoencoder() if vae_folder is None else AutoencoderKL.from_pretrained(vae_folder)
    tokenizer = build_tokenizer()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=denoiser(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.folder, args.vae, args.seed)


if __name__ == "__main__":
    main()
