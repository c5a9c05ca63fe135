"""Stopping a job with care: Ray gives it 3 seconds, a checkpoint takes longer. Imports Ray."""

import json
import time
from collections.abc import Callable

from ray.job_submission import JobDetails, JobStatus

from raysd.errors import RaysdError, RequestError
from raysd.jobs.client import OVER, Client, about
from raysd.jobs.driver import ended_path, stop_path
from raysd.storage import Storage

SAY_EVERY = 5.0
FORCED = 60.0
"""Seconds in which Ray has to end a job that it was told to stop."""


def stop(client: Client, id: str, seconds: float, now: bool, say: Callable[[str], None]) -> JobDetails:
    """Ask the command to end, wait for `seconds` at most, then stop the job. `now`: stop it without asking.

    Raises RequestError for a job that is over, or whose storage cannot be reached from here.
    """
    job = client.details(id)
    if job.status in OVER:
        raise RequestError(f"job {id} is over: {job.status.value.lower()}")
    waits = job.status == JobStatus.PENDING  # nothing of it runs yet that could be asked, or lose anything
    storage = None if now or waits else _storage(job)
    if storage is not None:
        _ask(storage, id)
        say(f"asked job {id} to end; what trains writes a checkpoint first")
        job = _wait(client, storage, id, seconds, say)
    if job.status not in OVER:
        client.stop_job(id)
        job = _await_end(client, id)
    if storage is not None:
        storage.delete(stop_path(id))
        storage.delete(ended_path(id))
    return job


def _storage(job: JobDetails) -> Storage | None:
    """Where the job listens; None for one that raysd did not submit."""
    url = about(job).get("storage")
    return Storage(url) if url else None


def _ask(storage: Storage, id: str) -> None:
    try:
        storage.write(stop_path(id), json.dumps({"asked": time.time()}).encode())
    except RaysdError as error:
        raise RequestError(
            f"{str(error).splitlines()[0]}\nthe job is asked to stop through its storage, which does not let us in from here\n"
            f"at the price of the work since the last checkpoint: raysd jobs stop {id} --now"
        ) from None


def _wait(client: Client, storage: Storage, id: str, seconds: float, say: Callable[[str], None]) -> JobDetails:
    began = said = time.monotonic()
    while True:
        job = client.details(id)
        if job.status in OVER or storage.exists(ended_path(id)):
            return job
        now = time.monotonic()
        if now - began > seconds:
            say(
                f"it has not ended after {seconds:.0f} s, and is stopped: what it did since its last checkpoint is lost"
            )
            return job
        if now - said > SAY_EVERY:
            say(f"waiting for it to end: {now - began:.0f} s of {seconds:.0f}")
            said = now
        time.sleep(1.0)


def _await_end(client: Client, id: str) -> JobDetails:
    end = time.monotonic() + FORCED
    while True:
        job = client.details(id)
        if job.status in OVER:
            return job
        if time.monotonic() > end:
            why = "does not end though it was stopped; see the cluster's dashboard"
            if job.status == JobStatus.PENDING:
                why = (
                    "waits for a node that suits its own process, and Ray cannot stop it before it runs; it gives up by "
                    "itself (RAY_JOB_START_TIMEOUT_SECONDS)"
                )
            raise RaysdError(f"job {id}: {why}")
        time.sleep(0.5)
