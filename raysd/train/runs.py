"""The record of a run: its spec, what became of it, and where its files are. Written by the holder of its lease."""

import json
import re
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from raysd import revision
from raysd.config import TrainingSpec, load
from raysd.data.source import without_secrets
from raysd.errors import LeaseHeld, NotFound, RequestError
from raysd.lease import Lease, holder
from raysd.storage import Storage
from raysd.train import checkpoint

Status = Literal["running", "interrupted", "failed", "finished"]
RECORD = "run.json"
LEASE = "lease.json"
STOP = "stop.json"
USAGE = "usage.json"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class RunRecord:
    """One run. `status` as written may say running of a process that died: `read` says what is true now."""

    name: str
    spec: dict[str, Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: Status = "running"
    created: float = field(default_factory=time.time)
    step: int = 0
    total: int = 0
    checkpoint: int | None = None
    best_step: int | None = None
    base_loss: float | None = None
    loss: float | None = None  # validation loss of what is published
    version: str | None = None
    error: str | None = None
    code: str = field(default_factory=revision.code)

    def training_spec(self) -> TrainingSpec:
        return load(TrainingSpec, self.spec, self.name)


def public_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """A run's settings without passwords and signatures in URLs: for all but the record, which a resume reads."""
    source, mlflow = spec["data"]["source"], spec["track"]["mlflow"]
    data = {**spec["data"], "source": without_secrets(source)}
    return {**spec, "data": data, "track": {**spec["track"], "mlflow": mlflow and without_secrets(mlflow)}}


def public(record: RunRecord) -> RunRecord:
    return replace(record, spec=public_spec(record.spec))


def storage_of(root: Storage, name: str) -> Storage:
    """The run's own folder. Raises RequestError for a name that cannot be one."""
    if not NAME.fullmatch(name):
        raise RequestError(f"run name {name!r}: use a-z, 0-9, '.', '_' and '-', starting with a letter or digit")
    return root.child(f"runs/{name}")


def read(root: Storage, name: str) -> RunRecord:
    """The record as it is true now: a run whose driver is gone is interrupted. Raises NotFound."""
    run = storage_of(root, name)
    try:
        record = RunRecord(**json.loads(run.read(RECORD)))
    except NotFound:
        raise NotFound(f"run {name}: not in {root.url}; see raysd runs list") from None
    newest = checkpoint.latest(run)
    if record.status == "running":
        alive = holder(run, LEASE)
        if alive is None or not alive.alive:
            record = replace(record, status="interrupted")
    return replace(record, checkpoint=newest.step if newest else None, step=_step(record, run, newest))


def write(run: Storage, record: RunRecord) -> RunRecord:
    run.write(RECORD, json.dumps(asdict(record), indent=1).encode())
    return record


def names(root: Storage) -> list[str]:
    found = [entry.path.split("/") for entry in root.list("runs")]
    return sorted({parts[1] for parts in found if len(parts) == 3 and parts[2] == RECORD})


def request_stop(root: Storage, name: str) -> None:
    """Ask the driver of a run, wherever it is, to write a checkpoint and end. Raises RequestError if it is not running."""
    record = read(root, name)
    if record.status != "running":
        raise RequestError(f"run {name} is {record.status}, not running")
    storage_of(root, name).write(STOP, json.dumps({"asked": time.time()}).encode())


def delete(root: Storage, name: str) -> None:
    """Remove a run and its checkpoints; published versions stay. Raises LeaseHeld while it runs."""
    if read(root, name).status == "running":
        raise LeaseHeld(f"run {name} is running: raysd runs stop {name} first")
    run = storage_of(root, name)
    with Lease.acquire(run, LEASE):
        run.delete(RECORD)  # first: from here on it is no run, wherever this ends
        for entry in run.list(recursive=False):
            if entry.path.endswith("/"):
                run.delete_tree(entry.path)
            elif entry.path != LEASE:  # it stays, as its token has to go on growing
                run.delete(entry.path)


def metrics(run: Storage) -> list[dict[str, Any]]:
    """The step records of a run, oldest first."""
    try:
        return [json.loads(line) for line in run.read("metrics.jsonl").splitlines() if line.strip()]
    except NotFound:
        return []


def samples(run: Storage) -> dict[int, list[bytes]]:
    """The PNGs that the run drew of its fixed prompts, by step."""
    found: dict[int, list[bytes]] = {}
    for path in sorted(entry.path for entry in run.list("samples") if entry.path.endswith(".png")):
        step = int(path.rsplit("/", 1)[-1].split("-")[0])
        found.setdefault(step, []).append(run.read(path))
    return found


def differences(first: RunRecord, second: RunRecord) -> list[tuple[str, Any, Any]]:
    """(dotted path, value in the first, value in the second) of every setting and result that differs."""
    a, b = _flat(_comparable(first)), _flat(_comparable(second))
    return [(path, a.get(path), b.get(path)) for path in sorted({*a, *b}) if a.get(path) != b.get(path)]


def _comparable(record: RunRecord) -> dict[str, Any]:
    results = {"status": record.status, "step": record.step, "loss": record.loss, "base_loss": record.base_loss}
    return {**record.spec, "result": results}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in values.items():
        rows.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return rows


def _step(record: RunRecord, run: Storage, newest: checkpoint.Checkpoint | None) -> int:
    """The last step that still counts: of a run that is not running, the last checkpoint's."""
    if record.status == "running":
        rows = metrics(run)
        return int(rows[-1]["step"]) if rows else 0
    return newest.step if newest else 0
