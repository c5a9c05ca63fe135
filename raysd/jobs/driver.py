"""What a job runs on the cluster: a command of raysd, started again when it dies, and ended with care when asked.

    python -m raysd.jobs.driver --retries 3 [--lease PATH] -- train lora-demo --name cats

A command that was killed, or that failed because a store or the cluster did not answer, is started again under the same
name and so goes on from its last checkpoint. Exit status 2 (the request was wrong) and a training that failed are final.

`raysd jobs stop` writes `jobs/<id>/stop.json` into the storage. The command then gets SIGTERM, with all the time that its
checkpoint takes; when it has ended, `jobs/<id>/ended.json` says so, and the job is stopped.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from raysd.errors import RaysdError
from raysd.jobs.outcome import FILE, PASSING
from raysd.storage import Storage

LOOK = 2.0
"""Seconds between two looks for a wish to stop."""
PAUSES = (2.0, 5.0, 15.0, 30.0)
"""Seconds before each restart; the last one for all after it."""
LEASE_SECONDS = 90.0
"""How long a lease of a lost predecessor is waited for: three times its ttl."""
GOODBYE = 60.0
"""Seconds for which an ended job waits to be stopped, so that its status says stopped rather than failed."""
COMMAND = "from raysd.cli import main; main()"


class Driver:
    """Runs one command to its end."""

    def __init__(self, words: Sequence[str], retries: int, lease: str | None, job: str, again: bool):
        self.words, self.retries, self.lease, self.job, self.again = list(words), retries, lease, job, again
        self.storage = Storage()
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = threading.Event()  # through the storage
        self.terminated = threading.Event()  # by SIGTERM, which the command gets from Ray too

    def run(self) -> int:
        """The job's exit status: the command's own, 1 where it was killed for the last time."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._watch, daemon=True).start()
        with tempfile.TemporaryDirectory(prefix="raysd-job-") as scratch:
            status = self._attempts(Path(scratch) / "outcome")
        if self.asked.is_set() and status != 0:
            self._say_ended()
        return status

    def _attempts(self, outcome: Path) -> int:
        for attempt in range(self.retries + 1):
            if attempt or self.again:
                self._await_lease()
            code = self._once(outcome)
            if code in (0, 2) or self._stopping() or not may_pass(code, outcome):
                break
            if attempt == self.retries:
                say(f"{how(code)}; it has been started again {self.retries} times, and is given up")
                break
            pause = PAUSES[min(attempt, len(PAUSES) - 1)]
            say(f"{how(code)}; it is started again in {pause:.0f} s ({attempt + 1} of {self.retries})")
            self._sleep(pause)
            if self._stopping():
                break
        return code if code in (0, 1, 2) else 1

    def _once(self, outcome: Path) -> int:
        outcome.write_text("")
        # As standard output is a file, there are no control codes in it, unless the node's environment forces them.
        values = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")}
        values |= {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": values.get("COLUMNS", "160"), FILE: str(outcome)}
        command = [sys.executable, "-c", COMMAND, *self.words]
        self.child = subprocess.Popen(command, env=values, stdin=subprocess.DEVNULL)
        if self.asked.is_set():
            self._end_child()
        return self.child.wait()

    def _watch(self) -> None:
        """End the command when the storage says so. A store that does not answer is asked again."""
        while not self.asked.is_set():
            time.sleep(LOOK)
            with suppress(RaysdError):
                if self.storage.exists(stop_path(self.job)):
                    say("asked to stop: the command writes a checkpoint first")
                    self.asked.set()
                    self._end_child()

    def _end_child(self) -> None:
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Ray signals the command as well: a second signal from here would mean that it should end at once."""
        self.terminated.set()

    def _stopping(self) -> bool:
        return self.asked.is_set() or self.terminated.is_set()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stopping():
            time.sleep(0.1)

    def _await_lease(self) -> None:
        """A predecessor on a lost node cannot release its lease; it runs out."""
        from raysd.lease import holder

        if self.lease is None:
            return
        folder, _, name = self.lease.rpartition("/")
        end = time.monotonic() + LEASE_SECONDS
        said = False
        while time.monotonic() < end and not self._stopping():
            with suppress(RaysdError):
                held = holder(self.storage.child(folder), name)
                if held is None or not held.alive:
                    return
                if not said:
                    say(f"{folder} is held by {held.host}, process {held.pid}: waiting until that is over")
                    said = True
            self._sleep(1.0)

    def _say_ended(self) -> None:
        with suppress(RaysdError):
            self.storage.write(ended_path(self.job), json.dumps({"ended": time.time()}).encode())
        end = time.monotonic() + GOODBYE
        while time.monotonic() < end and not self.terminated.is_set():
            time.sleep(0.1)


def stop_path(job: str) -> str:
    return f"jobs/{job}/stop.json"


def ended_path(job: str) -> str:
    return f"jobs/{job}/ended.json"


def may_pass(code: int, outcome: Path) -> bool:
    """Whether a command that ended so may succeed when it is started again."""
    return code < 0 or code >= 128 or (code == 1 and outcome.read_text() == PASSING)


def how(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"the command was ended by {signal.Signals(-code).name}"
    return f"the command ended with status {code}"


def say(text: str) -> None:
    print(f"raysd: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m raysd.jobs.driver")
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--lease", default=None)
    parser.add_argument("words", nargs="+")
    given = parser.parse_args()
    # Ray tells a job's process who it is.
    about = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    job = about.get("job_submission_id", "local")
    again = about.get("raysd_attempt", "1") != "1"
    try:
        sys.exit(Driver(given.words, given.retries, given.lease, job, again).run())
    except RaysdError as error:  # a storage that cannot be one
        say(str(error))
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
