"""Who computes with how many threads in a replica.

OpenMP keeps a pool of threads for each thread that ever computed with several. As soon as all pools together have more
threads than there are cores, none of them waits awake between two operations any more, and small operations take twice
as long. So one thread of a replica, the scheduler's, keeps a pool; others that compute end when they have.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")


def in_passing(call: Callable[[], Value]) -> Value:
    """What `call` returns, computed by a thread that ends with it, and its pool with that."""
    with ThreadPoolExecutor(1) as passing:
        return passing.submit(call).result()
