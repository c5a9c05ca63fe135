"""Timing of loops in turns, A B A B, so that a slow minute of the machine falls on both."""

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median, quantiles
from typing import Any

Blocks = list[list[float]]
"""Seconds of each step, a list a turn."""


def clocked(loop: Iterator[Any], steps: int) -> list[float]:
    """Seconds of each of the next steps. A step ends when its loss is a number on the host."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        next(loop)
        seconds.append(time.perf_counter() - began)
    return seconds


def alternated(
    loops: Mapping[str, Iterator[Any]], turns: int, steps: int, warmup: int, ready: Callable[[], object] = lambda: None
) -> dict[str, Blocks]:
    """`turns` turns of `steps` steps each, every loop once a turn; `ready` is called before each, untimed."""
    for loop in loops.values():
        clocked(loop, warmup)
    blocks: dict[str, Blocks] = {name: [] for name in loops}
    for _ in range(turns):
        for name, loop in loops.items():
            ready()
            blocks[name].append(clocked(loop, steps))
    return blocks


def typical(blocks: Blocks) -> float:
    """The median step."""
    return median(seconds for block in blocks for seconds in block)


def flat(blocks: Blocks) -> list[float]:
    return [seconds for block in blocks for seconds in block]


def spread(above: Blocks, below: Blocks) -> str:
    """Quartiles over the turns of the ratio of the medians: how far to trust the ratio."""
    ratios = [median(a) / median(b) for a, b in zip(above, below, strict=True)]
    if len(ratios) < 2:
        return "one turn"
    low, _, high = quantiles(ratios, n=4)
    return f"{low:.3f} to {high:.3f}"
