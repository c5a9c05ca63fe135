"""Pictures that clients sent: kept for their time, checked when they are read, and apart from what trainings keep."""

import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from raysd.data.source import open_source
from raysd.errors import NotFound, RaysdError
from raysd.serve.drawing import Drawing
from raysd.serve.uploads import KEPT, Uploads, forget
from raysd.storage import Storage


def aged(storage: Storage, seconds: float) -> None:
    """Make all that is in the storage so old."""
    for entry in storage.list():
        path = storage.local_path(entry.path)
        assert path is not None
        os.utime(path, (storage.now() - seconds,) * 2)


def test_an_upload_is_there_for_its_time_and_no_longer(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    uploads = Uploads(storage, None)
    sha256 = uploads.keep(b"png")
    drawing = Drawing(prompt="x", image=sha256).model_dump()
    for age in (0.0, KEPT - 60):
        aged(storage, age)
        forget(storage)
        uploads.require(drawing)
        assert uploads.read(sha256) == b"png"
    aged(storage, KEPT + 60)
    assert uploads.keep(b"png") == sha256, "sent once more, it is kept for as long again"
    forget(storage)
    uploads.require(drawing)
    aged(storage, KEPT + 60)
    forget(storage)
    with pytest.raises(NotFound, match="image: no such upload, or it was removed after 7 days"):
        uploads.require(drawing)
    with pytest.raises(RaysdError, match="no longer here"):
        uploads.read(sha256)


def test_a_damaged_upload_is_not_drawn(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    sha256 = Uploads(storage, None).keep(b"png")
    (entry,) = storage.list()
    storage.write(entry.path, b"other")
    with pytest.raises(RaysdError, match="damaged"):
        Uploads(storage, None).read(sha256)


def test_a_service_leaves_the_archives_of_trainings_alone(tmp_path: Path) -> None:
    """A training's zip is unpacked into the same storage, and its pictures are older than a service keeps its own."""
    storage = Storage(str(tmp_path / "store"))
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as archive:
        archive.write(tmp_path / "cat.png", "cat.png")
    source = open_source(str(tmp_path / "cats.zip"), storage.child("uploads"))
    aged(storage, KEPT + 60)
    before = [entry.path for entry in storage.list()]
    assert len(before) >= 2, "a picture and the archive's index"
    forget(storage)
    assert [entry.path for entry in storage.list()] == before
    assert open_source(str(tmp_path / "cats.zip"), storage.child("uploads")) == source
