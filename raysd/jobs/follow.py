"""Following a job: its log without gaps or repetitions over broken connections, until it ends. Imports Ray."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from raysd.errors import RaysdError
from raysd.jobs.client import ANSWER, CONNECT, OVER, Client, Unreachable, lost
from raysd.jobs.submit import go_on

SILENCE = 30.0
"""Seconds without a line after which the connection is doubted and made anew; doubled while nothing comes."""
MOST_SILENCE = 300.0
PATIENCE = 600.0
"""Seconds for which a cluster that does not answer is waited for."""
PERIOD = 2.0
"""Seconds between two looks at a job whose log is not wanted."""
Say = Callable[[str], None]


class Follower:
    """Writes the log of one job as it grows. Ray sends it from its beginning each time: what was written is skipped."""

    def __init__(self, client: Client, id: str, write: Say, say: Say):
        self.client, self.id, self.write, self.say = client, id, write, say
        self.written = 0  # characters

    def follow(self) -> JobDetails:
        """Follow until the job is over. Raises NotFound, Unreachable after PATIENCE seconds without an answer."""
        silence = SILENCE
        patience = Patience(self.say)
        while True:
            before = self.written
            try:
                job = self.client.details(self.id)
                asyncio.run(self._tail(ANSWER if job.status in OVER else silence))
                if job.status in OVER:
                    return job
                self._explain(self.client.details(self.id))
                patience.answered()
            except (Unreachable, aiohttp.ClientError, OSError) as problem:
                if self.written > before:
                    patience.answered()
                patience.wait(problem)
                continue
            silence = SILENCE if self.written > before else min(2 * silence, MOST_SILENCE)

    async def _tail(self, silence: float) -> None:
        """Write what is new, until the log ends or nothing comes for `silence` seconds."""
        seen = 0
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
        address = f"{self.client._address}/api/jobs/{self.id}/logs/tail"
        tls: Any = True if self.client._ssl_context is None else self.client._ssl_context
        async with (
            aiohttp.ClientSession(headers=self.client._headers, timeout=limits, trust_env=True) as session,
            session.ws_connect(address, ssl=tls, max_msg_size=0) as socket,
        ):
            while True:
                try:
                    message = await socket.receive(timeout=silence)
                except TimeoutError:
                    return
                if message.type != aiohttp.WSMsgType.TEXT:
                    return
                text = message.data
                fresh = text[max(0, self.written - seen) :]
                seen += len(text)
                if fresh:
                    self.write(fresh)
                    self.written = seen

    def _explain(self, job: JobDetails) -> None:
        if job.status == JobStatus.PENDING and not self.written:
            self.say(f"job {self.id} waits: {_first(job.message) or 'the cluster has not started it yet'}")


class Patience:
    """How long an answer is waited for, with growing pauses."""

    def __init__(self, say: Say, seconds: float = PATIENCE):
        self.say, self.seconds = say, seconds
        self.answered()

    def answered(self) -> None:
        self.since: float | None = None
        self.pause = 1.0

    def wait(self, problem: Exception) -> None:
        """Raises `problem`, as Unreachable, when it has gone on for too long."""
        if self.since is None:
            self.since = time.monotonic()
            self.say(f"the connection is lost ({_first(str(problem)) or type(problem).__name__}); trying again")
        if time.monotonic() - self.since > self.seconds:
            raise problem if isinstance(problem, RaysdError) else Unreachable(str(problem))
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, 15.0)


def to_end(client: Client, id: str, write: Say | None, say: Say) -> JobDetails:
    """Follow a job (without `write`: wait for it) until it is over. One whose node was lost is submitted again."""
    while True:
        job = Follower(client, id, write, say).follow() if write else wait(client, id, say)
        if not lost(job):
            return job
        submitted = go_on(client, job)
        if submitted is None:
            return job
        say(f"job {id} was lost with its process or node; it goes on as {submitted.id}")
        id = submitted.id


def wait(client: Client, id: str, say: Say) -> JobDetails:
    """Look now and then until the job is over."""
    patience = Patience(say)
    while True:
        try:
            job = client.details(id)
            patience.answered()
        except Unreachable as problem:
            patience.wait(problem)
            continue
        if job.status in OVER:
            return job
        time.sleep(PERIOD)


def reason(job: JobDetails) -> str:
    """Why a job is not done, in a line."""
    if job.status == JobStatus.STOPPED:
        return "it was stopped"
    if job.driver_exit_code is not None:
        return f"its command ended with status {job.driver_exit_code}"
    return _first(job.message) or "the cluster does not say why"


def _first(text: str | None) -> str:
    return next((line.strip()[:300] for line in (text or "").splitlines() if line.strip()), "")
