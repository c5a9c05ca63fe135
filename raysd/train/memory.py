"""Memory that ran out: which errors mean it, and what to try then."""

import os

import torch

from raysd.config import TrainingSpec
from raysd.methods import METHODS


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def memory_advice(spec: TrainingSpec, error: BaseException) -> str:
    """For an error that a worker met itself."""
    asked = (str(error).splitlines() or ["out of memory"])[0][:200]
    return f"out of memory on {os.uname().nodename}: {asked}\n{memory_remedy(spec)}"


def killed_for_memory(problem: BaseException) -> str | None:
    """What Ray Train's error says of a worker that the kernel or Ray's memory monitor killed; None for other ends."""
    for rank, failure in sorted(getattr(problem, "worker_failures", {}).items()):
        cause = getattr(failure, "health_check_failure", failure)
        how = how_killed(f"{type(cause).__name__}: {cause}")
        if how is not None:
            return f"rank {rank} {how}"
    return None


def how_killed(error: str) -> str | None:
    """Of the text of Ray's error about a process that ended: how, where it says that memory ran out."""
    if "OutOfMemoryError:" in error:
        return "was killed, as its node ran out of memory"
    if "SIGKILL" in error:  # Ray names the kernel's killer as one of the causes: it cannot see which it was
        return "was killed (SIGKILL), perhaps by the kernel, as its node ran out of memory"
    return None


def memory_remedy(spec: TrainingSpec) -> str:
    """What was asked for, and what to try instead: two lines."""
    per_worker = -(-spec.optim.batch_size // spec.scale.most_workers)
    tries = []
    if (spec.optim.micro_batch or per_worker) > 1:
        tries.append(f"--optim.micro_batch {max(1, (spec.optim.micro_batch or per_worker) // 2)}")
    if not spec.scale.gradient_checkpointing:
        tries.append("--scale.gradient_checkpointing true")
    if spec.scale.precision == "fp32":
        tries.append("--scale.precision bf16")
    if spec.scale.zero_stage < 3 and spec.scale.most_workers > 1 and spec.optim.kind == "adamw":
        tries.append(f"--scale.zero_stage {spec.scale.zero_stage + 1}")
    if lighter := METHODS[spec.method.kind].lighter:
        tries.append(f"--method.kind {lighter}")
    return (
        f"asked for: batch {spec.optim.batch_size} over {spec.scale.most_workers} workers at {spec.data.resolution} px\n"
        f"try: {' or '.join(tries[:3]) or 'a smaller data.resolution or a larger machine'}"
    )
