"""Ray's job API over HTTP, with time limits and with messages that name the cluster. Imports Ray."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from raysd.errors import NotFound, RaysdError, RequestError
from raysd.jobs.clusters import Cluster, token_of

CONNECT = 5.0
"""Seconds in which a cluster has to take a connection."""
FIRST = 10.0
"""Seconds in which it has to say its version."""
ANSWER = 30.0
"""Seconds in which it has to answer anything else."""
UPLOAD = 300.0
"""Seconds that a folder may take on its way."""
OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""Kinds of failure that are none of the command: its node went away."""


class Unreachable(RequestError):
    """A cluster did not answer in time."""


class Client(JobSubmissionClient):
    """The job server of one cluster.

    Raises Unreachable, RequestError (no token, a wrong one, not a Ray cluster), NotFound for a job that is not there.
    """

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        token, self.token_from = token_of(cluster)
        # An empty header keeps Ray from looking for a token of its own: which one is sent is decided in one place.
        headers = {"Authorization": f"Bearer {token}" if token else ""}
        authority = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        try:
            with _no_other_address(cluster.url):
                super().__init__(cluster.url, headers=headers, verify=authority or True)
        except RaysdError:
            raise
        except FileNotFoundError:
            raise RequestError(f"REQUESTS_CA_BUNDLE or SSL_CERT_FILE: there is no {authority}") from None
        except (requests.exceptions.RequestException, RuntimeError, ValueError, KeyError) as error:
            raise RequestError(f"cluster {cluster}: does not answer as a Ray dashboard: {_line(error)}") from None

    def details(self, id: str) -> JobDetails:
        """What the cluster knows of a job. Raises NotFound."""
        answer = self._do_request("GET", f"/api/jobs/{id}")
        if answer.status_code == 404:
            raise NotFound(f"job {id}: not on cluster {self.cluster}; see raysd jobs list")
        if answer.status_code != 200:
            self._raise_error(answer)
        return JobDetails(**answer.json())

    def ours(self) -> list[JobDetails]:
        """The jobs that raysd submitted, oldest first."""
        found = [job for job in self.list_jobs() if job.submission_id and "raysd" in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0)

    def head_has_cpus(self) -> bool | None:
        """Whether the head node takes work; None where the cluster does not say."""
        try:
            answer = self._do_request("GET", "/api/v0/nodes?detail=1&limit=1000")
            nodes = answer.json()["data"]["result"]["result"]
            heads = [node for node in nodes if node["is_head_node"] and node["state"] == "ALIVE"]
            return heads[0]["resources_total"].get("CPU", 0) > 0
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None

    def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
        limit = UPLOAD if given.get("data") else FIRST if endpoint == "/api/version" else ANSWER
        try:
            return super()._do_request(method, endpoint, timeout=(CONNECT, limit), **given)
        except AuthenticationError as error:
            raise RequestError(self._refused(str(error))) from None
        except requests.exceptions.SSLError as error:
            why = re.search(r"certificate verify failed: ([^(]+)", str(error))
            raise RequestError(
                f"cluster {self.cluster}: its certificate is not trusted: {why[1].strip() if why else _line(error)}\n"
                "name the file of the authority that signed it: SSL_CERT_FILE=/path/ca.pem"
            ) from None
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            kind = "took too long" if isinstance(error, requests.exceptions.Timeout) else "nobody answers there"
            raise Unreachable(
                f"cluster {self.cluster}: {kind}; is it up, and is this the address of its dashboard?"
            ) from None

    def _refused(self, answer: str) -> str:
        if "Missing" in answer or "required" in answer.lower():
            return (
                f"cluster {self.cluster}: wants a token, and none was sent\n"
                "set RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH (a file with the token), or token_file in clusters.toml"
            )
        return (
            f"cluster {self.cluster}: refuses this token, which came from {self.token_from}\nset the cluster's own one"
        )

    def _raise_error(self, answer: Any) -> None:
        lines = [line for line in answer.text.splitlines() if line.strip()]
        raise RaysdError(
            f"cluster {self.cluster}: {answer.status_code}: {(lines or ['no reason given'])[-1].strip()[:300]}"
        )


def exit_status(job: JobDetails) -> int:
    """That of the job's command: 0 done, 1 failed, 2 the request was wrong."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return 2 if job.driver_exit_code == 2 else 1


def lost(job: JobDetails) -> bool:
    """Whether the job failed because the process or the node that ran its command went away."""
    if job.status != JobStatus.FAILED:
        return False
    code = job.driver_exit_code
    return job.error_type in LOST or (code is not None and (code < 0 or code >= 128))


def about(job: JobDetails) -> dict[str, Any]:
    """What raysd noted of a job when it submitted it."""
    return {name.removeprefix("raysd_"): value for name, value in (job.metadata or {}).items() if "raysd" in name}


def entry_of(job: JobDetails) -> dict[str, Any]:
    return dict(json.loads(about(job).get("entry", "{}")))


@contextmanager
def _no_other_address(url: str) -> Iterator[None]:
    """Ray would rather go where RAY_ADDRESS points, whatever it was told."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
