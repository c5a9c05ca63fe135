"""A torch.profiler trace of a few steps, kept with the run."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from raysd.storage import Storage

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""Steps passed over, warmed up and recorded."""


class Profiler:
    """Records steps 4 to 6 and writes profile.json, which chrome://tracing and Perfetto open."""

    def __init__(self, run: Storage):
        self.run = run
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True)
        self._profile.start()
        self._left = WAIT + WARMUP + ACTIVE

    def step(self) -> None:
        """A step has ended."""
        if self._left > 0:
            self._profile.step()
            self._left -= 1
            if self._left == 0:
                self._profile.stop()

    def _write(self, trace: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="raysd-") as scratch:
            path = Path(scratch) / "profile.json"
            trace.export_chrome_trace(str(path))
            self.run.upload(path, "profile.json")
