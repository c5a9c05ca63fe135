"""One micro-step of a run on tensors without data: what would be alive when, and how many operations it takes.

The forward pass, the loss and the backward pass are the trainer's own, run by PyTorch; so what autograd saves, what
autocast copies, what attention's kernel keeps and what gradient checkpointing computes again are counted as they are.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from raysd.config.training import TrainingSpec
from raysd.methods import METHODS
from raysd.plan.shapes import Counts, batch_of, build, count, no_memory, take_off_meta
from raysd.train.deepspeed_engine import plain_layout
from raysd.train.engine import Autocast


@dataclass(frozen=True)
class Trace:
    """Of one micro-step of one worker. Bytes besides the module's parameters and buffers."""

    counts: Counts
    saved: int
    """Alive between forward and backward pass: what the latter needs."""
    course: tuple[tuple[int, int], ...]
    """(bytes of gradients that are whole, most bytes besides them that are alive meanwhile), in the order of the pass."""
    operations: int
    """Multiplications and additions of both passes, recomputation included."""

    @property
    def peak(self) -> int:
        """Most at once, gradients leaving as soon as they are whole."""
        return max(live for _, live in self.course)


def trace(folder: Path, spec: TrainingSpec, size: int, gpu: bool) -> Trace:
    """Run a micro-step of `size` pictures at `data.resolution` without allocating anything.

    `gpu`: autocast as on CUDA, where norms and sums are computed in fp32; on CPU they stay in the lower precision.
    Raises RequestError where the model cannot take such pictures.
    """
    module = build(folder, spec)
    with no_memory():
        take_off_meta(module)
        plain = spec.scale.zero_stage > 0 or spec.scale.most_workers > 1
        if plain:
            plain_layout(module)
        if gpu:
            _norms_as_on_cuda(module)
        forward = Autocast(module, torch.device("cpu"), spec.scale.precision, cache=spec.scale.zero_stage < 3)
        meter = Meter(module)
        with meter:
            batch, schedule = batch_of(folder, spec, size)
            loss = METHODS[spec.method.kind].loss(forward, batch, schedule, spec).sum()
            saved = meter.live
            loss.backward()
        return Trace(count(module), saved, tuple(meter.course), meter.operations)


class Meter(TorchDispatchMode):
    """Bytes of storages that operations made and that something still refers to; multiplications and additions.

    Gradients of parameters are taken away as they become whole and counted apart.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = self.operations = 0
        self.course = [(0, 0)]
        self._known: dict[int, weakref.ref[Any]] = {}
        self._own = {id(t.untyped_storage()) for t in (*module.parameters(), *module.buffers())}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._take_gradient) for p in module.parameters() if p.requires_grad
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := OPERATIONS.get(func._overloadpacket)) is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or key in self._own:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        gradients, most = self.course[-1]
        self.course[-1] = gradients, max(most, self.live)

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients = self.course[-1][0] + parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self.course.append((gradients, self.live))


def _norms_as_on_cuda(module: nn.Module) -> None:
    """CUDA's autocast computes norms in fp32, the CPU's does not (torch's Autocast Op Reference)."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_pre_hook(_in_fp32)


def _in_fp32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].float(), *inputs[1:]) if torch.is_autocast_enabled("cpu") else inputs


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The kernel that keeps no matrix of all pairs; CUDA's flash and memory-efficient kernels keep the same tensors."""
OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    ATTENTION: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
