"""A run that was made beside what would have been planned for it."""

import json
from typing import Any

from raysd.errors import NotFound
from raysd.plan.devices import Device, devices
from raysd.plan.estimate import Planner
from raysd.plan.shapes import configurations
from raysd.plan.speed import seconds_a_step, usage_of
from raysd.storage import Storage
from raysd.train import runs

KEPT = "estimate.json"


def beside(root: Storage, name: str, asked: bool = True) -> dict[str, Any] | None:
    """{"peak_bytes" | "seconds_a_step" | "seconds": {"planned": ..., "actual": ...}}, or None if the run said nothing yet.

    What was planned is computed the first time, which takes some ten seconds, and kept in the run's folder. Unless it
    was `asked` for, a run on CPUs is spared that.
    Seconds are planned from the stated assumption, never from the run itself.
    """
    run = runs.storage_of(root, name)
    usage = usage_of(run)
    if usage is None or not (asked or usage["device"] != "cpu" or run.exists(KEPT)):
        return None
    planned = _planned(root, name, run, usage)
    step = seconds_a_step(run)
    return {
        "device": usage["device"],
        "peak_bytes": {"planned": planned["peak_bytes"], "actual": usage["peak"]},
        "seconds_a_step": {"planned": planned["seconds_a_step"], "actual": step},
        "seconds": {"planned": _times(planned["seconds_a_step"], usage["steps"]), "actual": usage["seconds"]},
    }


def _planned(root: Storage, name: str, run: Storage, usage: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(run.read(KEPT)))
    except NotFound:
        pass
    spec = runs.read(root, name).training_spec()
    spec = spec.model_copy(update={"scale": spec.scale.model_copy(update={"workers": usage["world"]})})
    label, device = _entry(usage["device"])
    estimate = Planner(configurations(spec.base, root), None).estimate(spec, label or usage["device"], device)
    planned = {
        "peak_bytes": estimate.memory.peak.total,
        "seconds_a_step": estimate.seconds_a_step if label else None,
    }
    run.write(KEPT, json.dumps(planned).encode())
    return planned


def _entry(name: str) -> tuple[str | None, Device]:
    """The table's entry of a device; of one that it lacks, memory is planned as for any GPU, and no time."""
    table = devices()
    found = next((label for label, entry in table.items() if entry.is_named(name)), None)
    return found, table[found or "H100"]


def _times(seconds: float | None, steps: int) -> float | None:
    return None if seconds is None else seconds * steps
