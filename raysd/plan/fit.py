"""Before a run starts on GPUs whose memory is known: does it fit? On CPU, or where it is not known, nothing is done."""

import os
from pathlib import Path

from raysd import cluster
from raysd.config.training import TrainingSpec
from raysd.errors import RequestError
from raysd.plan.devices import OVERRIDE, Device, devices

TOLERANCE = 1.15
"""Plans were within this of what was measured: beyond it a run is refused, up to it there is a warning."""

PREFIX = "accelerator_type:"


def check_fit(spec: TrainingSpec, folder: Path) -> str | None:
    """A warning, or None. The cluster is joined. Raises RequestError for a run that cannot fit on any of its GPUs."""
    if spec.scale.gpus is False or cluster.allot(spec.scale).gpus == 0:
        return None
    found = candidates(spec)
    return compare(spec, folder, found) if found else None


def check_dry(spec: TrainingSpec, folder: Path) -> str | None:
    """The same without a run: of RAY_ADDRESS's cluster, else of this machine's GPUs."""
    if spec.scale.gpus is False:
        return None
    if os.environ.get("RAY_ADDRESS"):
        cluster.join(spec.scale.most_workers)
        return check_fit(spec, folder)
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    found = next(((label, entry) for label, entry in devices().items() if entry.is_named(name)), None)
    return None if found is None else compare(spec, folder, [found])


def compare(spec: TrainingSpec, folder: Path, found: list[tuple[str, Device]]) -> str | None:
    """A warning where the run fits none of these GPUs, or not all. Raises RequestError where it cannot fit the largest."""
    from raysd.plan.changes import change_that_fits, words
    from raysd.plan.estimate import Planner, gib

    planner = Planner(folder, None)
    name, device = max(found, key=lambda item: item[1].usable)
    estimate = planner.estimate(spec, name, device)
    if estimate.fits:
        small = [label for label, entry in found if entry.usable < estimate.needed]
        about = f"this run needs about {gib(estimate.needed)} a GPU: it fits {name}, but not {', '.join(small)}"
        return f"{about}; which it gets is not known here" if small else None
    needs = f"this run needs about {gib(estimate.needed)} a GPU, and {name} has {gib(estimate.usable)}"
    change = change_that_fits(planner, spec, name, device)
    remedy = f"it fits with {words(change[0])}" if change else "no setting makes it fit: use larger GPUs"
    if estimate.needed <= TOLERANCE * estimate.usable:
        return f"{needs}; if it runs out of memory: {remedy}"
    raise RequestError(
        f"scale: {needs}\n{remedy}\nif the device has more, say so in {OVERRIDE} (see raysd plan --help)"
    )


def candidates(spec: TrainingSpec) -> list[tuple[str, Device]]:
    """The entries of all GPUs that the workers may get, on nodes to come too where somebody names those; none if one of
    them is not in the table."""
    kinds = {key.removeprefix(PREFIX) for key in cluster.capacity() if key.startswith(PREFIX)}
    if spec.scale.accelerator:
        kinds = {spec.scale.accelerator}
    found = [(name, entry) for name, entry in devices().items() if kinds & set(entry.ray)]
    return [] if kinds - {kind for _, entry in found for kind in entry.ray} else found
