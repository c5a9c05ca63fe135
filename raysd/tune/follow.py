"""What the driver sees of its trials: who was stopped, what is spent, and a line for the person who waits."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback

from raysd.config import SearchSpec
from raysd.config.search import BudgetSpec
from raysd.storage import Storage
from raysd.train.follow import Watch
from raysd.train.memory import how_killed
from raysd.tune import records
from raysd.tune.records import cost_of
from raysd.tune.space import key_of, short
from raysd.tune.trial import OVER, WORST

LOOK_SECONDS = 5.0
"""Between two looks at what the trials have cost: each reads all their records."""
NOTE_SECONDS = 20.0
"""Between two notes of what the search has taken."""
DIED = "its process died too often"


class Unsaved:
    """Ray Tune pickles all that it is given beside its own state. Neither is ever read here, and this holds locks."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Budget(Unsaved, tune.Stopper):
    """Ends the search when hours, GPU hours or money are used up, over all its attempts."""

    def __init__(self, budget: BudgetSpec, store: Storage, before: float):
        self.budget, self.store, self.before = budget, store, before
        self.began = time.monotonic()
        self.looked = -math.inf
        self.spent: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop_all()

    def stop_all(self) -> bool:
        if self.spent is None:
            self.spent = self._exceeded()
        return self.spent is not None

    def _exceeded(self) -> str | None:
        budget = self.budget
        if budget.hours is not None and self.before + time.monotonic() - self.began >= 3600 * budget.hours:
            return "budget.hours"
        early = time.monotonic() - self.looked < LOOK_SECONDS
        if early or (budget.gpu_hours is None and budget.money is None):
            return None
        found, now = records.trials(self.store), time.time()
        self.looked = time.monotonic()
        gpu_hours = sum(trial.seconds_by(now) * trial.gpus for trial in found) / 3600
        if budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours:
            return "budget.gpu_hours"
        hours = sum(trial.seconds_by(now) * trial.workers for trial in found) / 3600
        if budget.money is not None and budget.price is not None and hours * budget.price >= budget.money:
            return "budget.money"
        return None


class Progress(Unsaved, Callback):
    """Notes what was stopped, tells the watcher, and lets SIGTERM end a search as Ctrl-C does."""

    def __init__(
        self,
        spec: SearchSpec,
        budget: Budget,
        watch: Watch,
        store: Storage,
        lost: threading.Event,
        note: Callable[[], None] = lambda: None,
    ):
        self.spec, self.budget, self.watch, self.store, self.lost = spec, budget, watch, store, lost
        self.done, self._note, self._noted = 0, note, time.monotonic()

    def setup(self, **info: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: end_search())

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.lost.is_set():
            end_search()
        elif time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            self._note()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self.done += 1
        if not result.get(OVER) and self.budget.spent is None:
            records.mark_stopped(self.store, key_of(trial.config))
        shown = "  ".join(f"{path} {short(value)}" for path, value in trial.config.items())
        metric = self.spec.objective[0]
        cost = result.get(metric)
        value = f"no {metric}" if cost is None or cost >= WORST else f"{metric} {cost_of(metric, cost):.4f}"
        self.watch({"kind": "trial", "text": f"trial {self.done}/{self.spec.trials}: {value}  {shown}"})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.done += 1
        how = how_killed(_error_of(trial))
        reason = f"{DIED}: the last one {how}" if how else DIED
        record = records.read_trial(self.store, key_of(trial.config))
        if record is not None and record.status not in records.WHOLE:
            records.write_trial(self.store, replace(record, status="failed", reason=reason))
        self.watch({"kind": "trial", "text": f"trial {self.done}/{self.spec.trials}: {reason}"})


def _error_of(trial: Any) -> str:
    """The text that Ray Tune keeps of a trial's last error."""
    try:
        return Path(trial.error_file).read_text()
    except (OSError, TypeError):
        return ""


@contextmanager
def signals_given_back() -> Iterator[None]:
    """Ray Tune and `Progress` take over how a process ends, and do not give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def end_search() -> None:
    """As Ctrl-C: Ray Tune takes this signal for one in every state, stops the trials and returns."""
    os.kill(os.getpid(), signal.SIGUSR1)
