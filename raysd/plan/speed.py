"""How fast runs of this storage were, and what they really took."""

import json
from itertools import pairwise
from statistics import median
from typing import Any

from raysd.config.training import TrainingSpec
from raysd.errors import NotFound, RaysdError
from raysd.plan.devices import Device
from raysd.plan.estimate import Speedometer
from raysd.storage import Storage
from raysd.train import runs

FEWEST = 5
"""Steps that a measurement needs."""

SCALE = {"zero_stage", "offload", "precision", "gradient_checkpointing", "channels_last", "compile"}


def measured_in(root: Storage) -> Speedometer:
    """Seconds a step of the newest run in this storage of the same shape, number of workers and device."""

    def seconds(spec: TrainingSpec, world: int, device: Device) -> float | None:
        wanted = shape_of(spec)
        newest: tuple[float, float] | None = None
        for name in runs.names(root):
            run = runs.storage_of(root, name)
            usage = usage_of(run)
            if usage is None or usage["world"] != world or not device.is_named(usage["device"]):
                continue
            try:
                record = runs.read(root, name)
                same = shape_of(record.training_spec()) == wanted
            except RaysdError:  # of another version of raysd
                continue
            found = seconds_a_step(run) if same else None
            if found is not None and (newest is None or record.created > newest[0]):
                newest = record.created, found
        return None if newest is None else newest[1]

    return seconds


def shape_of(spec: TrainingSpec) -> dict[str, Any]:
    """All that a step's duration depends on, but for the machine and the number of workers."""
    optim, scale = spec.optim, spec.scale
    return {
        "base": spec.base,
        "resolution": spec.data.resolution,
        "method": spec.method.model_dump(),
        "optim": (optim.kind, optim.batch_size, optim.micro_batch, optim.ema is None),
        "scale": scale.model_dump(include=SCALE),
    }


def seconds_a_step(run: Storage) -> float | None:
    """Median time between two steps of a run's metrics; None if there are too few."""
    times = [(row["step"], row["time"]) for row in runs.metrics(run) if "loss" in row and "time" in row]
    gaps = [b - a for (first, a), (second, b) in pairwise(times) if second == first + 1 and b > a]
    return median(gaps) if len(gaps) >= FEWEST else None


def usage_of(run: Storage) -> dict[str, Any] | None:
    """What a run's workers said at their end: device, world, peak bytes, seconds, steps."""
    try:
        return dict(json.loads(run.read(runs.USAGE)))
    except (NotFound, ValueError):
        return None
