"""Which failures of a store are worth another try, and what to say of the others."""

import errno
from collections.abc import Iterator

from raysd.errors import NotFound, StorageError
from raysd.storage.backend import Conflict
from raysd.storage.remote import answer_of

# By name, so that a local folder needs no botocore. Builtin and botocore's ConnectionError are both meant.
_TRANSIENT = {
    "ConnectionError",
    "HTTPClientError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "TimeoutError",
    "IncompleteRead",
    "ClientPayloadError",
    "FSTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "Throttling", "XAmzContentSHA256Mismatch", "IncompleteBody"}


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    status, code = answer_of(error)
    if isinstance(error, Conflict) or status >= 500 or status == 429 or code in _TRANSIENT_CODES:
        return status != 501
    return status == 0 and not _TRANSIENT.isdisjoint(_names(error))


def explained(error: BaseException, name: str, root: str) -> Exception:
    """The error to raise for `name`, an object of the store at `root`."""
    status, code = answer_of(error)
    number = getattr(error, "errno", None)
    if code == "NoSuchBucket":
        return StorageError(f"{root}: no such bucket: create it or set RAYSD_STORAGE")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or status == 404:
        return NotFound(f"{name}: no such object")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{name}: no space left on {root}: free some or set RAYSD_STORAGE")
    if number == errno.ENOTEMPTY:
        return StorageError(f"{name}: another process is writing into it: stop that first")
    if isinstance(error, PermissionError) or status in (401, 403) or number == errno.EROFS:
        return StorageError(f"{name}: access to {root} was denied{_hint(root)}")
    if _names(error) & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return StorageError(f"{name}: no credentials for {root}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if transient(error):
        return StorageError(f"{name}: cannot reach {root}: check AWS_ENDPOINT_URL and the network ({_last(error)})")
    return StorageError(f"{name}: {root} failed: {_last(error)}")


def _hint(root: str) -> str:
    if "://" in root:
        return ": check AWS_ACCESS_KEY_ID and the bucket's policy"
    return ": check the folder's owner and mode"


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for cause in _chain(error) for kind in type(cause).__mro__}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _last(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
