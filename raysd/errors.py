"""What can go wrong, as a small hierarchy. Every message says where (field, file, row, object) and what to do.

Each error takes one message and so survives pickling between Ray processes. `exit_status` is what the CLI ends with.
"""


class RaysdError(Exception):
    """Something failed while the work was being done."""

    exit_status = 1


class RequestError(RaysdError):
    """The request itself was wrong: nothing was spent or written."""

    exit_status = 2


class SpecError(RequestError):
    """A field of a spec is unknown, missing or out of range."""


class DataError(RequestError):
    """A data source cannot be used as it stands."""


class NotFound(RequestError):
    """A run, model, version, alias or file that was named does not exist."""


class TooMany(RequestError):
    """A limit is reached: the same request may succeed in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 60.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StorageError(RaysdError):
    """The store refused or failed."""


class AlreadyExists(StorageError):
    """An object that may be created once exists."""


class Stale(StorageError):
    """A compare-and-swap lost: the object was changed since it was read."""


class IntegrityError(RaysdError):
    """Bytes that are not what their digest says."""


class ExportRefused(RaysdError):
    """An export does not draw the model's pictures, and is not kept."""


class ExportMissing(RaysdError):
    """An export that something waits for is not made yet."""


class LeaseHeld(RequestError):
    """Another process holds the run."""


class LeaseLost(RaysdError):
    """This process no longer holds the run and may not write to it."""


class TrainingFailed(RaysdError):
    """A run ended before its last step."""


class OutOfMemory(TrainingFailed):
    """The model, its state or a batch did not fit."""
