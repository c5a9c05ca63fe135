"""Tensors kept by content: computed once, read by every run that needs the same.

A space (one kind of tensor from one encoder) holds shards, each a safetensors file of many records, and an index beside
each shard, written after it: a record exists whole or not at all. Shards are read by byte range, so a reader needs
neither a copy of them nor memory for more than a batch.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from raysd.errors import StorageError
from raysd.storage import Storage

FRESH_SECONDS = 86_400.0
"""An index younger than this is never evicted; a use touches one again from half of it on."""


class Place(NamedTuple):
    """Where a record lies: bytes [start, end) of a shard."""

    shard: str
    start: int
    end: int
    shape: tuple[int, ...]


class TensorCache:
    """fp32 tensors by key under one prefix of a storage. Writers and readers on any number of nodes need no lock."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self._places: dict[str, Place] = {}
        self._read_indexes: set[str] = set()
        self._modified: dict[str, float] = {}

    def refresh(self) -> "TensorCache":
        """Take in what was written since the last call."""
        fresh = [entry for entry in self.storage.list("index") if entry.path not in self._read_indexes]
        with ThreadPoolExecutor(16) as pool:
            for entry, body in zip(fresh, pool.map(lambda e: self.storage.read(e.path), fresh), strict=True):
                self._read_indexes.add(entry.path)
                self._modified[entry.path] = entry.modified
                self._places.update(
                    {key: Place(row[0], row[1], row[2], tuple(row[3])) for key, row in json.loads(body).items()}
                )
        return self

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def read(self, keys: Sequence[str]) -> list[Tensor]:
        """The tensors of `keys`, in their order, by range reads. Raises StorageError for a key that is not there."""
        absent = self.missing(keys)
        if absent:
            raise StorageError(
                f"{self.storage.url}: {len(absent)} cached tensors are gone (evicted?): start the run again"
            )
        by_shard: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            by_shard.setdefault(self._places[key].shard, []).append(key)
        found: dict[str, Tensor] = {}
        for shard, members in by_shard.items():
            places = [self._places[key] for key in members]
            blobs = self.storage.read_ranges(shard, [(p.start, p.end) for p in places])
            for key, place, blob in zip(members, places, blobs, strict=True):
                found[key] = torch.frombuffer(bytearray(blob), dtype=torch.float32).reshape(place.shape)
        return [found[key] for key in keys]

    def write(self, records: Mapping[str, Tensor]) -> None:
        """Add records as one shard; the index follows the shard, so that no reader sees half of it."""
        if not records:
            return
        name = f"{int(time.time())}-{uuid.uuid4().hex[:12]}"
        body = save({key: tensor.detach().float().contiguous().cpu() for key, tensor in records.items()})
        self.storage.write(f"shards/{name}.safetensors", body)
        index = _index(f"shards/{name}.safetensors", body)
        self.storage.write(f"index/{name}.json", json.dumps(index).encode())
        self._places.update({key: Place(row[0], row[1], row[2], tuple(row[3])) for key, row in index.items()})
        self._read_indexes.add(f"index/{name}.json")
        self._modified[f"index/{name}.json"] = time.time()

    def keep_alive(self, keys: Iterable[str]) -> None:
        """Mark the shards of those `keys` that are there as used now, so that eviction by age takes others first."""
        for shard in {self._places[key].shard for key in keys if key in self._places}:
            index = shard.replace("shards/", "index/").replace(".safetensors", ".json")
            if time.time() - self._modified[index] > FRESH_SECONDS / 2:
                self.storage.write(index, self.storage.read(index))
                self._modified[index] = time.time()


def evict(storage: Storage, max_bytes: int, max_age: float) -> int:
    """Remove shards of all spaces under `storage`, unused for `max_age` seconds, then the longest unused until at most
    `max_bytes` remain; nothing used within a day goes. The index goes before its shard. Returns the bytes removed."""
    now, sizes = (
        time.time(),
        {entry.path: entry.size for entry in storage.list() if entry.path.endswith(".safetensors")},
    )
    total, removed = sum(sizes.values()), 0
    indexes = sorted((e for e in storage.list() if e.path.endswith(".json")), key=lambda entry: entry.modified)
    for entry in indexes:
        age = now - entry.modified
        if age < FRESH_SECONDS or (age < max_age and total - removed <= max_bytes):
            continue
        shard = entry.path.replace("/index/", "/shards/").replace(".json", ".safetensors")
        storage.delete(entry.path)
        storage.delete(shard)
        removed += sizes.get(shard, 0)
    return removed


def _index(shard: str, body: bytes) -> dict[str, list[Any]]:
    """{key: [shard, start, end, shape]} from the header of a safetensors file (8 bytes of length, then JSON)."""
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    start = 8 + length
    return {
        key: [shard, start + entry["data_offsets"][0], start + entry["data_offsets"][1], entry["shape"]]
        for key, entry in header.items()
        if key != "__metadata__"
    }
