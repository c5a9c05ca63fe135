"""A run before its workers and after its driver: what is refused, whose it is, and how it ends when it is lost."""

import os
import time
import tomllib
from types import SimpleNamespace

import pytest
import ray
import torch

from raysd import cluster
from raysd.config import TrainingSpec, load, override
from raysd.data.cache import FRESH_SECONDS, TensorCache
from raysd.errors import LeaseHeld, LeaseLost, OutOfMemory, RequestError, TrainingFailed
from raysd.lease import Lease
from raysd.storage import Storage
from raysd.train import encode, launch, request, runs, track
from raysd.train.follow import Follower
from raysd.train.hang import EXIT
from raysd.train.launch import Launch, train
from raysd.train.link import Link, Reporter
from raysd.train.request import existing_run, preview
from raysd.train.runs import RunRecord
from tests.base import toml
from tests.pictures import folder
from tests.versions import safetensors


@pytest.fixture
def root(tmp_path):
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def spec(tiny_base, tiny_pictures, tmp_path, monkeypatch):
    """On a machine without GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return load(TrainingSpec, tomllib.loads(toml(tmp_path, tiny_base, tiny_pictures).read_text()))


def quiet(event):
    pass


@pytest.mark.parametrize("command", [preview, train])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale.precision": "fp16"}, "scale.precision fp16 needs a GPU"),
        ({"scale.gpus": True}, "scale.workers 1 with a GPU each: this cluster has 0 GPUs"),
        ({"method.targets": ["nothing"]}, "method.targets: nothing fit no module"),
        ({"loss.prediction": "v_prediction"}, "loss.prediction v_prediction: an adapter predicts what its base does"),
        ({"track.mlflow": "http://x"}, "track.mlflow: not installed"),
        ({"track.wandb": "x"}, "track.wandb: not installed"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(root, spec, monkeypatch, command, changes, said):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(track, "bring_in", absent)
    with pytest.raises(RequestError, match=said):
        command(override(spec, changes), "run", root, quiet)
    assert root.list() == []


@pytest.mark.parametrize("command", [preview, train])
def test_a_cluster_that_does_not_answer_is_said_before_anything_is_written(root, spec, monkeypatch, command):
    def join(most_workers):
        raise RequestError("RAY_ADDRESS nowhere: no Ray cluster")

    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr(cluster, "join", join)
    with pytest.raises(RequestError, match="RAY_ADDRESS nowhere"):
        command(spec, "run", root, quiet)
    assert root.list() == []


def test_captions_that_the_text_encoder_cuts_are_named(root, spec, tmp_path):
    """The tiny base's reads 24 tokens, of which two are the ends."""
    pictures = folder(tmp_path / "pictures", 6)
    (pictures / "p1.txt").write_text("a " * 23)
    (pictures / "p2.txt").write_text("a " * 22)
    (pictures / "p4.txt").write_text("a " * 500)
    told = []
    preview(override(spec, {"data.source": str(pictures)}), "cats", root, told.append)
    notices = [event["text"] for event in told if event["kind"] == "notice"]
    assert notices == ["2 captions cut to the 24 tokens that the text encoder reads: p1.png, p4.png"]


def begun(root, spec, **changes):
    return runs.write(runs.storage_of(root, "run"), RunRecord("run", spec.model_dump(mode="json"), **changes))


def test_a_run_that_did_no_step_leaves_its_name_to_other_settings(root, spec):
    record = begun(root, spec, status="failed")
    other = override(spec, {"optim.lr": 1e-5})
    assert existing_run(root, "run", spec).id == record.id
    assert existing_run(root, "run", other) is None
    runs.storage_of(root, "run").write("metrics.jsonl", b'{"step": 1, "loss": 0.5}\n')
    with pytest.raises(RequestError, match=r"other settings \(optim\.lr\)\n.*\n.*raysd runs delete run") as refused:
        existing_run(root, "run", other)
    assert len(str(refused.value).splitlines()) == 3


def test_a_run_goes_on_with_other_workers_and_with_no_other_arithmetic(root, spec, monkeypatch):
    record = begun(root, spec, status="interrupted")
    runs.storage_of(root, "run").write("metrics.jsonl", b'{"step": 1, "loss": 0.5}\n')
    with pytest.raises(RequestError, match=r"other settings \(scale\.precision\)"):
        existing_run(root, "run", override(spec, {"scale.precision": "bf16"}))
    seen = []
    monkeypatch.setattr(launch, "check_devices", seen.append)
    monkeypatch.setattr(launch.FrozenData, "load", lambda run: SimpleNamespace(base=""))
    monkeypatch.setattr(Launch, "run_all", lambda self, record, frozen: seen.append(record))
    wider = override(spec, {"scale.workers": 2, "scale.zero_stage": 2})
    train(wider, "run", root, quiet)
    assert seen[0] == wider, "looked for before anything is written"
    assert (seen[1].id, seen[1].training_spec()) == (record.id, wider)


def test_a_run_that_another_process_began_meanwhile_is_not_taken_for_new(root, spec, monkeypatch):
    monkeypatch.setattr(launch, "frozen_for", lambda *_: begun(root, spec, status="finished"))
    monkeypatch.setattr(Launch, "run_all", lambda *_: pytest.fail("begun"))
    with pytest.raises(LeaseHeld, match="run run: another process had it meanwhile"):
        train(spec, "run", root, quiet)


def test_a_run_goes_on_as_it_is_once_its_lease_is_held(root, spec, monkeypatch):
    begun(root, spec, status="finished")
    real, reads = existing_run, []

    def existing(*arguments):
        reads.append(real(*arguments))
        if len(reads) == 1:
            runs.write(runs.storage_of(root, "run"), runs.replace(reads[0], version="cats@1"))
        return reads[-1]

    monkeypatch.setattr(launch, "existing_run", existing)
    monkeypatch.setattr(launch.FrozenData, "load", lambda run: SimpleNamespace(base=""))
    monkeypatch.setattr(Launch, "run_all", lambda self, record, frozen: record)
    assert train(spec, "run", root, quiet).version == "cats@1"


def test_a_deleted_run_leaves_its_tokens(root, spec):
    """A driver that was frozen must find a higher one, and names of its own for what it writes."""
    run = runs.storage_of(root, "run")
    begun(root, spec, status="interrupted")
    run.write("checkpoints/00000002-0001/part-0000.safetensors", b"x")
    with Lease.acquire(run, runs.LEASE), pytest.raises(LeaseHeld):
        runs.delete(root, "run")
    runs.delete(root, "run")
    assert [entry.path for entry in run.list()] == [runs.LEASE]
    assert runs.names(root) == []
    with Lease.acquire(run, runs.LEASE) as lease:
        assert lease.token == 3


SECRET = "https://user:word@host.test/x.zip?X-Amz-Signature=deadbeef"


def test_secrets_of_urls_stay_in_the_record(root, spec, monkeypatch):
    asked = override(spec, {"data.source": SECRET, "track.mlflow": "https://user:word@mlflow.test"})
    record = begun(root, asked)
    said = []
    monkeypatch.setattr(request, "_refuse_unfit", lambda *_: None)
    monkeypatch.setattr(request, "prepare", lambda *_: SimpleNamespace(report=None, train=[], validation=[]))
    monkeypatch.setattr(request, "freeze", lambda *_: SimpleNamespace(train=[1], validation=[]))
    body = preview(asked, "run", root, said.append)
    from raysd.train.publish import _lineage

    located = SimpleNamespace(version=None, family=SimpleNamespace(name="sd"), ref="tiny-sd")
    frozen = SimpleNamespace(base_digest="", data_digest="", train=[], validation=[])
    lineage = _lineage(record, SimpleNamespace(step=1, progress=launch.Progress()), located, frozen)
    for shown in (body, said, lineage, runs.public(record)):
        assert "https://host.test/x.zip" in str(shown)
        assert not [word for word in ("word@", "user", "deadbeef") if word in str(shown)]
    assert runs.read(root, "run").training_spec() == asked


def test_a_run_that_goes_on_is_published_again_and_a_finished_one_once(root, spec, monkeypatch, tmp_path):
    """As a trial does that a budget cut short: under the former key the registry would give the old weights back."""
    from raysd.train import publish as publishing

    def write(run, chosen, spec, located, out):
        (out / "weights.safetensors").write_bytes(safetensors(chosen.step))

    asked = override(spec, {"publish.model": "cats"})
    record = begun(root, asked)
    located = SimpleNamespace(version=None, family=SimpleNamespace(name="sd"), ref="tiny-sd")
    frozen = SimpleNamespace(base_digest="", data_digest="", train=[], validation=[])
    monkeypatch.setattr(publishing, "write_files", write)
    found = []
    for step in (3, 10, 10):
        chosen = SimpleNamespace(step=step, progress=launch.Progress())
        monkeypatch.setattr(publishing, "chosen_checkpoint", lambda *_, chosen=chosen: chosen)
        version = publishing.publish(record, asked, root, runs.storage_of(root, "run"), located, frozen)
        found.append((version.ref, version.record["run"]["step"]))
    assert found == [("cats@1", 3), ("cats@2", 10), ("cats@2", 10)]


class Wire:
    """A link in this process, in place of its actor: `link.stop.remote()`."""

    def __init__(self):
        self.inner = Link.__ray_metadata__.modified_class()

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self.inner, name))


@pytest.fixture
def wire(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda result: result)
    return Wire()


def launched(root, spec, wire):
    found = Launch(spec, "run", root, runs.storage_of(root, "run"), SimpleNamespace(ref="tiny-sd"), quiet, launch.never)
    found.link = wire
    return found


def test_workers_write_a_checkpoint_when_stopped_and_end_at_once_when_the_run_is_lost(root, spec, wire):
    run, ended = launched(root, spec, wire), []
    reporter = Reporter(wire, ended.append)
    run._stop()
    reporter._exchange()
    assert (reporter.stop_requested, ended) == (True, [])
    run._on_lost("the lease was taken")
    run._stop()
    reporter.close()
    assert ended
    assert set(ended) == {EXIT}
    assert isinstance(wire.inner.failure(), LeaseLost), "the next attempt ends before it begins"


def test_of_two_attempts_at_a_run_the_newer_one_is_heard_and_the_older_one_ends(wire):
    older_ended, newer_ended = [], []
    older = Reporter(wire, older_ended.append)
    older.confirm()
    assert older_ended == []
    newer = Reporter(wire, newer_ended.append)
    newer.record(kind="step", step=2)
    older.record(kind="step", step=1)
    older.confirm()
    assert EXIT in older_ended, "it ends before its checkpoint can be seen"
    older.close()
    newer.close()
    assert newer_ended == []
    assert [record["step"] for record in wire.inner.take()] == [2]


def test_a_link_that_was_started_again_goes_on_with_the_attempt_that_finds_it(wire):
    ended = []
    reporter = Reporter(wire, ended.append)
    wire.inner.__init__()
    reporter.confirm()
    reporter.close()
    assert ended == []


@pytest.mark.parametrize("holds", [True, False])
def test_a_driver_that_lost_its_run_writes_no_metrics(root, wire, holds):
    trackers = SimpleNamespace(log=lambda step, values: None, close=lambda: None)
    run = root.child("runs/run")
    follower = Follower(run, wire, trackers, quiet, lambda: None, lambda: holds)
    wire.inner.exchange("first", [{"kind": "step", "step": 1, "loss": 0.5}, {"kind": "usage"}])
    follower.close()
    assert [entry.path for entry in run.list()] == (["metrics.jsonl", "usage.json"] if holds else [])


def test_a_driver_holds_its_run_while_its_lease_does(root, spec, wire):
    run = launched(root, spec, wire)
    with run.lease():
        assert run._holds()
    assert not run._holds()


def worker_killed(cause):
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("a worker died\nlast line", {1: WorkerHealthCheckFailedError("failed", cause)})


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed"), OutOfMemory, "rank 1 was killed, as its node ran out"),
        (
            RuntimeError("killed by SIGKILL by OOM killer"),
            OutOfMemory,
            r"rank 1 was killed \(SIGKILL\), perhaps by the kernel",
        ),
        (RuntimeError("the node died"), TrainingFailed, "last line"),
    ],
)
def test_a_worker_that_was_killed_for_memory_gets_the_advice(root, spec, wire, monkeypatch, cause, kind, said):
    monkeypatch.setattr(launch, "_log_folder", lambda: "here")
    with pytest.raises(kind, match=said) as raised:
        launched(root, spec, wire)._raise_failure(worker_killed(cause))
    assert ("try: --optim.micro_batch 2" in str(raised.value)) is (kind is OutOfMemory)
    assert len(str(raised.value).splitlines()) == 3


def test_what_a_long_run_reads_is_kept_from_eviction(root, monkeypatch):
    monkeypatch.setattr(encode, "KEEP_PERIOD", 0.02)
    space = root.child("cache/latents/space")
    TensorCache(space).write({"a": torch.ones(3)})
    [index] = [space.local_path(entry.path) for entry in space.list("index")]
    item = SimpleNamespace(latents=("a",), text="t", caption="")
    frozen = SimpleNamespace(train=(item,), validation=(), empty="e", latents="cache/latents/space", text="cache/text")
    for _ in range(2):  # again and again
        os.utime(index, (time.time() - 0.9 * FRESH_SECONDS,) * 2)
        with encode.keeping_caches(frozen, root):
            end = time.monotonic() + 60
            while time.time() - index.stat().st_mtime > 1000:
                assert time.monotonic() < end
                time.sleep(0.01)
