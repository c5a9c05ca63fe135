"""What the loop trains through: one interface, and its plain-PyTorch form for one worker.

`deepspeed_engine.py` is the other form, `build.py` chooses. Weights and optimiser state stay fp32 in both.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from raysd.config.training import TrainingSpec
from raysd.errors import SpecError, TrainingFailed
from raysd.train.optimizer import build_optimizer, running

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

State = dict[str, Tensor]
"""Of one parameter: {"exp_avg": its shape, "exp_avg_sq": its shape, "step": 0-d, ...}."""


class Engine(Protocol):
    """A module, its optimiser, and what makes both work over many workers.

    "Collective": every rank calls it, for the same names in the same order, or all hang.
    """

    module: nn.Module
    rank: int
    world: int
    device: torch.device
    skipped: bool
    """The last `step` left the weights as they were, because gradients were not finite."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass in the precision of the spec. Collective."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-step; `last`: the optimiser step follows. Collective.

        The gradient is that of the mean over ranks of the sum over micro-steps of `loss`; nothing is divided here.
        Every rank makes the same number of micro-steps.
        """

    def step(self, lr: float) -> float:
        """One optimiser step at this learning rate; the global gradient norm before clipping. Collective.

        If the norm is nan or inf no weight moves, `skipped` is True and the norm is returned as it is (DeepSpeed says
        inf for both). With fp16 that happens now and then and lowers the loss scale.
        """

    def trainable_names(self) -> list[str]:
        """Names of the parameters that are trained, in the module's order."""

    def full_weight(self, name: str) -> Tensor:
        """A trained weight, fp32, full shape, on every rank; may share its memory. Collective at stage 3."""

    def write_weight(self, name: str, value: Tensor | None, source: int) -> None:
        """Put rank `source`'s `value` into the module on every rank; the others' is not looked at. Collective.

        For showing other weights for a while: at stages 1 and 2 the optimiser keeps its own copy, and the next step
        starts from that.
        """

    def optimizer_state(self, name: str) -> State:
        """The optimiser's state of one parameter, full shapes, on every rank; {} before the first step. Collective."""

    def load_optimizer_state(self, states: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Put back, to the bit, what `optimizer_state` gave of all names after `steps` steps; before any step here."""

    def scalars(self) -> dict[str, float | int]:
        """Plain numbers that resuming needs besides: the loss scale of fp16, Prodigy's estimate."""

    def load_scalars(self, scalars: Mapping[str, float | int]) -> None:
        """Put them back, after `load_optimizer_state`."""


def leave() -> None:
    """End the process group that an engine of a single worker made, so that this process can make another one."""
    if dist.is_initialized():
        deepspeed = sys.modules.get("deepspeed")  # which keeps groups of its own
        (deepspeed.comm if deepspeed else dist).destroy_process_group()


class Autocast(nn.Module):
    """A module whose forward pass runs in a lower precision; parameters and gradients stay fp32."""

    def __init__(self, module: nn.Module, device: torch.device, precision: str, cache: bool = True) -> None:
        super().__init__()
        self.inner = module
        self._options: dict[str, Any] = {
            "device_type": device.type,
            "dtype": AUTOCAST.get(precision),
            "enabled": precision in AUTOCAST,
            "cache_enabled": cache,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(**self._options):
            return self.inner(*args, **kwargs)


class LossScale:
    """fp16's dynamic loss scale (Micikevicius et al. 2018): halved on overflow, doubled after 2000 good steps.

    1 in the other precisions. Every rank sees the same norm, so all ranks hold the same scale.
    """

    patience = 2000

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = 65536.0 if self.dynamic else 1.0
        self.good = 0

    def update(self, finite: bool) -> None:
        """After a step. Raises TrainingFailed when no scale helps: then the loss itself is not finite."""
        if not self.dynamic:
            return
        if not finite and self.value <= 1.0:
            raise TrainingFailed("gradients overflow at any loss scale: use scale.precision bf16 or a lower optim.lr")
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == self.patience:
            self.value, self.good = self.value * 2, 0

    def scalars(self) -> dict[str, float | int]:
        return {"loss_scale": self.value, "loss_scale_good": self.good} if self.dynamic else {}

    def load(self, scalars: Mapping[str, float | int]) -> None:
        if self.dynamic and "loss_scale" in scalars:
            self.value, self.good = float(scalars["loss_scale"]), int(scalars["loss_scale_good"])


class TorchEngine:
    """The engine of one worker at stage 0. Nothing here is collective."""

    def __init__(self, module: nn.Module, spec: TrainingSpec, *, device: torch.device) -> None:
        self.module, self.device, self.rank, self.world, self.skipped = module, device, 0, 1, False
        self._forward = Autocast(module, device, spec.scale.precision)
        self._parameters = trainable(module)
        self._optimizer = build_optimizer(list(self._parameters.values()), spec.optim)
        self._clip, self._scale = spec.optim.clip, LossScale(spec.scale.precision)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self._scale.value).backward()

    def step(self, lr: float) -> float:
        set_lr(self._optimizer, lr)
        norm = clip_gradients(self._parameters.values(), self._clip, self._scale.value)
        self.skipped = not math.isfinite(norm)
        if not self.skipped:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._scale.update(not self.skipped)
        return norm

    def trainable_names(self) -> list[str]:
        return list(self._parameters)

    def full_weight(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def write_weight(self, name: str, value: Tensor | None, source: int) -> None:
        assert value is not None
        self._parameters[name].data.copy_(value)

    def optimizer_state(self, name: str) -> State:
        return torch_state(self._optimizer, self._parameters[name])

    def load_optimizer_state(self, states: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        check_names(states, self._parameters)
        for name, state in states.items():
            load_torch_state(self._optimizer, self._parameters[name], state)

    def scalars(self) -> dict[str, float | int]:
        return self._scale.scalars() | running(self._optimizer)

    def load_scalars(self, scalars: Mapping[str, float | int]) -> None:
        self._scale.load(scalars)
        load_running(self._optimizer, scalars)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name. Raises SpecError if there is none."""
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not found:
        raise SpecError("method: nothing is trained; no parameter requires a gradient")
    return found


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], clip: float | None, scale: float) -> float:
    """Divide the gradients by the loss scale, bring their common norm down to `clip`; the norm before that.

    A parameter without a gradient gets zeros, as in ZeRO: so it decays alike at every stage. Gradients are left as they
    are when the norm is not finite.
    """
    gradients = [_gradient(parameter) for parameter in parameters]
    norm = float(torch.nn.utils.get_total_norm(gradients)) / scale
    factor = min(1.0, clip / (norm + 1e-6)) / scale if clip else 1.0 / scale
    if math.isfinite(norm) and factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    return norm


def torch_state(optimizer: Optimizer, parameter: nn.Parameter) -> State:
    """A torch optimiser's state of one parameter; a Python integer (a step count) becomes a 0-d int64 tensor."""
    state = optimizer.state.get(parameter, {})
    return {key: value.detach() if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}


def load_torch_state(optimizer: Optimizer, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
    """The inverse of `torch_state`: copies, each in the memory layout that the optimiser itself would have chosen."""
    optimizer.state[parameter] = {key: _laid_out(value, parameter) for key, value in state.items()}


def load_running(optimizer: Optimizer, scalars: Mapping[str, float | int]) -> None:
    """The inverse of `optimizer.running`."""
    for key in running(optimizer):
        if key in scalars:
            optimizer.param_groups[0][key] = scalars[key]


def check_names(states: Mapping[str, object], names: Iterable[str]) -> None:
    """Raises TrainingFailed unless there is a state for each name and no other (or none at all)."""
    odd = sorted(set(states) ^ set(names))
    if states and odd:
        raise TrainingFailed(f"the optimiser state is of another model: {len(odd)} names differ, first {odd[0]}")


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Any:
    if value.ndim == 0 and value.dtype == torch.int64:
        return int(value)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
