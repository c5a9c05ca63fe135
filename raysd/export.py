"""A model as files for other programs."""

import shutil
from pathlib import Path

from raysd.errors import RequestError
from raysd.methods.full import copy_model
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
