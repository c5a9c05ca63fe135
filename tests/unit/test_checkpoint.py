"""Checkpoints: which are kept, in what order one is deleted, and what becomes of one that cannot be written."""

import errno
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raysd.config import TrainingSpec, load
from raysd.errors import NotFound, StorageError
from raysd.storage import Storage
from raysd.storage.local import Local
from raysd.train import checkpoint
from raysd.train.build import build_engine
from raysd.train.checkpoint import MANIFEST, Checkpoint, Progress, Saver

SPEC = load(TrainingSpec, {"data": {"source": "x"}, "optim": {"steps": 1}})


class Watched(Storage):
    """Fails where a part goes while a manifest still promises it."""

    def delete(self, path):
        assert path.endswith(MANIFEST) or not self.exists(f"{path.rpartition('/')[0]}/{MANIFEST}")
        super().delete(path)

    def delete_tree(self, prefix):
        assert not self.exists(f"{prefix}/{MANIFEST}"), "a reader would find a checkpoint without its parts"
        super().delete_tree(prefix)


def write(run, step):
    """A checkpoint of two parts."""
    folder = f"checkpoints/{step:08d}-0001"
    for rank in (0, 1):
        run.write(f"{folder}/part-{rank:04d}.safetensors", b"part")
    run.write(f"{folder}/{MANIFEST}", json.dumps(asdict(Checkpoint(folder, Progress(step=step), []))).encode())


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [8, 10]),
        (2, 4, [4, 8, 10]),
        (2, 8, [8, 10]),
        (1, 2, [2, 10]),
        (5, None, [2, 4, 6, 8, 10]),
        (9, 2, [2, 4, 6, 8, 10]),
    ],
)
def test_the_newest_and_the_best_are_kept_and_a_manifest_goes_before_its_parts(tmp_path, keep, best, left):
    run = Watched(str(tmp_path))
    for step in (2, 4, 6, 8, 10):
        write(run, step)
    checkpoint.prune(run, keep, best)
    assert [found.step for found in checkpoint.complete(run)] == left
    parts = {entry.path.split("/")[1] for entry in run.list("checkpoints")}
    assert parts == {f"{step:08d}-0001" for step in left}, "no part is left without its checkpoint"
    assert len(run.list("checkpoints")) == 3 * len(left)


def test_what_a_dead_attempt_left_of_an_older_checkpoint_goes_and_one_that_is_being_written_stays(tmp_path):
    run = Watched(str(tmp_path))
    write(run, 4)
    for folder in ("00000002-0001", "00000006-0001"):
        run.write(f"checkpoints/{folder}/part-0000.safetensors", b"part")
    checkpoint.prune(run, 3, None)
    left = {entry.path.split("/")[1] for entry in run.list("checkpoints")}
    assert left == {"00000004-0001", "00000006-0001"}


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        (checkpoint, "save_file", "writing a checkpoint failed: .*No space left on device; free space or set TMPDIR"),
        (Local, "upload", "part-0000.safetensors: no space left on .*: free some or set RAYSD_STORAGE"),
    ],
    ids=["on this machine", "in the store"],
)
def test_a_part_that_does_not_fit_is_a_storage_error_with_a_remedy_and_no_checkpoint(
    tmp_path, monkeypatch, place, name, message
):
    run = Storage(str(tmp_path))
    engine = build_engine(nn.Linear(3, 2), SPEC, device=torch.device("cpu"), rank=0, world=1)
    saver = Saver(run, engine, None, "0001", lambda: None)
    saver.save(Progress(step=1))
    monkeypatch.setattr(place, name, full)
    with pytest.raises(StorageError, match=message) as raised:
        saver.save(Progress(step=2))
    assert len(str(raised.value).splitlines()) <= 3
    assert [found.step for found in checkpoint.complete(run)] == [1], "what was there before can be resumed"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_failed_on_one_rank_is_raised_on_every_rank(monkeypatch, failing):
    """Each rank asks `_agreed` in turn; the exchange between them is a list here."""
    rows = [checkpoint._tried(rank, full if rank == failing else lambda: "part") for rank in range(3)]

    def gather(into, mine):
        assert mine in rows
        into[:] = rows

    monkeypatch.setattr(checkpoint.dist, "all_gather_object", gather)
    for mine in rows:
        with pytest.raises(StorageError, match=f"checkpoint on rank {failing}: OSError.*No space left"):
            checkpoint._agreed(SimpleNamespace(world=3), mine)
    rows[failing] = ("part", None)
    assert checkpoint._agreed(SimpleNamespace(world=3), rows[0]) == ["part"] * 3


def test_one_that_is_pruned_while_others_are_listed_is_left_out(tmp_path, monkeypatch):
    run = Watched(str(tmp_path))
    write(run, 2), write(run, 4)
    true = run.read

    def read(path):
        if "00000002" in path:
            raise NotFound(f"{path}: no such object")
        return true(path)

    monkeypatch.setattr(run, "read", read)
    assert [found.step for found in checkpoint.complete(run)] == [4]
