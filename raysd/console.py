"""What a person sees while something runs: one line of progress on a terminal, a line now and then in a log."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG_PERIOD = 5.0
"""Seconds between two progress lines where standard error is no terminal."""

errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


class Watcher:
    """Shows the events of a run (`launch.Watch`) on standard error."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.total = self.batch = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_line = 0.0
        self._rate = Rate()

    def __enter__(self) -> "Watcher":
        if not self.quiet and errors.is_terminal:
            what, text = (TextColumn(form, markup=False) for form in ("{task.description}", "{task.fields[text]}"))
            self._bar = Progress(what, BarColumn(), text, TimeRemainingColumn(), console=errors, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if not self.quiet:
            getattr(self, "_" + event["kind"], lambda event: None)(event)

    def _phase(self, event: dict[str, Any]) -> None:
        self.total, self.batch = event.get("total", self.total), event.get("batch", self.batch)
        self._line(event["text"])

    def _trial(self, event: dict[str, Any]) -> None:
        self._line(event["text"])

    def _notice(self, event: dict[str, Any]) -> None:
        self._line(event["text"])

    def _data(self, event: dict[str, Any]) -> None:
        for warning in event["report"].warnings:
            self._line(f"data: {warning}")

    def _count(self, event: dict[str, Any]) -> None:
        self._advance(event["text"], event["done"], event["of"], f"{event['done']}/{event['of']}")

    def _start(self, event: dict[str, Any]) -> None:
        self._rate = Rate()
        workers = f"{event['world']} worker{'s' if event['world'] > 1 else ''}"
        self._line(f"training with {workers} from step {event['step']} of {self.total}")

    def _step(self, event: dict[str, Any]) -> None:
        rate = self._rate.of(event["time"], event["step"])
        left = (self.total - event["step"]) / rate if rate else 0.0
        text = f"step {event['step']}/{self.total}  loss {event['loss']:.4f}"
        if rate:
            text += f"  {rate * self.batch:.1f} pictures/s  {left:.0f} s left"
        self._advance("train", event["step"], self.total, text)

    def _validation(self, event: dict[str, Any]) -> None:
        self._line(f"step {event['step']}: validation loss {event['validation_loss']:.4f}")

    def _advance(self, what: str, done: int, of: int, text: str) -> None:
        if self._bar is None:
            if time.monotonic() >= self._next_line or done == of:
                self._next_line = time.monotonic() + LOG_PERIOD
                self._line(f"{what}: {text}" if what != "train" else text)
            return
        if self._task is None:
            self._task = self._bar.add_task(what, total=of, text=text)
        self._bar.update(self._task, description=what, completed=done, total=of, text=text)

    def _line(self, text: str) -> None:
        errors.print(text, soft_wrap=True)


class Rate:
    """Steps a second over the last records."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def of(self, when: float, step: int) -> float | None:
        self.seen = [*self.seen[-49:], (when, step)]
        (first, start), (last, end) = self.seen[0], self.seen[-1]
        return (end - start) / (last - first) if last > first else None
