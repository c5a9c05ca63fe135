"""The optimisers by name. Each has one group: weight decay applies to every trained tensor, as in diffusers."""

import contextlib
import io
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from raysd.config.training import OptimSpec
from raysd.errors import SpecError
from raysd.quiet import bring_in

Parameters = Sequence[nn.Parameter]

SHARDABLE = ("adamw",)
"""Element-wise: the same on a flat shard as on whole tensors. The others look at shapes or at all tensors together."""

RUNNING = ("d", "d_max", "d_numerator", "k")
"""What Prodigy keeps in its group instead of beside each tensor."""


def build_optimizer(parameters: Parameters, spec: OptimSpec, sharded: bool = False) -> Optimizer:
    """The optimiser that `spec.kind` names; its learning rate is set at each step.

    `sharded`: it will work on flat parts of the tensors (ZeRO 1 to 3).
    Raises SpecError for a pair that would train something else, or when a package is missing.
    """
    if sharded and spec.kind not in SHARDABLE:
        raise SpecError(f"optim.kind {spec.kind} needs whole tensors: use scale.zero_stage 0, or optim.kind adamw")
    return OPTIMIZERS[spec.kind](parameters, spec)


def running(optimizer: Optimizer) -> dict[str, float | int]:
    """Plain numbers that are part of the optimiser's state; empty for most."""
    return {key: optimizer.param_groups[0][key] for key in RUNNING if key in optimizer.param_groups[0]}


def _adamw(parameters: Parameters, spec: OptimSpec) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019), in one pass over memory (fused), on GPU and CPU.

    So it serves offloaded state too: as fast as DeepSpeed's CPU Adam, which each new worker would compile for minutes.
    """
    return torch.optim.AdamW(
        parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )


def _adamw8bit(parameters: Parameters, spec: OptimSpec) -> Optimizer:
    """AdamW with moments in 8 bits a number, in blocks of 256 (Dettmers et al. 2022); small tensors keep 32 bits."""
    try:
        bring_in("bitsandbytes")
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise SpecError(f"optim.kind adamw8bit needs bitsandbytes (pip install 'raysd[optimizers]'): {error}") from None
    for parameter in parameters:  # its first step does so too, but after laying out the state in the old order
        parameter.data = parameter.data.contiguous()
    return AdamW8bit(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)


def _adafactor(parameters: Parameters, spec: OptimSpec) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018) with the learning rate as given.

    torch's own scales it by the size of each tensor, so that a LoRA matrix that starts at zero would hardly move.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def _prodigy(parameters: Parameters, spec: OptimSpec) -> Optimizer:
    """Prodigy (Mishchenko and Defazio 2023), which estimates the step size; settings as in diffusers' scripts."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise SpecError(f"optim.kind prodigy needs prodigyopt (pip install 'raysd[optimizers]'): {error}") from None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decouples weight decay
        return Prodigy(
            parameters,
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
        )


OPTIMIZERS: dict[str, Callable[[Parameters, OptimSpec], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}
