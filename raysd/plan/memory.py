"""What is alive on a worker, part by part, at the moments when it is most.

Names as in Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, sections 3 and 5): P trained parameters, N workers; weights,
gradients and optimiser state are the model states, all the rest is residual. The paper's mixed-precision Adam takes
2 P + 2 P + 12 P bytes; here weights are fp32 (4 P), gradients 4 P and Adam's moments 8 P, which is the same 16 P, and the
low-precision copies that autocast makes come on top, among the activations. What DeepSpeed keeps besides (a second
copy of the weights' own shard at stages 1 and 2, buckets, flat copies) is listed as it is in its source, version 0.19.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from raysd.config.training import OptimSpec, TrainingSpec
from raysd.data.sampler import share
from raysd.plan.shapes import Counts
from raysd.plan.trace import Trace
from raysd.train.deepspeed_engine import bucket_sizes
from raysd.train.ema import owners


@dataclass(frozen=True)
class Moment:
    """Bytes alive at once, by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Of the worker that needs most: on its device at each moment, and in the host's memory."""

    moments: tuple[Moment, ...]
    host: Mapping[str, int]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


def micro_batches(spec: TrainingSpec, world: int) -> list[int]:
    """Pictures of each micro-step of the worker that has most, cut as the loop cuts them."""
    places = list(range(spec.optim.batch_size))
    parts = share(places, world - 1, world, spec.optim.micro_batch)  # type: ignore[arg-type]
    return [len(part) for part in parts]


def memory_of(found: Trace, spec: TrainingSpec, world: int) -> Memory:
    """Memory of a worker among `world`; `found` is the trace of its largest micro-batch."""
    stage = spec.scale.zero_stage
    if stage == 0:
        return _whole(found, spec, world)
    return _sharded_weights(found, spec, world) if stage == 3 else _sharded_states(found, spec, world)


def _whole(found: Trace, spec: TrainingSpec, world: int) -> Memory:
    """Stage 0: everything on every worker. Gradients stay from one micro-step to the next."""
    counts = found.counts
    kept = _always(counts, spec, world) | {"optimiser state": optimizer_bytes(counts, spec.optim)}
    bucket = 4 * bucket_sizes(counts.trained, counts.whole)["reduce_bucket_size"] if world > 1 else 0
    step = {"gradients": counts.trained_bytes, "buckets": bucket}
    return Memory((_backward(found, kept, _staying(counts, spec, world, 0)), Moment("step", kept | step)), {})


def _sharded_states(found: Trace, spec: TrainingSpec, world: int) -> Memory:
    """Stages 1 and 2: whole weights, in one flat buffer; an fp32 copy of the own shard, and moments of that shard."""
    counts, stage = found.counts, spec.scale.zero_stage
    shard = -(-counts.trained_bytes // world)
    bucket = 4 * bucket_sizes(counts.trained, counts.whole)["reduce_bucket_size"]
    kept = _always(counts, spec, world)
    host: dict[str, int] = {}
    if spec.scale.offload == "optimizer":
        kept |= {"offload buffer": 4 * counts.largest}
        host = _offloaded(counts, spec, world)
    else:
        kept |= {"fp32 copy of the shard": shard, "optimiser state": 2 * shard}
    own = 0 if host else shard  # gradients of the own shard, whole, that wait for the step
    waiting = own * (2 if stage == 2 and len(micro_batches(spec, world)) > 1 else 1)
    if stage == 2:

        def held(gradients: int) -> int:
            return 0 if not gradients else bucket if gradients <= bucket else 2 * bucket + waiting

        moments = [_backward(found, kept, held)]
    else:
        moments = [
            _backward(found, kept, _staying(counts, spec, world, bucket)),
            # Gradients leave for the bucket as they are reduced: the two together stay one size.
            Moment("reduction", kept | {"gradients": counts.trained_bytes, "gradients of the shard": own}),
        ]
    step = Moment("step", kept | {"gradients": own, "flat copy of gradients": own})
    return Memory((*moments, step), host)


def _sharded_weights(found: Trace, spec: TrainingSpec, world: int) -> Memory:
    """Stage 3: weights too are sharded, frozen ones as well; a part of them is gathered at a time."""
    counts = found.counts
    shard = -(-counts.trained_bytes // world)
    sizes = bucket_sizes(counts.trained, counts.whole)
    width = (counts.trained_bytes + counts.frozen_bytes) / counts.whole
    gathered = sizes["stage3_max_live_parameters"] + sizes["stage3_prefetch_bucket_size"]
    kept = {
        "weights": shard,
        "frozen weights": -(-counts.frozen_bytes // world),
        "small weights, whole": counts.small if world > 1 else 0,
        "gradients": shard,
        "buckets": 4 * sizes["reduce_bucket_size"],
        "moving average": _average(counts, spec, world),
    }
    groups = max(1, min(4, -(-shard // (4 * sizes["sub_group_size"]))))
    host: dict[str, int] = {}
    if spec.scale.offload == "optimizer":
        kept["gradients"] = 0
        host = _offloaded(counts, spec, world)
    else:
        kept |= {"fp32 copy of the shard": shard, "optimiser state": 2 * shard}
    live = {"gathered weights": int(min(gathered, counts.whole) * width)}
    backward = _backward(found, kept | live, lambda gradients: 0)
    step = Moment("step", kept | {"flat copy of gradients": 0 if host else shard // groups})
    start = Moment("start", {"weights": counts.trained_bytes, "frozen weights": counts.frozen_bytes})
    return Memory((start, backward, step), host)


def _always(counts: Counts, spec: TrainingSpec, world: int) -> dict[str, int]:
    return {
        "weights": counts.trained_bytes,
        "frozen weights": counts.frozen_bytes,
        "moving average": _average(counts, spec, world),
    }


def _backward(found: Trace, kept: Mapping[str, int], held: Callable[[int], int]) -> Moment:
    """The moment of the backward pass when most is alive; `held`: what gradients of so many bytes keep by then."""
    _, live, gradients = max((live + held(whole), live, held(whole)) for whole, live in found.course)
    return Moment("backward", {**kept, "activations": live, "gradients and buckets": gradients})


def _staying(counts: Counts, spec: TrainingSpec, world: int, bucket: int) -> Callable[[int], int]:
    """Stages 0 and 1: gradients stay until the step; from the second micro-step on all are there from the start."""
    if len(micro_batches(spec, world)) > 1:
        return lambda gradients: counts.trained_bytes + bucket
    return lambda gradients: gradients + (bucket if gradients else 0)


def _offloaded(counts: Counts, spec: TrainingSpec, world: int) -> dict[str, int]:
    """In the host's memory: fp32 weights, moments and gradients of the shard, and what copying goes through."""
    shard = -(-counts.trained_bytes // world)
    host = {"fp32 copy of the shard": shard, "optimiser state": 2 * shard, "gradients": shard, "copy buffers": shard}
    if spec.scale.zero_stage < 3:
        host["copy buffers"] += 4 * counts.largest
        if len(micro_batches(spec, world)) > 1:
            host["accumulated gradients"] = shard
    return host


def _average(counts: Counts, spec: TrainingSpec, world: int) -> int:
    """Of the rank that keeps most."""
    if spec.optim.ema is None:
        return 0
    load = [0] * world
    for name, owner in owners(counts.shapes, world).items():
        load[owner] += 4 * counts.shapes[name].numel()
    return max(load)


def optimizer_bytes(counts: Counts, spec: OptimSpec) -> int:
    """State beside whole tensors (stage 0), step counts left out."""
    return sum(STATES[spec.kind](shape) for shape in counts.shapes.values())


def _adamw(shape: torch.Size) -> int:
    return 8 * shape.numel()


def _adamw8bit(shape: torch.Size) -> int:
    """Two moments of a byte, a scale for each block of 256; tensors below 4096 elements keep fp32."""
    size = shape.numel()
    return 8 * size if size < 4096 else 2 * size + 2 * 4 * -(-size // 256)


def _adafactor(shape: torch.Size) -> int:
    """Row and column means of the squared gradient (Shazeer and Stern 2018, algorithm 4)."""
    if len(shape) < 2:
        return 4 * shape.numel()
    return 4 * (shape[:-1].numel() + (shape[:-2] + shape[-1:]).numel())


def _prodigy(shape: torch.Size) -> int:
    """Two moments, the weights at the start, and their distance's estimate."""
    return 16 * shape.numel()


STATES = {"adamw": _adamw, "adamw8bit": _adamw8bit, "adafactor": _adafactor, "prodigy": _prodigy}
