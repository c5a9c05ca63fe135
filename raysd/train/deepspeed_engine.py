"""The engine over DeepSpeed: many workers, or ZeRO stages 1 to 3.

DeepSpeed sees an fp32 model: the lower precision is in the module's forward pass (`Autocast`), so gradients are reduced
and weights gathered in fp32. Its own `torch_autocast` would reduce the gradients of linear and convolutional layers in
bf16, and in fp16 let each rank scale its shard on its own and clip what is still scaled.
"""

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from raysd.config.training import TrainingSpec
from raysd.errors import TrainingFailed
from raysd.train.engine import (
    Autocast,
    LossScale,
    State,
    check_names,
    clip_gradients,
    load_running,
    load_torch_state,
    set_lr,
    torch_state,
    trainable,
)
from raysd.train.optimizer import build_optimizer, running

MOMENTS = ("exp_avg", "exp_avg_sq")

BUCKET = 50_000_000
"""Most elements (200 MB in fp32) that one communication holds in a buffer."""

PERSISTENT = 10_000
"""Stage 3 leaves parameters up to this many elements whole: biases, norms, LoRA matrices of small rank."""


class DeepSpeedEngine:
    """Implements `engine.Engine`. Which methods are collective depends on the stage: treat all as collective.

    With offload at stages 2 and 3 DeepSpeed takes the gradients of those parameters only that the last micro-step used;
    here every micro-step uses all.
    """

    def __init__(self, module: nn.Module, spec: TrainingSpec, *, device: torch.device, rank: int, world: int) -> None:
        deepspeed = _import_deepspeed(device)
        _join(device, rank, world)
        self.module, self.device, self.rank, self.world, self.skipped = module, device, rank, world, False
        self._stage, self._offload = spec.scale.zero_stage, spec.scale.offload == "optimizer"
        self._clip = spec.optim.clip
        self._parameters = trainable(module)
        plain_layout(module)
        self._scale = LossScale(spec.scale.precision)
        self._config = ds_config(module, spec, world)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how it loads extensions
            self._engine = _initialize(deepspeed, module, spec, device, self._config)
        # Stage 0 is reduced by `backward` below, in buckets of our size instead of one the size of the model.
        self._engine.enable_backward_allreduce = self._stage > 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        if self._stage > 0:
            # Stages 2 and 3 reduce and shard gradients while they appear, at each micro-step; stage 1 at the last one.
            if self._scale.dynamic:
                self._engine.optimizer.override_loss_scale(self._scale.value)
            self._engine.backward(loss, scale_wrt_gas=False)
            return
        self._engine.backward(loss * self._scale.value, scale_wrt_gas=False)
        if last:
            self._engine.allreduce_gradients(self._config["zero_optimization"]["reduce_bucket_size"])

    def step(self, lr: float) -> float:
        set_lr(self._engine.optimizer, lr)
        norm = self._sharded_step() if self._stage > 0 else self._whole_step()
        self.skipped = not math.isfinite(norm)
        self._scale.update(not self.skipped)
        return norm

    def _whole_step(self) -> float:
        """Stage 0: every rank has all reduced gradients, and so does the same."""
        norm = clip_gradients(self._parameters.values(), self._clip, self._scale.value)
        self._engine.step() if math.isfinite(norm) else self._engine.zero_grad()
        return norm

    def _sharded_step(self) -> float:
        """Stages 1 to 3: DeepSpeed computes the norm over all shards, unscales, clips, steps, or skips the step."""
        self._engine.step()
        self._forget_gradients()
        return float(self._engine.get_global_grad_norm())

    def _forget_gradients(self) -> None:
        """Stage 3, and offload, overwrite a gradient when the next one comes: a parameter that gets none kept the old."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
        if self._offload:
            optimizer.norm_for_param_grads.clear()
            for flat in self._flats():
                flat.grad.zero_()

    def trainable_names(self) -> list[str]:
        return list(self._parameters)

    def full_weight(self, name: str) -> Tensor:
        parameter: Any = self._parameters[name]
        if self._stage < 3:  # the module's weights are fp32 and whole on every rank
            return parameter.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).view(parameter.ds_shape)

    def write_weight(self, name: str, value: Tensor | None, source: int) -> None:
        parameter: Any = self._parameters[name]
        if self._stage == 3:
            from deepspeed.runtime.zero import GatheredParameters, ZeroParamStatus

            if parameter.ds_status == ZeroParamStatus.INFLIGHT:
                # Fetched ahead for the backward pass that came last time, and none comes after a validation's forward pass.
                self._engine.empty_partition_cache()
            with GatheredParameters([parameter], modifier_rank=source):
                if value is not None and self.rank == source:
                    parameter.data.copy_(value)
            return
        buffer = torch.empty(parameter.shape, device=self.device)
        if value is not None and self.rank == source:
            buffer.copy_(value)
        dist.broadcast(buffer, source)
        parameter.data.copy_(buffer)

    def optimizer_state(self, name: str) -> State:
        inner, parameter = self._inner(), self._parameters[name]
        if self._stage == 0:
            return torch_state(inner, parameter)
        kept = [inner.state[flat] for flat in self._flats() if inner.state.get(flat)]
        if not kept:
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return state | {"step": torch.tensor(float(kept[0]["step"]))}

    def load_optimizer_state(self, states: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        check_names(states, self._parameters)
        if not any(states.values()):
            return
        if self._stage > 0:
            self._make_states(float(next(iter(states.values())).get("step", steps)))
        for name, state in states.items():
            self._load_state(self._parameters[name], state)

    def scalars(self) -> dict[str, float | int]:
        return self._scale.scalars() | running(self._inner())

    def load_scalars(self, scalars: Mapping[str, float | int]) -> None:
        self._scale.load(scalars)
        load_running(self._inner(), scalars)

    def _inner(self) -> Optimizer:
        """The torch optimiser: over the module's parameters at stage 0, else over this rank's flat shards."""
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self._stage > 0 else optimizer

    def _flats(self) -> list[Any]:
        """This rank's fp32 shards of the trained weights, one a group of parameters, each flat."""
        optimizer = self._engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    def _make_states(self, steps: float) -> None:
        """Zero moments after `steps` steps. DeepSpeed makes them at the first step only, and links them then."""
        inner = self._inner()
        for flat in self._flats():
            count = {"step": torch.tensor(steps, device=flat.device)}
            inner.state[flat] = count | {key: torch.zeros_like(flat.data) for key in MOMENTS}
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_state(self, parameter: Any, state: Mapping[str, Tensor]) -> None:
        """Each rank takes its own part of the full moments. Nothing is communicated."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            load_torch_state(self._inner(), parameter, state)
            return
        for key in MOMENTS:
            value = state[key].to(self.device)
            if self._stage < 3:
                safe_set_full_optimizer_state(parameter, value, key)
            else:  # the full setter fails where the size is no multiple of the number of ranks
                safe_set_local_optimizer_state(parameter, self._part(value, parameter.ds_tensor.numel()), key)

    def _part(self, value: Tensor, size: int) -> Tensor:
        """This rank's `size` elements of a tensor, flat; the last rank's are padded with zeros."""
        flat = value.flatten()
        return nn.functional.pad(flat, (0, size * self.world - flat.numel()))[self.rank * size : (self.rank + 1) * size]


def ds_config(module: nn.Module, spec: TrainingSpec, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with each default that has changed between versions, or could, set.

    Buffers are a part of the model's size: with DeepSpeed's own sizes (half a billion elements and more) a model of
    less than that would be held whole, and stage 3 would save nothing.
    """
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in module.parameters())
    sharded = spec.scale.zero_stage > 0
    zero: dict[str, Any] = {"stage": spec.scale.zero_stage, **bucket_sizes(trained, whole)}
    if spec.scale.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for its counters: the loop cuts the global batch itself
        "gradient_accumulation_steps": 1,  # and says which micro-step is the last
        "train_batch_size": world,
        "gradient_clipping": (spec.optim.clip or 0.0) if sharded else 0.0,  # stage 0 is clipped here
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": sharded,  # torch's fused AdamW: `build_optimizer` lets no other through
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 2**62,
    }


def bucket_sizes(trained: int, whole: int) -> dict[str, int]:
    """DeepSpeed's buffers, in elements, for so many trained parameters and so many in the whole module."""
    return {
        "reduce_bucket_size": _part_of(trained, 8),
        "allgather_bucket_size": _part_of(trained, 8),
        "stage3_prefetch_bucket_size": _part_of(whole, 16),
        "stage3_max_live_parameters": max(1, whole // 8),
        "stage3_max_reuse_distance": _part_of(whole, 16),
        "stage3_param_persistence_threshold": PERSISTENT,
        "sub_group_size": max(1, trained // 4),
    }


def _part_of(size: int, parts: int) -> int:
    return min(BUCKET, max(2**16, size // parts))


def plain_layout(module: nn.Module) -> None:
    """DeepSpeed flattens and broadcasts parameters as plain memory: instead of channels_last weights, such inputs.

    A convolution then runs the same kernels and hands the layout on.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and not part.weight.is_contiguous():
            part.register_forward_pre_hook(_channels_last)
    for tensor in (*module.parameters(), *module.buffers()):
        # A 1 x 1 kernel is contiguous in both layouts; only through its flat form does it get the plain strides.
        tensor.data = tensor.data.contiguous().reshape(-1).view(tensor.shape)


def _channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]


def _initialize(
    deepspeed: ModuleType, module: nn.Module, spec: TrainingSpec, device: torch.device, config: dict[str, Any]
) -> Any:
    stage, parameters = spec.scale.zero_stage, list(trainable(module).values())
    optimizer = build_optimizer(parameters, spec.optim, sharded=stage > 0)
    # At stage 3 a cache of casted weights would keep the whole model while only parts of it are gathered.
    model = Autocast(module, device, spec.scale.precision, cache=stage < 3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, config=config, dist_init_required=False
    )
    return engine


def _import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, told which device is ours (it would go by rank), quiet, and without what it does not need to start."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", "0")
    else:
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # On CPU it would compile (40 s, g++) a collective that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # To learn that our optimiser is not its Muon, it would load Muon and for that torch's compiler (2 s).
    stub = ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
    stub.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(stub.__name__, stub)
    return deepspeed


def _join(device: torch.device, rank: int, world: int) -> None:
    """With several ranks the process group is the caller's; a single one makes its own where there is none."""
    if dist.is_initialized():
        return
    if world > 1:
        raise TrainingFailed("torch.distributed has no process group: make it before the engine")
    backend = "gloo" if device.type == "cpu" else "nccl"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
