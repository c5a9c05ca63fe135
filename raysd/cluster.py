"""Joining a Ray cluster: the one RAY_ADDRESS names, or a local one made for this command."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from raysd.config.training import ScaleSpec
from raysd.errors import RaysdError, RequestError
from raysd.quiet import quiet_libraries

GROWS_TO = "RAYSD_CLUSTER_RESOURCES"
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray's switch: 0 where no node is taken away with notice."""
ENTRY_CPUS = "RAYSD_ENTRY_CPUS"
"""What the process of a submitted job takes itself, beside what it starts."""


@dataclass(frozen=True)
class Allotment:
    """What each worker gets."""

    cpus: int
    gpus: int


def join(most_workers: int) -> None:
    """Connect to RAY_ADDRESS, or start a local cluster with a CPU for each worker. Does nothing if connected.

    Library logs go to Ray's session folder instead of the terminal.
    """
    quiet_libraries()
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            os.environ.setdefault(PREEMPTION_WATCHER, "0")  # nobody takes this machine away
            cpus = _own_cpus(most_workers)
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(f"RAY_ADDRESS {address or '(local)'}: no Ray cluster: {reason}") from None
    for name in ("ray", "ray.train", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def result(reference: Any, what: str) -> Any:
    """What a task or an actor returned. Raises our own error that it raised, else RaysdError that `what` failed."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RaysdError):
            raise error.cause from None
        raise RaysdError(f"{what} failed: {(str(error.cause).splitlines() or [''])[0][:200]}") from error
    except RayError as error:
        raise RaysdError(
            f"{what} failed: its workers died ({type(error).__name__}); what was done is kept: the same command goes on"
        ) from error


def capacity() -> dict[str, float]:
    """What the cluster has, or may have when it has grown: Ray does not say, so RAYSD_CLUSTER_RESOURCES does.

    Raises RequestError for a value that is not like CPU=64,GPU=8.
    """
    import ray

    have: dict[str, float] = ray.cluster_resources()
    most: dict[str, float] = {}
    for part in filter(None, os.environ.get(GROWS_TO, "").split(",")):
        name, _, count = part.partition("=")
        if not count.strip().isdecimal():
            raise RequestError(f"{GROWS_TO} {part!r}: expected resources like CPU=64,GPU=8")
        most[name.strip()] = float(count)
    both = {name: max(have.get(name, 0), most.get(name, 0)) for name in {*have, *most}}
    return {**both, "CPU": max(0.0, both.get("CPU", 0) - float(os.environ.get(ENTRY_CPUS, 0)))}


def allot(scale: ScaleSpec) -> Allotment:
    """Resources of a worker; before `join`, those on the local cluster that it would start.

    Raises RequestError naming the field that asks for more than the cluster may ever have.
    """
    import ray

    resources = capacity() if ray.is_initialized() else _own(scale.most_workers)
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    fewest = scale.workers if isinstance(scale.workers, int) else scale.workers[0]
    use_gpu = gpus >= fewest if scale.gpus is None else scale.gpus
    if use_gpu and gpus < fewest:
        raise RequestError(f"scale.workers {fewest} with a GPU each: this cluster has {gpus} GPUs{_advice()}")
    each = scale.cpus or (1 if use_gpu else max(1, cpus // scale.most_workers))
    if each * fewest > cpus:
        raise RequestError(f"scale.workers {fewest} with {each} CPUs each: this cluster has {cpus} CPUs{_advice()}")
    return Allotment(each, int(use_gpu))


def _own(most_workers: int) -> dict[str, float]:
    import torch

    return {"CPU": _own_cpus(most_workers), "GPU": torch.cuda.device_count()}


def _own_cpus(most_workers: int) -> int:
    return max(os.cpu_count() or 1, most_workers)


def _advice() -> str:
    return " at most" if os.environ.get(GROWS_TO) else f"; if it grows, say how far: {GROWS_TO}=CPU=64,GPU=8"
