"""What a diffusers folder has to hold before anything trains or draws with it: told from names, headers and sizes."""

import json
from pathlib import Path
from typing import Any

from raysd.errors import RequestError
from raysd.models import BESIDE, INDEX, family_of
from raysd.models.weights import whole

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""How the names of weights begin that each library looks for."""
PUT = ": put the model's own there"
CONVERT = "convert them:\nDiffusionPipeline.from_pretrained(folder{}).save_pretrained(other, safe_serialization=True)"


def check_folder(folder: Path, ref: str) -> None:
    """Check the components that the index names, in milliseconds; without it runs would start on Ray before they fail.

    The libraries invent some of what they lack: a tokenizer without vocabulary knows no word, and prompts say nothing.
    Raises RequestError naming the file.
    """
    family_of(folder)
    for part, value in json.loads((folder / INDEX).read_bytes()).items():
        if isinstance(value, list) and value[:1] != [None] and part not in BESIDE:
            problem = _problem(folder / part, library=value[0] if value else None)
            if problem is not None:
                raise RequestError(f"{ref}: {part}/{problem}")


def _problem(folder: Path, library: Any) -> str | None:
    """What a component lacks, its file first."""
    if folder.name.startswith("tokenizer"):
        return None if _vocabulary(folder) else f"tokenizer.json is missing or holds no vocabulary{PUT}"
    config = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    if not _table(folder / config):
        return f"{config} is missing or not readable{PUT}"
    return None if folder.name == "scheduler" else _weights_problem(folder, library)


def _vocabulary(folder: Path) -> bool:
    """In one file, or in the two that older folders have."""
    model = _table(folder / "tokenizer.json").get("model")
    if isinstance(model, dict) and model.get("vocab"):
        return True
    return bool(_table(folder / "vocab.json")) and (folder / "merges.txt").is_file()


def _weights_problem(folder: Path, library: Any) -> str | None:
    name = f"{TRANSFORMERS if library == 'transformers' else DIFFUSERS}.safetensors"
    files = [name]
    if not (folder / name).exists():  # in shards, or not at all
        files = sorted(set(_table(folder / f"{name}.index.json").get("weight_map", {}).values())) or files
    for file in files:
        if not (folder / file).exists():
            return f"{file} is missing{_instead(folder)}"
        if not whole(folder / file):
            return f"{file} is damaged or cut short: copy or download it again (in a git clone: git lfs pull)"
    return None


def _instead(folder: Path) -> str:
    """What lies there in its place, and what to do about it."""
    if list(folder.glob("*.fp16.safetensors")):
        return f", and .fp16 files are not read; {CONVERT.format(', variant=' + repr('fp16'))}"
    if list(folder.glob("*.bin")):
        return f", and pickled weights (.bin) are not loaded; {CONVERT.format('')}"
    return PUT


def _table(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file holds none."""
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
