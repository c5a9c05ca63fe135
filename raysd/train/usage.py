"""What a worker really took: the peak of its memory, and its time."""

import contextlib
import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Usage:
    """Counts from the moment when the model is built and on its device.

    On a GPU the peak is that of torch's allocator. On a CPU it is the process's growth over what it held then, and the
    model: what torch and its libraries keep for themselves is in it.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device, self._began = device, time.monotonic()
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if device.type == "cpu":
            model = sum(p.numel() * p.element_size() for p in (*module.parameters(), *module.buffers()))
            _forget_peak()
            self._before = _resident("VmRSS:") - model

    def body(self, world: int, steps: int) -> dict[str, Any]:
        """Of the worker that needed most. COLLECTIVE."""
        peak = torch.tensor(float(self._peak()), dtype=torch.float64, device=self._device)
        if world > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        gpu = self._device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self._device) if gpu else "cpu",
            "world": world,
            "peak": int(peak.item()),
            "seconds": time.monotonic() - self._began,
            "steps": steps,
        }

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _resident("VmHWM:") - self._before)


def _forget_peak() -> None:
    """From here on the peak is what is held now. Only Linux can; elsewhere the imports' peak is in it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _resident(field: str) -> int:
    """Bytes of the process in memory, now (VmRSS) or at most (VmHWM); at most for both where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
