"""Objects that several processes of one machine read at once: downloaded by the first, removed by the last."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def shared(place: Path, download: Callable[[Path], None]) -> Iterator[Path]:
    """`place` with the object in it. `download(path)` is called by one process, while the others wait for it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not place.exists():  # again: another may have removed it between the two locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                download(place)
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield place
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # others read it still
            else:
                place.unlink(missing_ok=True)
