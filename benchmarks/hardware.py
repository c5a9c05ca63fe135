"""What the numbers were measured on: processor, its flags, GPU, versions of the libraries."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("raysd", "torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "accelerate")
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""A CPU without one of these computes bf16 by way of fp32: slower than fp32 itself."""


def describe(gpu: bool) -> dict[str, Any]:
    """Processor, cores, flags and memory, and the GPU where `gpu`: the benchmark ran on it."""
    said = _lscpu()
    flags = said.get("Flags", "").split()
    return {
        "cpu": said.get("Model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_core": said.get("Thread(s) per core"),
        "native_bf16": bool(BF16_FLAGS & set(flags)),
        "flags": flags,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_name() if gpu else None,
    }


def slug(hardware: dict[str, Any]) -> str:
    """For file names: intel-xeon-2-80ghz-2-cores-cpu, or the name of the GPU."""
    name = hardware["gpu"] or f"{hardware['cpu']} {hardware['cores']} cores cpu"
    plain = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def gpu_name() -> str | None:
    """The first GPU that torch sees, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The commit that was measured, with a '+' where the working tree differed from it."""
    try:
        head = _said("git", "rev-parse", "--short=12", "HEAD").strip()
        return head + ("+" if _said("git", "status", "--porcelain", "--", "raysd").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def bf16_note(hardware: dict[str, Any]) -> str:
    """One sentence for a result that has bf16 in it."""
    if hardware["gpu"] or hardware["native_bf16"]:
        return "bf16 is native on this hardware."
    return (
        "This CPU has neither amx_bf16 nor avx512_bf16 (flags in the result file): bf16 is computed by way of fp32 and is "
        "slower than fp32 for both sides; use fp32 on such a CPU."
    )


def _lscpu() -> dict[str, str]:
    try:
        lines = _said("lscpu").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _said(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
