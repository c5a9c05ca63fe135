"""How many bytes of tensors are alive during a training step, on one CPU process or on several ranks.

Not resident memory, which depends on the allocator, but what PyTorch asks its allocator for and gives back (the profiler's
memory events) on top of the storages that exist when the step begins.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loops import Task, raysd_loop

SETTLED = 1
"""Steps before the one that is looked at: from the second on, the optimiser's state is there."""


def ranks_peaks(rank: int, tasks: list[Task], world: int) -> list[int]:
    """For `benchmarks.spawned`: bytes at the peak of a step of each task, on this rank."""
    import diffusers  # noqa: F401

    from raysd.quiet import import_quickly

    import_quickly()  # as a worker has it: circular garbage lives as long here
    return [peak(task, rank, world) for task in tasks]


def peak(task: Task, rank: int, world: int) -> int:
    before = bytes_of_tensors()  # what an earlier task's engine did not let go
    loop = raysd_loop(task, torch.device("cpu"), rank, world)
    for _ in range(SETTLED):
        next(loop)
    resting = bytes_of_tensors() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        next(loop)
    highest = _highest(profiler)
    close(loop)
    return resting + highest


def bytes_of_tensors() -> int:
    """Of all storages that a tensor of this process refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


def _highest(profiler: profile) -> int:
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def close(loop: Iterator[float]) -> None:
    """Nothing of a task is left for the next one."""
    getattr(loop, "close", lambda: None)()
    gc.collect()


def folder_of(root: Path, shape: dict[str, object]) -> Path:
    """Configurations only, as of a model that is elsewhere."""
    from benchmarks import bases

    bases._write(root / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **shape})
    bases._write(root / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    bases._write(root / "vae" / "config.json", bases.AUTOENCODER)
    bases._write(root / "scheduler" / "scheduler_config.json", bases.SCHEDULER)
    return root
