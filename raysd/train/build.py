"""Which engine a worker trains through.

Plain torch for a single worker at ZeRO stage 0, where DeepSpeed would only cost its import, and DeepSpeed for the rest.
"""

import torch
from torch import nn

from raysd.config.training import TrainingSpec
from raysd.errors import SpecError, TrainingFailed
from raysd.train.deepspeed_engine import DeepSpeedEngine
from raysd.train.engine import Engine, TorchEngine


def build_engine(module: nn.Module, spec: TrainingSpec, *, device: torch.device, rank: int, world: int) -> Engine:
    """An engine round `module`, whose parameters are fp32 and hold the weights to start from. Collective.

    With more than one rank the process group exists already. Raises SpecError for what cannot be done here, and
    TrainingFailed for trained weights of another type.
    """
    if spec.scale.precision == "fp16" and device.type == "cpu":
        raise SpecError("scale.precision fp16 needs a GPU: use bf16 or fp32")
    _check_fp32(module)
    module.to(device)
    if world == 1 and spec.scale.zero_stage == 0:
        return TorchEngine(module, spec, device=device)
    return DeepSpeedEngine(module, spec, device=device, rank=rank, world=world)


def _check_fp32(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TrainingFailed(f"{name} is {parameter.dtype}: trained weights must be fp32")
