"""How a job's command ended, for the process that may start it again: exit status 1 alone does not say."""

import os
from contextlib import suppress
from pathlib import Path

from raysd.errors import AlreadyExists, LeaseLost, RaysdError, Stale, StorageError

FILE = "RAYSD_JOB_OUTCOME"
PASSING = "passing"


def note(error: BaseException) -> None:
    """Called where a command ends in an error. Does nothing outside of a job."""
    path = os.environ.get(FILE)
    if path and passes(error):
        with suppress(OSError):
            Path(path).write_text(PASSING)


def passes(error: BaseException) -> bool:
    """Whether the same command may succeed when it is tried again: a store or a cluster that did not answer.

    A lease is lost where the store was away for too long, or to another process: then the next attempt is refused.
    A training that failed has had its own restarts (`scale.restarts`), and a wrong request stays wrong.
    """
    if isinstance(error, RaysdError):
        return isinstance(error, StorageError | LeaseLost) and not isinstance(error, AlreadyExists | Stale)
    ours = type(error).__module__.split(".")[0] == "ray" and not isinstance(error, ValueError | TypeError)
    return ours or isinstance(error, ConnectionError | TimeoutError)
