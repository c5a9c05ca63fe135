"""Low-rank adapters on the denoiser's attention (Hu et al. 2021): W + (alpha / rank) B A."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysd.config.training import LoraSpec, TrainingSpec
from raysd.errors import RequestError, SpecError
from raysd.methods.base import Batch, TrainedModule, denoising_loss, published_dtype
from raysd.models import Family, NoiseSchedule
from raysd.seeding import seed_of

ADAPTER = "default"
FROZEN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Lora:
    kind = "lora"
    lighter: str | None = None

    def check(self, family: Family, folder: Path, spec: TrainingSpec) -> None:
        predicts = family.noise_schedule(folder).prediction
        if spec.loss.prediction not in ("base", predicts):
            raise RequestError(
                f"loss.prediction {spec.loss.prediction}: an adapter predicts what its base does ({predicts}); "
                "leave it at base, or use method.kind full"
            )
        if _method(spec).targets is not None:
            with torch.device("meta"):
                _add_adapter(family.blank_denoiser(folder), family, folder, spec)

    def trains_text(self, spec: TrainingSpec) -> bool:
        return False

    def build(self, family: Family, folder: Path, spec: TrainingSpec) -> TrainedModule:
        """Adapters in fp32; the frozen rest in the arithmetic's precision, which autocast would cast it to each time."""
        denoiser: Any = family.denoiser(folder).requires_grad_(False).to(FROZEN[spec.scale.precision]).train()
        torch.manual_seed(seed_of(spec.seed, "adapter"))
        _add_adapter(denoiser, family, folder, spec)
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if spec.scale.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return TrainedModule(family, denoiser)

    def loss(self, model: TrainedModule, batch: Batch, schedule: NoiseSchedule, spec: TrainingSpec) -> Tensor:
        return denoising_loss(model, batch, schedule, spec)

    def write(self, family: Family, base: Path, weights: Mapping[str, Tensor], spec: TrainingSpec, out: Path) -> None:
        """One adapter file, its rank, alpha and targets in the header.

        Not its dropout: diffusers would make the dropout layers that a header asks for in training mode, and draw with them.
        """
        dtype = published_dtype(spec)
        tensors = {
            name.removeprefix("denoiser.").replace(f".{ADAPTER}.", "."): tensor.to(dtype).contiguous()
            for name, tensor in weights.items()
        }
        family.save_lora(tensors, {**_config(spec, family).to_dict(), "lora_dropout": 0.0}, out)


def _method(spec: TrainingSpec) -> LoraSpec:
    assert isinstance(spec.method, LoraSpec)
    return spec.method


def _targets(spec: TrainingSpec, family: Family) -> tuple[str, ...]:
    return _method(spec).targets or family.lora_targets


def _add_adapter(denoiser: Any, family: Family, folder: Path, spec: TrainingSpec) -> None:
    try:
        denoiser.add_adapter(_config(spec, family), adapter_name=ADAPTER)
    except ValueError as error:
        targets = ", ".join(_targets(spec, family))
        raise SpecError(f"method.targets: {targets} fit no module of {folder.name}: {error}"[:300]) from None


def _config(spec: TrainingSpec, family: Family) -> Any:
    from peft import LoraConfig

    method = _method(spec)
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or method.rank,
        lora_dropout=method.dropout,
        target_modules=list(_targets(spec, family)),
        init_lora_weights="gaussian",
    )
