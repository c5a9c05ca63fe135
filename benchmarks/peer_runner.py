"""Runs diffusers' training script as it is, noting when each step ended: PYTHON peer_runner.py OUT SCRIPT [ARGUMENT ...]

Needs nothing of raysd: it runs in the peer's own environment. torchvision has no CPU build; beside the CPU torch it imports
once the two operators that it decorates are declared.
"""

import json
import runpy
import sys
import time
from pathlib import Path

import accelerate  # type: ignore[import-untyped]
import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def main() -> None:
    out, script, *arguments = sys.argv[1:]
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(operator)
    steps: list[float] = []
    plain = accelerate.Accelerator.log

    def log(self: accelerate.Accelerator, values: dict[str, float], step: int | None = None, **rest: object) -> None:
        steps.append(time.time())
        plain(self, values, step=step, **rest)

    accelerate.Accelerator.log = log
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    Path(out).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
