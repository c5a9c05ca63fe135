"""Submitting: the same thing twice is one job, and what ended in failure may go on. Imports Ray."""

import json
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from raysd import __version__
from raysd.cluster import ENTRY_CPUS
from raysd.errors import NotFound, RaysdError
from raysd.jobs.client import OVER, Client, about, entry_of
from raysd.jobs.clusters import EntrySpec
from raysd.jobs.command import Command
from raysd.jobs.package import Selection, pack

SHARE = 0.1
"""CPUs that the command takes where the head node has none: it lands on a node that takes work."""


@dataclass(frozen=True)
class Submission:
    """A job that is to be: `base` is its id, to which the number of the attempt is added from the second one on."""

    base: str
    command: Command
    storage: str
    environment: Mapping[str, str]
    sent: Selection | None
    retries: int
    entry: EntrySpec


@dataclass(frozen=True)
class Submitted:
    id: str
    new: bool
    """Otherwise the same submission is there already."""
    attempt: int
    done: bool = False
    """It has succeeded already."""


def submit(client: Client, wanted: Submission, again: bool = False) -> Submitted:
    """Submit a job, unless the same one runs or has succeeded (`again`: then too). Raises RequestError, RaysdError."""
    last = latest(client, wanted.base)
    attempt = 1
    if last is not None:
        attempt = _attempt(wanted.base, last)
        running = last.status not in OVER
        if running or (last.status == JobStatus.SUCCEEDED and not again):
            return Submitted(str(last.submission_id), False, attempt, done=not running)
        attempt += 1
    resources = _resources(client, wanted.entry)
    metadata = {
        "raysd": __version__,
        "raysd_command": shlex.join(wanted.command.words),
        "raysd_storage": wanted.storage,
        "raysd_base": wanted.base,
        "raysd_retries": str(wanted.retries),
        "raysd_entry": json.dumps(resources),
        **({"raysd_run": wanted.command.run} if wanted.command.run else {}),
        **({"raysd_search": wanted.command.search} if wanted.command.search else {}),
    }
    with tempfile.TemporaryDirectory(prefix="raysd-send-") as scratch:
        runtime = {}
        if wanted.sent is not None:
            archive = Path(scratch) / "folder.zip"
            pack(wanted.sent, archive)
            runtime = {"working_dir": str(archive)}
        line = entrypoint(wanted, resources.get("entrypoint_num_cpus", 0))
        return _send(client, wanted.base, attempt, line, metadata, runtime, resources)


def go_on(client: Client, job: JobDetails) -> Submitted | None:
    """Submit a job whose node was lost once more; None where it has been often enough."""
    known = about(job)
    times = int(known.get("lost", "0"))
    if times >= int(known.get("retries", "0")):
        return None
    metadata = {**(job.metadata or {}), "raysd_lost": str(times + 1)}
    runtime = {key: value for key, value in (job.runtime_env or {}).items() if key == "working_dir"}
    base = known["base"]
    return _send(client, base, _attempt(base, job) + 1, job.entrypoint, metadata, runtime, entry_of(job))


def latest(client: Client, base: str) -> JobDetails | None:
    """The last attempt of a submission."""
    attempts = [job for job in client.ours() if _attempt(base, job)]
    return max(attempts, key=lambda job: _attempt(base, job), default=None)


def entrypoint(wanted: Submission, cpus: float) -> str:
    """The shell command of the job. It holds what the cluster should know of this environment: the command's process
    alone needs it, and workers without variables of their own are those that the cluster has ready."""
    values = {"RAYSD_STORAGE": wanted.storage, **wanted.environment, **({ENTRY_CPUS: str(cpus)} if cpus else {})}
    words = ["env", *(f"{name}={value}" for name, value in sorted(values.items()))]
    words += ["python", "-m", "raysd.jobs.driver", "--retries", str(wanted.retries)]
    words += ["--lease", wanted.command.lease] if wanted.command.lease else []
    return "exec " + shlex.join([*words, "--", *wanted.command.words])


def _send(
    client: Client,
    base: str,
    attempt: int,
    line: str,
    metadata: dict[str, str],
    runtime: dict[str, Any],
    resources: dict[str, Any],
) -> Submitted:
    id = base if attempt == 1 else f"{base}-{attempt}"
    metadata = {**metadata, "raysd_attempt": str(attempt)}
    try:
        client.submit_job(entrypoint=line, submission_id=id, metadata=metadata, runtime_env=runtime, **resources)
    except RaysdError:
        try:
            client.details(id)  # somebody was faster with the same
        except NotFound:
            pass
        else:
            return Submitted(id, False, attempt)
        raise
    return Submitted(id, True, attempt)


def _attempt(base: str, job: JobDetails) -> int:
    """The number in a job's id; 0 for a job of another submission."""
    found = re.fullmatch(re.escape(base) + r"(?:-(\d+))?", str(job.submission_id))
    return int(found[1] or 1) if found else 0


def _resources(client: Client, entry: EntrySpec) -> dict[str, Any]:
    """Where the command runs. A head without CPUs is there for Ray alone."""
    cpus = entry.cpus
    if cpus is None:
        elsewhere = bool(entry.resources or entry.labels)
        cpus = SHARE if not elsewhere and client.head_has_cpus() is False else 0
    wanted = {"num_cpus": cpus, "resources": dict(entry.resources), "label_selector": dict(entry.labels)}
    return {f"entrypoint_{name}": value for name, value in wanted.items() if value}
