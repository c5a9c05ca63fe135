"""A model as files for other programs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from raysd.errors import RequestError
from raysd.methods.full import copy_model
from raysd.models.weights import sort_header
from raysd.references import locate
from raysd.storage import Storage


def export_diffusers(ref: str, root: Storage, folder: Path) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` loads; an adapter lies in it as its own file too.

    A LoRA version becomes its base with the adapter beside it: `load_lora_weights(folder)` puts it on.
    Raises RequestError if the folder is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"--out {folder}: exists and is not empty")
    located = locate(ref, root)
    copy_model(located.folder, folder)
    if located.lora is not None:
        shutil.copyfile(located.lora, folder / located.lora.name)


def export_kohya(ref: str, root: Storage, file: Path) -> None:
    """Write a LoRA version as the one file that A1111, ComfyUI and kohya's scripts load, with the true alpha.

    Raises RequestError if the model is no LoRA or the file exists.
    """
    from safetensors.torch import load_file, save_file

    if file.suffix != ".safetensors" or file.exists():
        raise RequestError(f"--out {file}: name a .safetensors file that does not exist")
    located = locate(ref, root)
    if located.lora is None:
        raise RequestError(f"{ref}: kohya's format holds LoRAs, and this is a whole model; use --format diffusers")
    config = located.family.lora_config(located.lora)
    alpha = float(config["lora_alpha"])
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(alpha),
        "modelspec.title": located.ref,
    }
    save_file(kohya_tensors(load_file(located.lora), alpha), file, metadata=header)
    sort_header(file)


def kohya_tensors(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """peft's names (`unet.….to_q.lora_A.weight`) -> kohya's (`lora_unet_…_to_q.lora_down.weight` and `.alpha`).

    diffusers' own converter is used for the names alone: it writes the rank where alpha belongs.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    named = convert_state_dict_to_kohya(weights)
    return {name: tensor(alpha) if name.endswith(".alpha") else value for name, value in named.items()}


EXPORTS: dict[str, Callable[[str, Storage, Path], Any]] = {"diffusers": export_diffusers, "kohya": export_kohya}
