"""An evaluation's pictures drawn by Ray workers: all of them, once, and the same as without Ray."""

import numpy as np
import pytest

from raysd.config import EvaluationSpec
from raysd.evaluate.pictures import Album, Painter, draw_album
from raysd.evaluate.prompts import Prompt
from raysd.references import locate
from raysd.storage import Storage

PROMPTS = (Prompt("a red circle"), Prompt("a star", "blue"), Prompt("a ring"))


@pytest.mark.long
def test_two_workers_draw_what_this_process_would_and_only_once(tiny_base, ray_address, tmp_path, monkeypatch):
    albums = {}
    for workers in (2, 0):
        spec = EvaluationSpec(count=8, steps=2, batch=2, workers=workers)
        storage = Storage(str(tmp_path / f"store{workers}"))
        album = Album(locate(str(tiny_base), storage), PROMPTS, spec, storage)
        seen = []
        assert draw_album(album, spec, lambda done, total, seen=seen: seen.append((done, total))) == 8
        assert seen == [(0, 8), (2, 8), (4, 8), (6, 8), (8, 8)]
        albums[workers] = album, spec
        if workers:
            monkeypatch.setattr(Painter, "__init__", _unused)
            assert draw_album(album, spec, lambda done, total: None) == 0
            monkeypatch.undo()
    far, near = ([np.asarray(p, int) for p in album.pictures()] for album, _ in albums.values())
    assert max(np.abs(a - b).max() for a, b in zip(far, near, strict=True)) <= 1
    assert len({picture.tobytes() for picture in far}) == 8


def _unused(*_):
    raise AssertionError("it draws again")
