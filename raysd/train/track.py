"""Where step metrics go besides metrics.jsonl: TensorBoard files, MLflow, Weights & Biases, Prometheus."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from raysd.config import TrainingSpec
from raysd.errors import RequestError
from raysd.quiet import bring_in
from raysd.storage import Storage
from raysd.train.runs import public_spec


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under the run's tensorboard/; a remote store gets them at the end."""

    def __init__(self, run: Storage):
        from tensorboard.summary import Writer

        self.run, self.local = run, run.local_path("tensorboard")
        self.scratch = None if self.local else tempfile.TemporaryDirectory(prefix="raysd-")
        self.folder = self.local or Path(self.scratch.name)  # type: ignore[union-attr]
        self.writer = Writer(str(self.folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
        if self.scratch is not None:
            for path in self.folder.glob("*tfevents*"):
                self.run.upload(path, f"tensorboard/{path.name}")
            self.scratch.cleanup()


class MLflow:
    def __init__(self, uri: str, name: str, spec: TrainingSpec):
        mlflow = _require("mlflow")
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("raysd")
        self.mlflow = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_dict(public_spec(spec.model_dump(mode="json")), "spec.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class Wandb:
    def __init__(self, project: str, name: str, spec: TrainingSpec):
        wandb = _require("wandb")
        self.run = wandb.init(project=project, name=name, config=public_spec(spec.model_dump(mode="json")))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Prometheus:
    """Gauges of the last step, through Ray's metrics agent; labelled with the run."""

    def __init__(self, name: str):
        from ray.util.metrics import Gauge

        self.gauge, self.tags, self.gauges = Gauge, {"run": name}, {}  # type: Any, dict[str, str], dict[str, Any]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for metric, value in {"step": float(step), **values}.items():
            full = f"raysd_train_{metric}"
            if full not in self.gauges:
                self.gauges[full] = self.gauge(full, description=f"{metric} of a training run", tag_keys=("run",))
            self.gauges[full].set(value, tags=self.tags)

    def close(self) -> None:
        self.gauges.clear()


def require_trackers(spec: TrainingSpec) -> None:
    """Raises RequestError for a tracker that is asked for and not installed."""
    for name in ("mlflow", "wandb"):
        if getattr(spec.track, name):
            _require(name)


class Trackers:
    """All trackers that a spec asks for, as one."""

    def __init__(self, run: Storage, name: str, spec: TrainingSpec, tell: Callable[[str], None]):
        self.tell = tell
        self.failed: set[str] = set()
        self.trackers: list[Tracker] = [Prometheus(name)]
        if spec.track.tensorboard:
            self.trackers.append(TensorBoard(run))
        if spec.track.mlflow:
            self.trackers.append(MLflow(spec.track.mlflow, name, spec))
        if spec.track.wandb:
            self.trackers.append(Wandb(spec.track.wandb, name, spec))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            self._try(tracker, partial(tracker.log, step, values))

    def close(self) -> None:
        for tracker in self.trackers:
            self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        """A run does not end because a tracker has a bad minute; each says so once."""
        try:
            act()
        except Exception as error:
            name = type(tracker).__name__
            if name not in self.failed:
                self.failed.add(name)
                self.tell(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")


def _require(module: str) -> Any:
    try:
        return bring_in(module)
    except ImportError:
        raise RequestError(f"track.{module}: not installed; pip install 'raysd[{module}]'") from None
