"""Runs that are killed, stopped, or lose their lease: nothing is lost, and the weights end as if nothing had happened."""

import json
import os
import signal
import time
import tomllib
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from raysd.config import TrainingSpec, load
from raysd.errors import LeaseLost
from raysd.lease import RENEWALS, TTL, check_fence
from raysd.storage import Storage
from raysd.train import checkpoint, runs
from raysd.train.launch import train
from tests.base import toml
from tests.cluster import json_of, raysd, start

STEPS = 14
SPEC = {"scale__workers": 2, "scale__zero_stage": 2, "optim__steps": STEPS, "optim__ema": 0.9}


@pytest.fixture(scope="module")
def path(tiny_base, tiny_pictures, tmp_path_factory):
    return toml(tmp_path_factory.mktemp("spec"), tiny_base, tiny_pictures, **SPEC)


@pytest.fixture(scope="module")
def undisturbed(path, ray_address, tmp_path_factory):
    """The tensors of the last checkpoint of a run that nothing happened to, and its metrics."""
    store = tmp_path_factory.mktemp("undisturbed")
    body = json_of(raysd("train", str(path), "--name", "run", "--json", storage=store, address=ray_address))
    assert body["status"] == "finished"
    return tensors(store), losses(store)


def store_of(store: Path) -> Storage:
    return Storage(str(store)).child("runs/run")


def tensors(store: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(store_of(store))
    assert newest is not None
    assert newest.step == STEPS
    with checkpoint.tensors(store_of(store), newest) as readers:
        return {name: read().clone() for name, read in readers.items()}


def losses(store: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in runs.metrics(store_of(store)) if "loss" in row]


def wait_until(what: Callable[[], bool], process: "psutil.Popen | None" = None, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def reached(store: Path, step: int) -> Callable[[], bool]:
    """Whether a complete checkpoint of `step` or later is there."""
    pattern = "runs/run/checkpoints/*/checkpoint.json"
    return lambda: any(int(path.parent.name.split("-")[0]) >= step for path in store.glob(pattern))


def train_workers() -> list[psutil.Process]:
    """Those of these tests' own cluster: others may run on this machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return found


def assert_as_undisturbed(store: Path, undisturbed: tuple[dict[str, torch.Tensor], list[tuple[int, float]]]) -> None:
    expected, metrics = undisturbed
    got = tensors(store)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    # A driver killed with SIGKILL may lose the rows of its last moments; those that are there are as undisturbed.
    assert set(losses(store)) <= set(metrics)
    assert losses(store)[-1] == metrics[-1]


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.soak)])
def test_a_driver_killed_and_started_again_ends_in_the_same_weights(path, ray_address, undisturbed, tmp_path, step):
    process = start("train", str(path), "--name", "run", storage=tmp_path, address=ray_address)
    wait_until(reached(tmp_path, step), process)
    process.kill()
    process.wait()
    shown = json_of(raysd("runs", "show", "run", "--json", storage=tmp_path))
    assert (shown["status"], shown["version"]) == ("interrupted", None)
    assert step <= shown["checkpoint"] < STEPS
    assert (
        json_of(raysd("runs", "resume", "run", "--json", storage=tmp_path, address=ray_address))["version"] == "cats@1"
    )
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.soak), 10])
def test_a_worker_killed_is_replaced_and_the_run_ends_in_the_same_weights(
    path, ray_address, undisturbed, tmp_path, step
):
    process = start("train", str(path), "--name", "run", "--json", storage=tmp_path, address=ray_address)
    wait_until(reached(tmp_path, step), process)
    train_workers()[-1].kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out)["version"] == "cats@1"
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.long
def test_a_hang_ends_the_attempt_with_stacks_and_the_run_goes_on(path, ray_address, undisturbed, tmp_path):
    """A frozen worker makes the other one wait in a collective; that one notices, and both are replaced."""
    words = ["train", str(path), "--name", "run", "--scale.hang-minutes", "0.4", "--json"]
    process = start(*words, storage=tmp_path, address=ray_address)
    wait_until(reached(tmp_path, 4), process)
    train_workers()[-1].suspend()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out)["version"] == "cats@1"
    assert_as_undisturbed(tmp_path, undisturbed)
    found = [file.read_text() for file in (tmp_path / "runs/run/stacks").glob("*-rank-*.txt")]
    assert found
    assert all("made no step for 0.4 minutes" in text for text in found)
    # Where the other one waited depends on the moment: in a step, a validation or a checkpoint, all of them below this.
    assert any('train/worker.py", line' in text and "in _run" in text for text in found)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("SIGTERM", marks=pytest.mark.soak),
        pytest.param("SIGINT", marks=pytest.mark.soak),
        pytest.param("runs stop", marks=pytest.mark.long),
    ],
)
def test_stopping_writes_a_checkpoint_and_resuming_goes_on(path, ray_address, undisturbed, tmp_path, how):
    process = start("train", str(path), "--name", "run", storage=tmp_path, address=ray_address)
    wait_until(reached(tmp_path, 2), process)
    if how == "runs stop":
        frozen = train_workers()[-1]  # the run could be over before the command has begun
        frozen.suspend()
        assert raysd("runs", "stop", "run", storage=tmp_path).returncode == 0
        time.sleep(4)  # the driver looks for the wish every 2 s
        frozen.resume()
    else:
        process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "go on: raysd runs resume run" in err
    shown = json_of(raysd("runs", "show", "run", "--json", storage=tmp_path))
    assert shown["status"] == "interrupted"
    assert shown["step"] == shown["checkpoint"] < STEPS
    assert (
        json_of(raysd("runs", "resume", "run", "--json", storage=tmp_path, address=ray_address))["status"] == "finished"
    )
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.long
def test_a_second_driver_is_refused_and_one_that_lost_its_lease_stops(path, ray_address, tmp_path):
    process = start("train", str(path), "--name", "run", "--optim.steps", "4000", storage=tmp_path, address=ray_address)
    wait_until(reached(tmp_path, 2), process)
    second = raysd("train", str(path), "--name", "run", "--optim.steps", "4000", storage=tmp_path, address=ray_address)
    assert second.returncode == 2
    assert f"process {process.pid}" in second.stderr
    assert len(second.stderr.strip().splitlines()) <= 3
    wait_until(lambda: "ray_raysd_train_step{" in scraped(), process, seconds=60)
    # Somebody else takes the run over, as after a network cut: a higher token, and a name that is not this process's.
    lease = tmp_path / "runs/run" / runs.LEASE
    body = json.loads(lease.read_text())
    lease.write_text(json.dumps({**body, "token": body["token"] + 1, "nonce": "another"}))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in err
    with pytest.raises(Exception, match="run"):
        check_fence(store_of(tmp_path), runs.LEASE, body["token"], body["nonce"])
    last = checkpoint.latest(store_of(tmp_path))
    assert last is not None
    assert last.step < 4000
    assert not (tmp_path / "models").exists()


def scraped() -> str:
    """What Prometheus would read on the cluster's nodes."""
    import ray

    ports = [node["MetricsExportPort"] for node in ray.nodes()]
    return "".join(
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode() for port in ports
    )


@pytest.mark.long
def test_a_lease_lost_while_the_caches_are_filled_ends_the_run_before_any_worker_starts(path, ray_address, tmp_path):
    """Until then there is nobody to stop, so the loss is looked for before workers are asked for."""
    seen = []

    def watch(event):
        if event["kind"] == "phase":
            seen.append(event["text"])
        if event == {"kind": "phase", "text": "starting Ray"}:
            body = json.loads(lease.read_text())
            lease.write_text(json.dumps({**body, "token": body["token"] + 1, "nonce": "another"}))
            time.sleep(TTL / RENEWALS + 2)  # the next renewal finds it

    lease = tmp_path / "runs/run" / runs.LEASE
    with pytest.raises(LeaseLost, match="the lease was taken by"):
        train(load(TrainingSpec, tomllib.loads(path.read_text())), "run", Storage(str(tmp_path)), watch)
    assert "starting Ray" in seen
    assert "starting workers" not in seen
    assert json.loads(lease.read_text())["nonce"] == "another", "the one who took it keeps it"
    assert checkpoint.latest(store_of(tmp_path)) is None


@pytest.mark.long
def test_a_loss_that_is_no_number_fails_the_run_with_advice(path, ray_address, tmp_path):
    words = ["train", str(path), "--name", "run", "--optim.lr", "1e30", "--optim.clip", "null", "--scale.restarts", "3"]
    done = raysd(*words, storage=tmp_path, address=ray_address)
    assert done.returncode == 1
    assert "lower optim.lr" in done.stderr
    assert "Traceback" not in done.stderr
    assert json_of(raysd("runs", "show", "run", "--json", storage=tmp_path))["status"] == "failed"


def test_no_process_of_these_runs_is_left(ray_address):
    wait_until(lambda: not train_workers(), seconds=30)
    assert os.getpid()
