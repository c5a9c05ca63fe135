"""A run's needs on a device: whether it fits, how long it takes, what it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysd.config.training import TrainingSpec
from raysd.errors import RequestError
from raysd.plan.devices import GIB, Device
from raysd.plan.memory import Memory, memory_of, micro_batches
from raysd.plan.trace import Trace, trace

FRAGMENTS = 0.05
"""Share of the peak that the allocator holds and cannot use: an assumption."""

Speedometer = Callable[[TrainingSpec, int, Device], float | None]
"""Seconds a step of a run of this shape that was measured, or None."""


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds, and the table's currency."""

    spec: TrainingSpec
    device: str
    workers: int
    found: Trace
    memory: Memory
    needed: int
    """Of the device: the peak, and what the allocator cannot use."""
    usable: int
    operations: int
    """A step, of the worker that has most."""
    seconds_a_step: float
    measured: bool
    steps: int | None
    cost_an_hour: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds_a_step

    @property
    def cost(self) -> float | None:
        return None if self.seconds is None else self.seconds / 3600 * self.cost_an_hour

    def body(self) -> dict[str, Any]:
        """For JSON."""
        counts = self.found.counts
        return {
            "device": self.device,
            "workers": self.workers,
            "fits": self.fits,
            "parameters": {"trained": counts.trained, "frozen": counts.frozen},
            "micro_batches": micro_batches(self.spec, self.workers),
            "bytes": {
                "needed": self.needed,
                "usable": self.usable,
                "peak": self.memory.peak.total,
                "peak_moment": self.memory.peak.name,
                "saved_for_backward": self.found.saved,
                "moments": {moment.name: dict(moment.parts) for moment in self.memory.moments},
                "host": dict(self.memory.host),
            },
            "operations_a_step": self.operations,
            "steps": self.steps,
            "seconds_a_step": self.seconds_a_step,
            "seconds_from": "measured" if self.measured else "assumed",
            "seconds": self.seconds,
            "cost": self.cost,
        }


class Planner:
    """Estimates of one base; a shape is traced once whatever the device."""

    def __init__(self, folder: Path, steps: int | None, speedometer: Speedometer = lambda *_: None) -> None:
        self.folder, self.steps, self.speedometer = folder, steps, speedometer
        self._traces: dict[tuple[Any, ...], Trace] = {}

    def estimate(self, spec: TrainingSpec, name: str, device: Device) -> Estimate:
        """Raises RequestError for what cannot run on such a device."""
        if device.kind == "cpu" and spec.scale.precision == "fp16":
            raise RequestError("scale.precision fp16 needs a GPU: use bf16 or fp32")
        world = fewest_workers(spec)
        sizes = micro_batches(spec, world)
        found = self._trace(spec, max(sizes), device.kind == "gpu")
        memory = memory_of(found, spec, world)
        host = 0 if device.kind == "gpu" else sum(memory.host.values())
        operations = found.operations * sum(sizes) // max(sizes)
        peak = getattr(device.tflops, spec.scale.precision) * 1e12
        measured = self.speedometer(spec, world, device)
        return Estimate(
            spec=spec,
            device=name,
            workers=world,
            found=found,
            memory=memory,
            needed=int((memory.peak.total + host) * (1 + FRAGMENTS)),
            usable=device.usable,
            operations=operations,
            seconds_a_step=measured or operations / (peak * device.mfu),
            measured=measured is not None,
            steps=self.steps,
            cost_an_hour=-(-world // device.per_node) * device.per_node * device.price,
        )

    def _trace(self, spec: TrainingSpec, size: int, gpu: bool) -> Trace:
        scale = spec.scale
        key = (
            *(size, gpu, spec.data.resolution, spec.method, spec.loss.min_snr_gamma, scale.precision),
            *(scale.gradient_checkpointing, scale.channels_last, scale.zero_stage == 3, _deepspeed(spec)),
        )
        if key not in self._traces:
            try:
                self._traces[key] = trace(self.folder, spec, size, gpu)
            except (RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
                raise RequestError(f"data.resolution {spec.data.resolution}: not for this model: {reason}") from None
        return self._traces[key]


def fewest_workers(spec: TrainingSpec) -> int:
    """Of an elastic run the fewest: then each holds most."""
    return spec.scale.workers if isinstance(spec.scale.workers, int) else spec.scale.workers[0]


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _deepspeed(spec: TrainingSpec) -> bool:
    return spec.scale.zero_stage > 0 or spec.scale.most_workers > 1
