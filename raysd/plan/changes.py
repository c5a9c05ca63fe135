"""What makes a run fit that does not: the smallest single change, from the one that costs least on."""

from collections.abc import Iterator
from typing import Any

from raysd.config import override
from raysd.config.training import TrainingSpec
from raysd.errors import RequestError
from raysd.methods import METHODS
from raysd.plan.devices import Device
from raysd.plan.estimate import Estimate, Planner, fewest_workers
from raysd.plan.memory import micro_batches

Change = dict[str, Any]


def change_that_fits(planner: Planner, spec: TrainingSpec, name: str, device: Device) -> tuple[Change, Estimate] | None:
    """The first change of the list that fits on the device, with its estimate; several at once where none alone does."""
    singles = list(_singles(spec))
    for change in (*singles, *_together(singles)):
        try:
            estimate = planner.estimate(override(spec, change), name, device)
        except RequestError:  # not with this recipe's other settings
            continue
        if estimate.fits:
            return change, estimate
    return None


def words(change: Change) -> str:
    """As options of the command."""
    return " ".join(f"--{path} {str(value).lower()}" for path, value in change.items())


def _singles(spec: TrainingSpec) -> Iterator[Change]:
    scale, workers = spec.scale, fewest_workers(spec)
    if not scale.gradient_checkpointing:
        yield {"scale.gradient_checkpointing": True}
    size = max(micro_batches(spec, workers))
    while size > 1:
        size //= 2
        yield {"optim.micro_batch": size}
    for stage in range(scale.zero_stage + 1, 4) if workers > 1 else ():
        yield {"scale.zero_stage": stage}
    if scale.offload == "none":
        yield {"scale.offload": "optimizer", **({} if scale.zero_stage else {"scale.zero_stage": 2})}
    if lighter := METHODS[spec.method.kind].lighter:
        yield {"method.kind": lighter}
    more = workers * 2
    while more <= min(64, spec.optim.batch_size):
        yield {"scale.workers": more, **({} if scale.zero_stage else {"scale.zero_stage": 2})}
        more *= 2


def _together(singles: list[Change]) -> Iterator[Change]:
    """Each change on top of those before it, the strongest of a kind."""
    merged: Change = {}
    for change in singles:
        before = dict(merged)
        merged.update(change)
        if before and merged != change:
            yield dict(merged)
