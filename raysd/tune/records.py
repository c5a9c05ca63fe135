"""What a search has tried: one JSON file a trial, under `searches/<name>/`."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from raysd.config import SearchSpec, TrainingSpec, load
from raysd.config.search import HIGHER
from raysd.errors import NotFound, RequestError
from raysd.lease import holder
from raysd.storage import Storage
from raysd.train.runs import NAME
from raysd.tune.space import key_of

Status = Literal["running", "interrupted", "finished", "stopped", "cut", "failed"]
"""Of a trial: `stopped` by the scheduler, `cut` by the budget, `interrupted` with the search."""
SEARCH = "search.json"
PLAN = "plan"
LEASE = "lease.json"
WHOLE = ("finished", "stopped", "failed")
"""What is never run again."""
LONGEST_NAME = 48
"""Of a search: its runs' names are its own with 15 characters more at most, and have 63."""
WORSE = "worse than others by then"
"""Why the scheduler stopped a trial."""


def cost_of(metric: str, value: float) -> float:
    """The value, or its negative where higher is better."""
    return -value if metric in HIGHER else value


@dataclass(frozen=True)
class TrialRecord:
    """One setting and what came of it.

    `reports` hold step, epoch, validation_loss and seconds of training so far; the last one of a finished trial also the
    scores of its pictures, where the objective has any.
    """

    key: str
    values: dict[str, Any]
    run: str
    status: Status = "running"
    reason: str | None = None
    reports: tuple[dict[str, float], ...] = ()
    started: float = field(default_factory=time.time)
    seconds: float = 0.0  # of the clock, from the start of the trial to its end, over all attempts
    written: float = field(default_factory=time.time)  # when `seconds` was so much
    workers: int = 1
    gpus: int = 0  # of all its workers together

    def best(self, metric: str) -> float | None:
        """The best finite value reported; of seconds the last."""
        values = [report[metric] for report in self.reports if metric in report and math.isfinite(report[metric])]
        if not values:
            return None
        return values[-1] if metric == "seconds" else min(values, key=lambda value: cost_of(metric, value))

    def costs(self, objective: Sequence[str]) -> list[float] | None:
        """`best` of each metric, lower being better; None if the trial has not reported them all."""
        found = [(metric, self.best(metric)) for metric in objective]
        costs = [cost_of(metric, value) for metric, value in found if value is not None]
        return costs if len(costs) == len(found) else None

    def seconds_by(self, now: float) -> float:
        """Of the clock, those since the last write of a trial that runs included."""
        return self.seconds + (max(0.0, now - self.written) if self.status == "running" else 0.0)

    @property
    def epochs(self) -> float:
        return self.reports[-1]["epoch"] if self.reports else 0.0


@dataclass(frozen=True)
class SearchRecord:
    """One search. `status` as written may say running of a process that died: `read` says what is true now."""

    name: str
    spec: dict[str, Any]
    training: dict[str, Any]
    status: Literal["running", "interrupted", "finished"] = "running"
    ended_by: str | None = None
    created: float = field(default_factory=time.time)
    seconds: float = 0.0
    nodes: tuple[tuple[float, int], ...] = ()  # (seconds since the start, nodes alive), where the number changed
    versions: tuple[str, ...] = ()

    @property
    def published(self) -> bool:
        """Whether nothing is left to do."""
        return self.status == "finished" and bool(self.versions)

    def search_spec(self) -> SearchSpec:
        return load(SearchSpec, self.spec, self.name)

    def training_spec(self) -> TrainingSpec:
        return load(TrainingSpec, self.training, self.name)


def run_of(search: str, key: str) -> str:
    """The name of a trial's run."""
    return f"{search}-{key}"


def run_on_all(search: str, trial: TrialRecord, epochs: float) -> str:
    """The name of the run of a trial's settings on all pictures: another one for each number of epochs."""
    return f"{search}-all-{key_of({'trial': trial.key, 'epochs': epochs})}"


def storage_of(root: Storage, name: str) -> Storage:
    """The search's own folder. Raises RequestError for a name that cannot be one."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise RequestError(f"search name {name!r}: use a-z, 0-9, '.', '_' and '-', {LONGEST_NAME} characters at most")
    return root.child(f"searches/{name}")


def read(root: Storage, name: str) -> SearchRecord:
    """The record as it is true now. Raises NotFound."""
    store = storage_of(root, name)
    try:
        body = json.loads(store.read(SEARCH))
    except NotFound:
        raise NotFound(f"search {name}: not in {root.url}") from None
    body["nodes"] = tuple((float(when), int(count)) for when, count in body["nodes"])
    record = SearchRecord(**{**body, "versions": tuple(body["versions"])})
    if record.status == "running":
        alive = holder(store, LEASE)
        if alive is None or not alive.alive:
            record = replace(record, status="interrupted")
    return record


def write(store: Storage, record: SearchRecord) -> SearchRecord:
    store.write(SEARCH, json.dumps(asdict(record), indent=1).encode())
    return record


def trials(store: Storage) -> list[TrialRecord]:
    """All trials, in the order they began."""
    bodies = [store.read(entry.path) for entry in store.list("trials") if entry.path.endswith(".json")]
    stopped = {entry.path for entry in store.list("stopped")}
    found = [_as_stopped(trial) if _mark(trial.key) in stopped else trial for trial in map(_trial, bodies)]
    return sorted(found, key=lambda trial: (trial.started, trial.key))


def read_trial(store: Storage, key: str) -> TrialRecord | None:
    try:
        trial = _trial(store.read(f"trials/{key}.json"))
    except NotFound:
        return None
    return _as_stopped(trial) if store.exists(_mark(key)) else trial


def mark_stopped(store: Storage, key: str) -> None:
    """The scheduler has stopped that trial. A file of its own: the trial's process may still write the trial's."""
    store.write(_mark(key), b"{}")


def write_trial(store: Storage, trial: TrialRecord) -> TrialRecord:
    store.write(f"trials/{trial.key}.json", json.dumps(asdict(trial)).encode())
    return trial


def ranked(found: Iterable[TrialRecord], objective: Sequence[str]) -> list[TrialRecord]:
    """Trials that reported all of the objective, the best first; of several metrics the first one ranks.

    What a trial reported before it failed is nobody's to have, and ranks nowhere.
    """
    sound = [trial for trial in found if trial.status != "failed"]
    scored = [(costs, trial) for trial in sound if (costs := trial.costs(objective)) is not None]
    return [trial for _, trial in sorted(scored, key=lambda row: row[0])]


def front(found: Iterable[TrialRecord], objective: Sequence[str]) -> list[TrialRecord]:
    """The trials that no other beats: as good in every metric and better in one (Pareto).

    Of those that finished, and of those that the budget cut short after they had reported all of the objective: but not
    where seconds are one, in which a cut trial beats all others by having been cut.
    """
    states = ("finished",) if "seconds" in objective else ("finished", "cut")
    whole = ranked([trial for trial in found if trial.status in states], objective)
    points = [trial.costs(objective) or [] for trial in whole]

    def beaten(mine: list[float]) -> bool:
        return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in points)

    return [trial for trial, point in zip(whole, points, strict=True) if not beaten(point)]


def _mark(key: str) -> str:
    return f"stopped/{key}.json"


def _as_stopped(trial: TrialRecord) -> TrialRecord:
    return trial if trial.status in WHOLE else replace(trial, status="stopped", reason=WORSE)


def _trial(body: bytes) -> TrialRecord:
    values = json.loads(body)
    return TrialRecord(**{**values, "reports": tuple(values["reports"])})
