"""The one door to fsspec: folders and URLs, atomic create, compare-and-swap, digests."""

from raysd.storage.backend import Entry, digest, sha256_of
from raysd.storage.store import Storage

__all__ = ["Entry", "Storage", "digest", "sha256_of"]
