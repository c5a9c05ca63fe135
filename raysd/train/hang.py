"""A worker that gets no further ends itself, with the stack of each of its threads in the run's folder.

A collective that one rank never enters holds all of them for ever (a dead link, a deadlock in a driver). Each rank
watches itself, as none can tell who is to blame; the worker group is then started again from the last checkpoint.
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

EXIT = 75
"""Exit status of a worker that ended itself."""
LAST_WORDS = 15.0
"""Seconds in which all ranks write down their stacks, before the first one ends and takes the others with it."""


class HangWatch:
    """Calls `tell(stacks)` after `seconds` without a `beat`, then ends this process. `end` takes the exit status."""

    def __init__(self, seconds: float, tell: Callable[[str], None], end: Callable[[int], None] = os._exit):
        self._seconds, self._tell, self._end = seconds, tell, end
        self._last = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def beat(self) -> None:
        """It goes on."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._seconds / 10)):
            if time.monotonic() - self._last < self._seconds:
                continue
            # The store may be what hangs: telling must not keep this process from its end.
            telling = threading.Thread(target=self._tell, args=(stacks(),), daemon=True)
            telling.start()
            self._closed.wait(min(LAST_WORDS, self._seconds / 2))
            if not self._closed.is_set() and time.monotonic() - self._last >= self._seconds:
                return self._end(EXIT)


def stacks() -> str:
    """The stack of each thread of this process, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
