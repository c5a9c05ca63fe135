"""Threads beside the one that computes.

OpenMP keeps a pool of threads for each thread that computed with several. With more of them than cores none waits awake
between two operations, and small operations take twice as long: so threads that prepare data compute alone.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def preparing(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads compute alone, while others go on computing with as many as before.

    What torch is told in one thread holds for those that compute for the first time later: so it is told again here,
    when the pool's threads have all begun.
    """
    before, begun = torch.get_num_threads(), Barrier(threads)
    pool = ThreadPoolExecutor(threads, name, initializer=_compute_alone)
    list(pool.map(lambda _: begun.wait(), range(threads)))
    torch.set_num_threads(before)
    return pool


def _compute_alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number over when it first asks, or computes
