"""An object that several processes read is downloaded once, and is gone when the last one has read it."""

import multiprocessing
from pathlib import Path

import pytest

from raysd.storage.shared import shared


def read(place: Path, downloads: Path, ready: "multiprocessing.synchronize.Barrier") -> None:  # type: ignore[name-defined]
    def download(path: Path) -> None:
        with downloads.open("a") as log:
            log.write("x")
        path.write_text("body")

    with shared(place, download) as path:
        assert path.read_text() == "body"
        ready.wait(30)  # all hold it at once


def test_many_processes_download_once_and_leave_nothing(tmp_path: Path) -> None:
    place, downloads = tmp_path / "parts" / "one", tmp_path / "downloads"
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(4)
    readers = [context.Process(target=read, args=(place, downloads, ready)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    assert downloads.read_text() == "x"
    assert not place.exists()


def test_a_download_that_fails_is_tried_by_the_next(tmp_path: Path) -> None:
    place = tmp_path / "one"
    with pytest.raises(OSError, match="away"), shared(place, lambda path: (_ for _ in ()).throw(OSError("away"))):
        pass
    with shared(place, lambda path: path.write_text("x") and None) as path:
        assert path.read_text() == "x"
