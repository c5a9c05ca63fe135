"""The course of the learning rate, as a pure function of the step: nothing to save, nothing to restore."""

import math

from raysd.config.training import OptimSpec


def factor(step: int, total: int, spec: OptimSpec) -> float:
    """What the learning rate is multiplied by at optimiser step `step` (counted from 0) of `total`.

    It rises linearly over the first `spec.warmup` steps, is 1 at step `spec.warmup`, and then stays there (constant),
    falls linearly, or falls as half a cosine; both reach 0 at step `total`, which is never made: every step that is
    made moves the weights. A warm-up longer than the run is cut off with it.
    """
    if step < spec.warmup:
        return (step + 1) / (spec.warmup + 1)
    if spec.schedule == "constant":
        return 1.0
    done = min(1.0, (step - spec.warmup) / max(1, total - spec.warmup))
    return 1.0 - done if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
