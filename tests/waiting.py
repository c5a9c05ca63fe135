"""Waiting for what another thread does."""

import time
from collections.abc import Callable


def until(met: Callable[[], bool], seconds: float = 60) -> None:
    """Return as soon as it holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not within {seconds:g} seconds"
        time.sleep(0.02)
