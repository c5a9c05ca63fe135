"""A classifier that looks at each finished picture: the one that Stable Diffusion comes with, or one of transformers'.

It fails closed: one that is not whole refuses to start, and a picture that it cannot judge is not shown.
"""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from raysd.config.serving import SafetySpec
from raysd.errors import RaysdError, RequestError
from raysd.serve.predictions import POLICY

CHECKER = "StableDiffusionSafetyChecker"
PROCESSOR = "preprocessor_config.json"


class Flagged(RaysdError):
    """All pictures of a prediction were held back."""

    def __init__(self, message: str = f"{POLICY}: the safety classifier held it back; try another prompt or seed"):
        super().__init__(message)


class Classifier:
    """Says which pictures are to be held back. May be shared by threads: they take turns.

    A folder of `transformers` (AutoModelForImageClassification, as Falconsai/nsfw_image_detection) flags a picture whose
    probability of being one of `spec.labels` is above `spec.threshold`. Stable Diffusion's own checker (diffusers'
    safety_checker/, its processor in the same folder or in feature_extractor/ beside it) has thresholds of its own.

    Raises RequestError naming the field for a folder that is no such thing, lacks weights, or has them in a pickle.
    """

    def __init__(self, spec: SafetySpec, device: torch.device | None = None):
        self.spec, self._device, self._turn = spec, device or torch.device("cpu"), threading.Lock()
        config = check(spec)
        folder = Path(spec.path).expanduser()
        try:
            self._processor = _processor(folder)
            self._model = _model(folder, config).to(self._device).requires_grad_(False).eval()
            self._labels = [] if _is_checker(config) else _numbers(spec, self._model.config.id2label)
            self.flagged([Image.new("RGB", (64, 64))])
        except RequestError:
            raise
        except Exception as error:  # whatever transformers raises
            reason = " ".join(str(error).split())[:120]
            raise _unusable(spec, f"cannot be loaded ({type(error).__name__}: {reason})") from None

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Which of them are to be held back."""
        with self._turn, torch.inference_mode():
            found = self._processor(list(images), return_tensors="pt")["pixel_values"].to(self._device)  # [B, 3, h, w]
            if not self._labels:
                _, concepts = self._model(clip_input=found, images=torch.zeros(len(images), 1))
                return [bool(found) for found in concepts]
            return self._judged(self._model(pixel_values=found).logits.float())

    def _judged(self, logits: torch.Tensor) -> list[bool]:
        """[B, labels] -> whether one of the flagged labels holds."""
        if self._model.config.problem_type == "multi_label_classification":
            chance = logits.sigmoid()[:, self._labels].amax(1)
        else:
            chance = logits.softmax(1)[:, self._labels].sum(1)
        # Not `>`: of what is no number nothing is known, and the picture stays here.
        return [not value <= self.spec.threshold for value in chance.tolist()]


def check(spec: SafetySpec) -> dict[str, Any]:
    """The classifier's configuration, without loading it. Raises RequestError naming the field."""
    folder = Path(spec.path).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = [str(name) for name in config["architectures"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise _unusable(spec, "has no config.json that names its architecture") from None
    if not any(name == CHECKER or name.endswith("ForImageClassification") for name in known):
        raise _unusable(spec, f"is a {', '.join(known)[:60]}")
    if not list(folder.glob("*.safetensors")):
        raise _unusable(spec, "has no *.safetensors (pickles are not loaded)")
    if not any((place / PROCESSOR).exists() for place in _places(folder)):
        raise _unusable(spec, f"has no {PROCESSOR}")
    if not _is_checker(config):
        _numbers(spec, config.get("id2label", {}))
    return dict(config)


def _model(folder: Path, config: dict[str, Any]) -> Any:
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    if _is_checker(config):
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        model, found = StableDiffusionSafetyChecker.from_pretrained(folder, **options)
    else:
        from transformers import AutoModelForImageClassification

        model, found = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False, **options)
    lacking = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    lacking += [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if lacking:  # else transformers would go on with random numbers in their place
        raise ValueError(f"weights are missing or no numbers: {lacking[0]}")
    return model


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    place = next(place for place in _places(folder) if (place / PROCESSOR).exists())
    return AutoImageProcessor.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def _places(folder: Path) -> tuple[Path, Path]:
    return folder, folder.resolve().parent / "feature_extractor"


def _is_checker(config: dict[str, Any]) -> bool:
    return CHECKER in config["architectures"]


def _numbers(spec: SafetySpec, names: dict[Any, str]) -> list[int]:
    """The outputs that stand for the labels to be flagged."""
    by_name = {str(name).lower(): int(number) for number, name in names.items()}
    unknown = [label for label in spec.labels if label.lower() not in by_name]
    if unknown:
        there = ", ".join(by_name)[:100]
        raise RequestError(f"safety.labels: {spec.path} knows no {unknown[0]!r}; it has {there}")
    return [by_name[label.lower()] for label in spec.labels]


def _unusable(spec: SafetySpec, reason: str) -> RequestError:
    return RequestError(
        f"safety.path {spec.path}: {reason}\n"
        "give the folder of an image classifier of transformers, or of Stable Diffusion's safety checker"
    )
