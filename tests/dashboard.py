"""A Ray cluster as somebody else's: a dashboard that wants a token, a head that takes no work, and a node that does.

Or a single node with a dashboard for everybody on this machine.
"""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ports import free_port

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Secured:
    """Where its dashboard answers and its processes meet, and the file of its token."""

    url: str
    address: str
    token_file: Path
    scratch: Path


@contextmanager
def secured(folder: Path, cpus: int, **environment: str) -> Iterator[Secured]:
    """Started with ports and a session folder of its own, ended by pid. The node has a desk and stands in the attic."""
    token_file = folder / "token"
    token_file.write_text(uuid.uuid4().hex + uuid.uuid4().hex)
    scratch, gcs, dashboard = _scratch(), free_port(), free_port()
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    values, head = _environment(**access | environment), _head(gcs, dashboard, 0, scratch)
    node = [f"--address={HOST}:{gcs}", f"--num-cpus={cpus}", '--resources={"desk": 1}', "--labels=room=attic"]
    log = (folder / "nodes.log").open("w")
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(head, values, log))
        url = f"http://{HOST}:{dashboard}"
        _wait(started[0], f"{url}/api/jobs/", token_file.read_text(), folder / "nodes.log")
        started.append(_start(node, values, log))
        _wait(started[1], f"{url}/api/v0/nodes?detail=1", token_file.read_text(), folder / "nodes.log", "attic")
        yield Secured(url, f"{HOST}:{gcs}", token_file, scratch)
    finally:
        _end(started, str(scratch))
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def single(folder: Path, cpus: int, **environment: str) -> Iterator[str]:
    """The URL of the dashboard of one node, which wants no token. Ended by pid."""
    scratch, dashboard, log = _scratch(), free_port(), (folder / "nodes.log").open("w")
    head, values = _head(free_port(), dashboard, cpus, scratch), _environment(RAY_AUTH_MODE="disabled", **environment)
    started = [_start(head, values, log)]
    try:
        _wait(started[0], f"http://{HOST}:{dashboard}/api/jobs/", "none", folder / "nodes.log")
        yield f"http://{HOST}:{dashboard}"
    finally:
        _end(started, str(scratch))
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch() -> Path:
    """A session folder of its own. A socket's path may have 107 characters: it lies under a short name."""
    return Path("/tmp") / f"raysd-{uuid.uuid4().hex[:8]}"


def _environment(**more: str) -> dict[str, str]:
    values = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "AWS_"))}
    return values | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        **more,
    }


def _head(gcs: int, dashboard: int, cpus: int, scratch: Path) -> list[str]:
    head = ["--head", f"--port={gcs}", f"--num-cpus={cpus}", "--include-dashboard=true", f"--dashboard-host={HOST}"]
    return [*head, f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}", f"--temp-dir={scratch}"]


def _end(started: "list[subprocess.Popen[bytes]]", scratch: str) -> None:
    """Kill all processes of this cluster at once: asked politely, a node waits for half a minute."""
    family = [psutil.Process(process.pid) for process in started if process.poll() is None]
    family += [child for process in family for child in process.children(recursive=True)]
    family += [p for p in psutil.process_iter(["cmdline"]) if scratch in " ".join(p.info["cmdline"] or [])]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for node in started:
        node.wait()


def _start(options: list[str], values: dict[str, str], log: object) -> "subprocess.Popen[bytes]":
    ports = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    own = [f"--{name}={free_port()}" for name in ports]
    own += ["--block", f"--node-ip-address={HOST}", "--object-store-memory=200000000"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *own]
    return subprocess.Popen(command, env=values, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # type: ignore[call-overload]


def _wait(node: "subprocess.Popen[bytes]", url: str, token: str, log: Path, text: str = "") -> None:
    """Until the dashboard answers with this text."""
    end = time.monotonic() + 180
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    while True:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if text in answer.read().decode():
                return
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.3)
