"""Model families. A new one is a file beside this and a line in `FAMILIES`."""

import json
from pathlib import Path, PurePath

from safetensors import safe_open

from raysd.errors import RequestError
from raysd.models.base import ADAPTER_ENDING, Family, NoiseSchedule
from raysd.models.sd import StableDiffusion

FAMILIES: dict[str, Family] = {"sd": StableDiffusion()}
INDEX = "model_index.json"
BESIDE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that neither train nor draw."""


def components(folder: Path) -> list[str]:
    """The folders of a model's parts, as its index names them."""
    return named((folder / INDEX).read_bytes())


def named(index: bytes) -> list[str]:
    """The same from the index's bytes."""
    parts = json.loads(index)
    return [name for name, value in parts.items() if isinstance(value, list) and name not in BESIDE]


def is_part(path: Path) -> bool:
    """Whether a file in one of them is the model's: configuration, vocabulary, weights (not those of another precision)."""
    return path.is_file() and is_parts_name(path)


def is_parts_name(path: PurePath) -> bool:
    """The same by its name alone."""
    return path.suffix in (".json", ".txt", ".safetensors") and ".fp16." not in path.name


def is_adapter(name: str) -> bool:
    """Whether a version's file of that name is an adapter over its base: a version without one is a whole model."""
    return name.endswith(ADAPTER_ENDING)


def family_of(folder: Path) -> Family:
    """The family of a diffusers folder, by the pipeline class its model_index.json names. Raises RequestError."""
    try:
        pipeline = json.loads((folder / INDEX).read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"{folder}: not a diffusers model (no readable {INDEX})") from None
    for family in FAMILIES.values():
        if pipeline in family.pipelines:
            return family
    raise RequestError(f"{folder}: {pipeline} is not supported; supported families: {', '.join(FAMILIES)}")


def family_of_file(file: Path) -> Family:
    """The family of a single-file checkpoint, by the names of its tensors. Raises RequestError, SafetensorError."""
    with safe_open(file, "pt") as opened:
        names = opened.keys()
    for family in FAMILIES.values():
        if any(name.startswith(family.single_file_prefix) for name in names):
            return family
    raise RequestError(f"{file}: holds no model of a supported family; supported families: {', '.join(FAMILIES)}")


__all__ = [
    "BESIDE",
    "FAMILIES",
    "INDEX",
    "Family",
    "NoiseSchedule",
    "components",
    "family_of",
    "family_of_file",
    "is_adapter",
    "is_part",
    "is_parts_name",
    "named",
]
