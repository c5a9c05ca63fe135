"""Names of a Stable Diffusion 1.x single-file checkpoint (CompVis' layout), from those of a diffusers folder."""

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def original_layout(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder. Its U-Net has one layer a block; its autoencoder has no attention."""
    [unet], [vae], [text] = ((folder / part).glob("*.safetensors") for part in ("unet", "vae", "text_encoder"))
    tensors = {f"model.diffusion_model.{_unet(name)}": tensor for name, tensor in load_file(unet).items()}
    tensors |= {f"first_stage_model.{_vae(name)}": tensor for name, tensor in load_file(vae).items()}
    # transformers 5 leaves `text_model.` out of the names it saves; single files have it.
    names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in load_file(text)}
    return tensors | {f"cond_stage_model.transformer.{names[name]}": tensor for name, tensor in load_file(text).items()}


def _unet(name: str) -> str:
    """A block of one layer takes 2 places on the way down, its layer and its downsampler, and 2 layers on the way up."""
    for here, there in WHOLE.items():
        name = re.sub(rf"^{here}\.", f"{there}.", name)
    kinds = {"resnets": 0, "attentions": 1}
    name = re.sub(
        r"^down_blocks\.(\d+)\.(resnets|attentions)\.0",
        lambda found: f"input_blocks.{2 * int(found[1]) + 1}.{kinds[found[2]]}",
        name,
    )
    name = re.sub(
        r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda found: f"input_blocks.{2 * int(found[1]) + 2}.0.op", name
    )
    name = re.sub(
        r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d)",
        lambda found: f"output_blocks.{2 * int(found[1]) + int(found[3])}.{kinds[found[2]]}",
        name,
    )
    name = re.sub(r"^up_blocks\.0\.upsamplers\.0", "output_blocks.1.2", name)
    if re.match(r"(input_blocks|output_blocks|middle_block)", name) and "transformer_blocks" not in name:
        for here, there in RESNET.items():
            name = re.sub(rf"\.{here}\.", f".{there}.", name)
    return name


def _vae(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{2 - int(found[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{2 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
