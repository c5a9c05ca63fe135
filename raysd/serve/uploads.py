"""Pictures that clients sent to start from: kept for some days, by their digest. Apart from `raysd.data`'s unpacked archives."""

import hashlib
from collections.abc import Mapping
from typing import Any

from raysd.errors import NotFound, RaysdError
from raysd.storage import Storage

KEPT = 7 * 86400.0
"""Seconds."""
FOLDER = "serving/uploads"
FIELDS = ("image", "mask")
"""Of a `Drawing`: those that are digests of uploads."""


def named(drawing: Mapping[str, Any]) -> set[str]:
    """The digests of all uploads that a drawing starts from."""
    return {drawing[field] for field in FIELDS if drawing.get(field) is not None}


class Uploads:
    """The uploads of an owner (None: of all who need no key) in a storage. Others may have sent the same picture."""

    def __init__(self, storage: Storage, owner: str | None) -> None:
        self._storage = storage.child(f"{FOLDER}/{owner or 'anybody'}")

    def keep(self, png: bytes) -> str:
        """Write it, for `KEPT` seconds from now; its sha256."""
        sha256 = hashlib.sha256(png).hexdigest()
        self._storage.write(_name(sha256), png)
        return sha256

    def require(self, drawing: Mapping[str, Any]) -> None:
        """Raises NotFound where an upload that a drawing starts from is not here, or no longer."""
        for field in FIELDS:
            if drawing.get(field) is not None and not self._storage.exists(_name(drawing[field])):
                raise NotFound(
                    f"{field}: no such upload, or it was removed after {KEPT // 86400:.0f} days: send it again"
                )

    def read(self, sha256: str) -> bytes:
        """Raises RaysdError where it is gone, or not what was sent."""
        try:
            data = self._storage.read(_name(sha256))
        except NotFound:
            raise RaysdError("the uploaded picture is no longer here: send it again") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RaysdError("the uploaded picture is damaged in the store: send it again")
        return data

    def delete(self, sha256: str) -> None:
        self._storage.delete(_name(sha256))


def forget(storage: Storage) -> None:
    """Delete all uploads that are kept no longer."""
    now = storage.now()
    for entry in storage.list(FOLDER):
        if now - entry.modified > KEPT:
            storage.delete(entry.path)


def _name(sha256: str) -> str:
    return f"{sha256}.png"
