"""Data on S3: listed, checked and read in place, streamed with bounded memory; archives unpacked into the bucket."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysd.config import DataSpec
from raysd.data.check import examine
from raysd.data.dataset import prepare
from raysd.data.source import open_source, read_picture
from raysd.errors import DataError, StorageError
from raysd.storage import Storage
from tests.pictures import encoded, photo


def upload(url: str, files: dict[str, bytes]) -> None:
    storage = Storage(url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: storage.write(*item), files.items()))


def archive(count: int) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as file:
        for index in range(count):
            file.writestr(f"top/p{index}.png", encoded(photo(index)))
            file.writestr(f"top/p{index}.txt", f"number {index}")
    return body.getvalue()


def test_a_bucket_is_read_in_place_from_any_process(s3):
    files = {f"set/p{n}.png": encoded(photo(n)) for n in range(6)}
    rows = [{"file_name": f"p{n}.png", "text": f"number {n}"} for n in range(5)]
    files |= {"set/metadata.jsonl": "\n".join(map(json.dumps, rows)).encode(), "set/p5.caption": b"number 5"}
    files |= {"set/odd [1] *?#::.png": encoded(photo(7)), "set/odd [1] *?#::.txt": b"odd"}
    upload(s3, files)
    data = prepare(DataSpec(source=f"{s3}/set", resolution=64), Storage(f"{s3}/storage"))
    examples = pickle.loads(pickle.dumps((*data.train, *data.validation)))  # noqa: S301
    assert {e.caption for e in examples} == {*(f"number {n}" for n in range(6)), "odd"}
    for example in examples:
        assert example.path.startswith("s3://")
        assert read_picture(example.path).size == (128, 128)
    assert Storage(f"{s3}/storage").list() == []


def test_the_same_pictures_on_s3_and_on_disk_are_the_same_data_set(s3, tmp_path):
    files = {f"p{n}.png": encoded(photo(n)) for n in range(6)} | {f"p{n}.txt": b"x %d" % n for n in range(6)}
    upload(f"{s3}/set", files)
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    storage = Storage(f"{s3}/storage")
    remote = prepare(DataSpec(source=f"{s3}/set", resolution=64), storage)
    local = prepare(DataSpec(source=str(tmp_path), resolution=64), storage)
    assert remote.digest == local.digest
    assert remote.report.model_copy(update={"origin": ""}) == local.report.model_copy(update={"origin": ""})


@pytest.mark.parametrize("where", ["local", "s3"])
def test_an_archive_is_unpacked_where_every_node_reads_it(s3, tmp_path, where):
    body, source = archive(5), str(tmp_path / "set.zip")
    if where == "local":
        Path(source).write_bytes(body)
    else:
        source = f"{s3}/in/set.zip"
        upload(s3, {"in/set.zip": body})
    opened = open_source(source, Storage(f"{s3}/uploads"))
    assert {entry.caption for entry in opened.entries} == {f"number {n}" for n in range(5)}
    for entry in opened.entries:
        assert entry.path.startswith(f"{s3}/uploads/")
        assert read_picture(entry.path).size == (128, 128)


def test_an_empty_object_is_left_out_and_a_lost_bucket_is_a_storage_error(s3):
    upload(s3, {f"set/p{n}.png": encoded(photo(n)) for n in range(6)} | {"set/p9.png": b""})
    report = examine(open_source(f"{s3}/set", Storage(f"{s3}/u")), DataSpec(source="x", prompt="x")).report
    assert [(f.name, f.what) for f in report.unreadable] == [("p9.png", "empty")]
    with pytest.raises((DataError, StorageError), match="no-such-bucket"):
        open_source("s3://no-such-bucket-here/set", Storage(f"{s3}/u"))
    with pytest.raises(DataError, match="no such object"):
        open_source(f"{s3}/none.zip", Storage(f"{s3}/u"))


CHECK = """
import json, resource, sys
from raysd.config import DataSpec
from raysd.data.check import examine
from raysd.data.source import open_source
from raysd.storage import Storage

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
warm = examine(open_source(sys.argv[1] + "/warm", Storage(sys.argv[1])), DataSpec(source="x", prompt="x"))
before = peak()
found = examine(open_source(sys.argv[1] + "/set", Storage(sys.argv[1])), DataSpec(source="x"))
print(json.dumps([found.report.used, list(found.report.refusals), peak() - before]))
"""


def test_many_pictures_are_streamed_with_bounded_memory_and_no_copy_on_this_node(s3, tmp_path):
    """200 pictures of 3 MB each when decoded: were they held, the process would grow by 600 MB."""
    coarse = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    rows = [{"file_name": f"{n:04d}.png", "text": f"a photo {n}"} for n in range(len(coarse))]
    files = {f"set/{n:04d}.png": enlarged(small) for n, small in enumerate(coarse)}
    warm = {f"warm/{n}.png": enlarged(255 - small) for n, small in enumerate(coarse[:40])}
    upload(s3, files | warm | {"set/metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, s3], env=environment, capture_output=True, text=True, check=True
    )
    used, refusals, grown = json.loads(done.stdout)
    assert (used, refusals) == (200, [])
    assert grown < 100, f"{grown} MB more than after 40 pictures"
    assert list(tmp_path.iterdir()) == []


def enlarged(small: np.ndarray) -> bytes:
    return encoded(Image.fromarray(small).resize((1024, 1024), Image.Resampling.NEAREST), compress_level=1)
