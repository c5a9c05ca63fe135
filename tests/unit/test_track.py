"""Trackers write what they are given, where a person would look for it."""

import pytest

from raysd.config import TrainingSpec, load
from raysd.errors import RequestError
from raysd.storage import Storage
from raysd.train import track
from tests.waiting import until

SECRET = {"source": "https://user:word@host.test/x.zip?sig=deadbeef"}
SPEC = load(TrainingSpec, {"data": SECRET, "optim": {"steps": 1}})


def test_tensorboard_files_hold_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = track.TensorBoard(Storage(str(tmp_path)))
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5 * step})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    name = "loss"
    assert name in tags["scalars"] + tags["tensors"]


def test_mlflow_gets_metrics_and_the_spec(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = track.MLflow(f"file://{tmp_path}/mlruns", "run", SPEC)
    tracker.log(3, {"loss": 0.25})
    tracker.close()
    [run] = mlflow.search_runs(experiment_names=["raysd"], output_format="list")
    assert run.data.metrics["loss"] == 0.25
    assert run.info.run_name == "run"
    assert (
        mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/spec.json")["data"]["source"] == "https://host.test/x.zip"
    )


def test_wandb_writes_its_files_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = track.Wandb("raysd", "run", SPEC)
    tracker.log(3, {"loss": 0.25})
    tracker.close()
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    until(lambda: b"https://host.test/x.zip" in path.read_bytes())  # a process of wandb's own writes it
    assert b"deadbeef" not in path.read_bytes()


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch):
    import importlib

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RequestError, match=r"track\.mlflow: not installed; pip install 'raysd\[mlflow\]'"):
        track._require("mlflow")


def test_a_tracker_that_fails_ends_nothing_and_says_so_once(tmp_path):
    said = []
    trackers = track.Trackers(Storage(str(tmp_path)), "run", SPEC, said.append)

    class Broken:
        def log(self, step, values):
            raise ConnectionError("no route to host")

        close = lambda self: self.log(0, {})  # noqa: E731

    class Counting:
        seen = 0

        def log(self, step, values):
            self.seen += 1

        def close(self):
            self.seen += 10

    counting = Counting()
    trackers.trackers = [Broken(), counting]
    trackers.log(1, {"loss": 0.5})
    trackers.log(2, {"loss": 0.5})
    trackers.close()
    assert said == ["Broken: no route to host"]
    assert counting.seen == 12
