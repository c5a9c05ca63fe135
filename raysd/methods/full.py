"""Full fine-tuning: every weight of the denoiser moves, and of the text encoder on request."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from raysd.config.training import FullSpec, TrainingSpec
from raysd.errors import IntegrityError
from raysd.methods.base import Batch, TrainedModule, denoising_loss, published_dtype
from raysd.models import BESIDE, INDEX, Family, NoiseSchedule, components, is_part

DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""What the two libraries call a component's file: denoisers are the one's, text encoders the other's."""
CLIP = "text_model."
"""Before the names in files of CLIP text encoders as OpenAI and transformers 4 wrote them; transformers 5 takes it off."""


class Full:
    kind = "full"
    lighter: str | None = "lora"

    def check(self, family: Family, folder: Path, spec: TrainingSpec) -> None:
        """Any base will do."""

    def trains_text(self, spec: TrainingSpec) -> bool:
        return isinstance(spec.method, FullSpec) and spec.method.text_encoder

    def build(self, family: Family, folder: Path, spec: TrainingSpec) -> TrainedModule:
        text_encoder = family.text_encoder(folder).train() if self.trains_text(spec) else None
        denoiser = family.denoiser(folder).train()
        if spec.scale.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        return TrainedModule(family, denoiser, text_encoder)

    def loss(self, model: TrainedModule, batch: Batch, schedule: NoiseSchedule, spec: TrainingSpec) -> Tensor:
        return denoising_loss(model, batch, schedule, spec)

    def write(self, family: Family, base: Path, weights: Mapping[str, Tensor], spec: TrainingSpec, out: Path) -> None:
        """A whole diffusers folder: the base's, with the trained components' weights replaced."""
        copy_model(base, out)
        for module, folder in family.trained_parts:
            prefix = f"{module}."
            trained = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            if trained:
                name = DIFFUSERS_WEIGHTS if module == "denoiser" else TRANSFORMERS_WEIGHTS
                _replace_weights(out / folder, name, trained, spec)
        if spec.loss.prediction != "base":
            _set_prediction(out / "scheduler" / "scheduler_config.json", spec.loss.prediction)


def copy_model(base: Path, out: Path) -> None:
    """Copy a diffusers folder: model_index.json and the components it names, without the safety checker."""
    index = json.loads((base / INDEX).read_text())
    left_out = {name: [None, None] for name in BESIDE if name in index}
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX).write_text(json.dumps({**index, **left_out}, indent=2) + "\n")
    for component in components(base):
        for path in filter(is_part, sorted((base / component).glob("*"))):
            (out / component).mkdir(exist_ok=True)
            shutil.copyfile(path, out / component / path.name)


def _replace_weights(folder: Path, name: str, trained: dict[str, Tensor], spec: TrainingSpec) -> None:
    """The file keeps the names that the base's has: programs other than transformers 5 look for those."""
    from safetensors import safe_open

    before = sorted(folder.glob("*.safetensors"))
    known: set[str] = set()
    for path in before:
        with safe_open(path, "pt") as file:
            known.update(file.keys())
    prefix = CLIP if any(key.startswith(CLIP) for key in known) else ""
    dtype = published_dtype(spec)
    body = {prefix + key.removeprefix(prefix): tensor.to(dtype).contiguous() for key, tensor in trained.items()}
    if missing := known - set(body) - {f"{prefix}embeddings.position_ids"}:
        raise IntegrityError(f"{folder.name}: the checkpoint lacks {len(missing)} of its tensors, e.g. {min(missing)}")
    for path in [*before, *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    save_file(body, folder / name, metadata={"format": "pt"})


def _set_prediction(path: Path, prediction: str) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": prediction}, indent=2) + "\n")
