"""Stores behind fsspec: S3 with conditional writes, and any other URL without them."""

import asyncio
import errno
import functools
import os
from collections.abc import Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from raysd.errors import Stale, StorageError
from raysd.storage.backend import HIDDEN, Conflict, Entry

_QUICK = {"retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 15, "max_pool_connections": 32}
_BULK = {"retries": {"total_max_attempts": 5, "mode": "standard"}, "connect_timeout": 5, "read_timeout": 60}
_UPLOAD_STREAMS = 4  # of 50 MB parts each, in memory at once


class Remote:
    """Any fsspec URL: reads, writes and create-only as its driver allows; no compare-and-swap."""

    def __init__(self, protocol: str, root: str) -> None:
        self.protocol, self.root = protocol, root

    @property
    def fs(self) -> Any:
        """The file system, made anew in each process: neither its event loop nor its sockets survive a fork."""
        return _filesystem(self.protocol, os.getpid(), _settings())

    @property
    def bulk(self) -> Any:
        """The file system for large files, which repeats what failed."""
        return self.fs

    def url(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def file(self, path: str) -> Path | None:
        return None

    def read(self, path: str) -> bytes:
        return bytes(self.fs.cat_file(self.url(path)))

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        raise self._no_swap()

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        return list(self.fs.cat_ranges([self.url(path)] * len(ranges), starts, stops, on_error="raise"))

    def put(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(self.url(path), data)

    def put_new(self, path: str, data: bytes) -> str:
        self.fs.pipe_file(self.url(path), data, mode="create")
        return ""

    def put_if(self, path: str, data: bytes, tag: str) -> str:
        raise self._no_swap()

    def upload(self, local: Path, path: str) -> None:
        self.fs.put_file(str(local), self.url(path))

    def download(self, path: str, local: Path) -> None:
        self.fs.get_file(self.url(path), str(local))

    def stat(self, path: str) -> Entry:
        info = self.fs.info(self.url(path))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return Entry(path, info["size"], _modified(info))

    def list(self, prefix: str, recursive: bool) -> list[Entry]:
        folder = self.url(prefix)
        found = self.fs.find(folder, detail=True).values() if recursive else self._children(folder)
        return sorted(entry for info in found if (entry := self._entry(info, folder)))

    def delete(self, path: str) -> None:
        try:
            self.fs.rm_file(self.url(path))
        except FileNotFoundError:
            return

    def delete_tree(self, prefix: str) -> None:
        try:
            self.fs.rm(self.url(prefix), recursive=True)
        except FileNotFoundError:
            return

    def now(self) -> float:
        raise self._no_swap()

    def sweep(self, older: float) -> int:
        return 0

    def _children(self, folder: str) -> Sequence[dict[str, Any]]:
        try:
            return self.fs.ls(folder, detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def _entry(self, info: dict[str, Any], folder: str) -> Entry | None:
        """An object under `folder`; None for the folder itself, an object of its name, and hidden names."""
        name = str(info["name"]).lstrip("/")
        if not name.startswith(folder.lstrip("/") + "/") or f"/{HIDDEN}" in name:
            return None
        path = name.removeprefix(self.root.lstrip("/")).strip("/")
        return Entry(path + "/", 0, 0.0) if info["type"] == "directory" else Entry(path, info["size"], _modified(info))

    def _no_swap(self) -> StorageError:
        return StorageError(
            f"{self.protocol}://: this store has no compare-and-swap: set RAYSD_STORAGE to a local folder or s3://…"
        )


class S3(Remote):
    """S3 and what speaks it. Conditional writes are If-None-Match and If-Match; the tag is the ETag.

    Small requests go through a client that never retries by itself: only so can `Storage` know that a refused
    condition may be due to its own earlier attempt. Large files go through one that repeats single parts.
    """

    def read(self, path: str) -> bytes:
        return self.read_tagged(path)[0]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        return sync(self.fs.loop, _get, self.fs, self._place(path))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return sync(self.fs.loop, _get_ranges, self.fs, self._place(path), ranges)

    def put(self, path: str, data: bytes) -> None:
        self.fs.call_s3("put_object", **self._place(path), Body=data)

    def put_new(self, path: str, data: bytes) -> str:
        return self._put(path, data, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path), IfNoneMatch="*")

    def put_if(self, path: str, data: bytes, tag: str) -> str:
        return self._put(path, data, Stale(f"{path}: it was changed since it was read"), IfMatch=tag)

    @property
    def bulk(self) -> Any:
        return _filesystem("s3-bulk", os.getpid(), _settings())

    def upload(self, local: Path, path: str) -> None:
        self.bulk.put_file(str(local), self.url(path), max_concurrency=_UPLOAD_STREAMS)

    def download(self, path: str, local: Path) -> None:
        self.bulk.get_file(self.url(path), str(local))

    def stat(self, path: str) -> Entry:
        head = self.fs.call_s3("head_object", **self._place(path))
        return Entry(path, head["ContentLength"], head["LastModified"].timestamp())

    def delete(self, path: str) -> None:
        self.fs.call_s3("delete_object", **self._place(path))

    def delete_tree(self, prefix: str) -> None:
        found = sorted(self.fs.find(self.url(prefix)))
        keys = [self.fs.split_path(name)[1] for name in found if name.startswith(self.url(prefix) + "/")]
        bucket = self.root.split("/", 1)[0]
        for at in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[at : at + 1000]]
            answer = self.fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            for refused in answer.get("Errors", []):
                raise PermissionError(errno.EACCES, refused.get("Message", ""), refused.get("Key"))

    def now(self) -> float:
        """The Date of an answer: the clock that stamps the objects."""
        bucket, _, prefix = self.root.partition("/")
        answer = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def sweep(self, older: float) -> int:
        """Abort uploads in parts that dead processes left under this root (they cost money and are not listed)."""
        bucket, _, prefix = self.root.partition("/")
        now, swept, within = self.now(), 0, f"{prefix}/" if prefix else ""
        for part in self.fs.list_multipart_uploads(bucket):
            if part["Key"].startswith(within) and now - part["Initiated"].timestamp() > older:
                self.fs.abort_mpu(bucket, part["Key"], part["UploadId"])
                swept += 1
        return swept

    def _place(self, path: str) -> dict[str, str]:
        bucket, _, prefix = self.root.partition("/")
        return {"Bucket": bucket, "Key": f"{prefix}/{path}".lstrip("/")}

    def _put(self, path: str, data: bytes, refused: Exception, **condition: str) -> str:
        try:
            return str(self.fs.call_s3("put_object", **self._place(path), Body=data, **condition)["ETag"])
        except Exception as error:
            status, code = answer_of(error)
            if status == 412 or (status == 404 and code == "NoSuchKey"):
                raise refused from error
            if status == 409:
                raise Conflict(path) from error
            raise


async def _get(fs: Any, place: dict[str, str], **more: str) -> tuple[bytes, str]:
    """Content and ETag of one object by one request (they belong together)."""
    answer = await fs._call_s3("get_object", **place, **more)
    async with answer["Body"] as body:
        return await body.read(), answer["ETag"]


async def _get_ranges(fs: Any, place: dict[str, str], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    parts = [_get(fs, place, Range=f"bytes={start}-{stop - 1}") for start, stop in ranges]
    return [data for data, _ in await asyncio.gather(*parts)]


def _settings() -> tuple[tuple[str, str], ...]:
    """The part of the environment that a connection is made from."""
    return tuple((name, value) for name, value in sorted(os.environ.items()) if name.startswith("AWS_"))


@functools.cache
def _filesystem(kind: str, process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """One file system a process and environment; fsspec's own cache of instances would give a child its parent's."""
    if kind not in ("s3", "s3-bulk"):
        return fsspec.filesystem(kind, use_listings_cache=False, skip_instance_cache=kind != "memory")
    given = dict(settings)
    region = given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION")
    fs = fsspec.filesystem(
        "s3",
        endpoint_url=given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL") or None,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs=_BULK if kind == "s3-bulk" else _QUICK,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    if kind == "s3":
        fs.retries = 1  # s3fs would repeat conditional writes too; `Storage` does it instead
    return fs


def answer_of(error: BaseException | None) -> tuple[int, str]:
    """HTTP status and S3's code of the answer behind an exception; (0, "") where there was none."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            code = str(answer.get("Error", {}).get("Code", ""))
            return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), code
        error = error.__cause__
    return 0, ""


def _modified(info: dict[str, Any]) -> float:
    when = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    return when.timestamp() if isinstance(when, datetime) else float(when)
