"""How a cluster is shared out among the trials of a search."""

from contextlib import suppress
from dataclasses import dataclass

from raysd import cluster
from raysd.config import SearchSpec, TrainingSpec, override
from raysd.config.training import ScaleSpec
from raysd.errors import SpecError
from raysd.tune.space import corners


@dataclass(frozen=True)
class Room:
    """How many trials run at once, and what each of their workers gets."""

    trials: int
    cpus: int
    gpus: int


def room_for(spec: SearchSpec, training: TrainingSpec) -> Room:
    """Share out the cluster, as large as it may become, so that each trial that the space allows has room.

    Raises RequestError if there is none for one of them.
    """
    rooms = [_room(spec, scale) for scale in scales(spec, training)]
    return Room(min(room.trials for room in rooms), min(room.cpus for room in rooms), max(room.gpus for room in rooms))


def scales(spec: SearchSpec, training: TrainingSpec) -> list[ScaleSpec]:
    """What trials may ask of the cluster: the recipe's scale with each combination of the space's extremes."""
    found = []
    for changes in corners(spec, [path for path in spec.space if path.startswith("scale.")]):
        with suppress(SpecError):  # only with other values of the space beside it
            found.append(override(training.scale, {path.removeprefix("scale."): v for path, v in changes.items()}))
    return found or [training.scale]


def _room(spec: SearchSpec, scale: ScaleSpec) -> Room:
    each = cluster.allot(scale)
    most = cluster.capacity()
    workers, asked = scale.most_workers, scale.cpus or 1
    rooms = [int(most.get("CPU", 1)) // (workers * asked)]
    if each.gpus:
        rooms.append(int(most.get("GPU", 0)) // workers)
    trials = min(spec.concurrent or max(1, min(rooms)), spec.trials)
    if scale.cpus or each.gpus:
        return Room(trials, each.cpus, each.gpus)
    return Room(trials, max(1, int(most.get("CPU", 1)) // (workers * trials)), 0)
