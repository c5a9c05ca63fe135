"""Model families. A new family is one file and one line here."""

import json
from pathlib import Path

from raysd.errors import RequestError
from raysd.models.base import Family, NoiseSchedule
from raysd.models.sd import StableDiffusion

FAMILIES: dict[str, Family] = {"sd": StableDiffusion()}
BESIDE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that neither train nor draw."""


def family_of(folder: Path) -> Family:
    """The family of a diffusers folder, by the pipeline class its model_index.json names. Raises RequestError."""
    try:
        pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError):
        raise RequestError(f"{folder}: not a diffusers model (no readable model_index.json)") from None
    for family in FAMILIES.values():
        if pipeline in family.pipelines:
            return family
    raise RequestError(f"{folder}: {pipeline} is not supported; supported families: {', '.join(FAMILIES)}")


__all__ = ["BESIDE", "FAMILIES", "Family", "NoiseSchedule", "family_of"]
