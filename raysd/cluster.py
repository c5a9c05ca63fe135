"""Joining a Ray cluster: the one RAY_ADDRESS names, or a local one made for this command."""

import logging
import os
from dataclasses import dataclass

from raysd.config.training import ScaleSpec
from raysd.errors import RequestError
from raysd.quiet import quiet_libraries


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
            cpus = max(os.cpu_count() or 1, most_workers)
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(f"RAY_ADDRESS {address or '(local)'}: no Ray cluster: {reason}") from None
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def allot(scale: ScaleSpec) -> Allotment:
    """Resources of a worker on the cluster as it is. Raises RequestError naming the field that asks for too much."""
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    fewest = scale.workers if isinstance(scale.workers, int) else scale.workers[0]
    use_gpu = gpus >= fewest if scale.gpus is None else scale.gpus
    if use_gpu and gpus < fewest:
        raise RequestError(f"scale.workers {fewest} with a GPU each: this cluster has {gpus} GPUs")
    each = scale.cpus or (1 if use_gpu else max(1, cpus // scale.most_workers))
    if each * fewest > cpus:
        raise RequestError(f"scale.workers {fewest} with {each} CPUs each: this cluster has {cpus} CPUs")
    return Allotment(each, int(use_gpu))
