"""A cluster of hosts with addresses of their own: network namespaces on a bridge, Ray with a token, an S3 server beside them.

    outside 10.77.X.1 (the bridge: where the tests run)
    store   10.77.X.2   S3
    head    10.77.X.10  takes no work
    host 0… 10.77.X.11… two CPUs each

A host is killed with all that runs on it, cut off by taking its cable out, or drained. Needs root. Everything is ended by pid.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import psutil
import pytest

from tests.conftest import SERVER

PORT, DASHBOARD, STORE_PORT = 6379, 8265, 9000
CPUS = 2
STORE, HEAD = 2, 10


class Hosts:
    """Starts with `start`, ends with `close`. Hosts have numbers from 0."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.name = uuid.uuid4().hex[:6]
        self.net = f"10.77.{int(self.name[:2], 16)}"
        self.token_file = folder / "token"
        self.token_file.write_text(uuid.uuid4().hex * 2)
        self.scratch = Path("/tmp") / f"raysd-{self.name}"
        self.bucket = f"hosts-{self.name}"
        self.access = {
            "AWS_ENDPOINT_URL": f"http://{self.net}.{STORE}:{STORE_PORT}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def url(self) -> str:
        """The dashboard's, as it is reached from outside."""
        return f"http://{self.net}.{HEAD}:{DASHBOARD}"

    @property
    def storage(self) -> str:
        return f"s3://{self.bucket}/root"

    @property
    def environment(self) -> dict[str, str]:
        """Of somebody outside who may use both. Files of the tests are on all hosts, which share a file system."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file), "RAY_AUTH_TOKEN": ""}
        clusters = self.folder / "clusters.toml"
        clusters.write_text(f'[hosts]\nurl = "{self.url}"\nshared_folders = ["{self.folder.parent}"]\n')
        return {**self.access, **token, "RAYSD_CLUSTERS": str(clusters), "RAYSD_CLUSTER": "hosts"}

    def start(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.net}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        self._add("s", STORE)
        self.start_store()
        self._add("h", HEAD)
        options = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=true"]
        self._ray("h", HEAD, [*options, f"--dashboard-host={self.net}.{HEAD}", f"--dashboard-port={DASHBOARD}"])
        self._wait(f"{self.url}/api/jobs/", 180)
        for number in range(self.count):
            self._add(str(number), HEAD + 1 + number)
        for number in range(self.count):  # one after the other: on few cores they would time out together
            self.join(number)
        options_ = {"endpoint_url": self.access["AWS_ENDPOINT_URL"], "key": "test", "secret": "test"}
        fsspec.filesystem("s3", **options_).mkdir(self.bucket)

    def start_store(self) -> None:
        """A new one is empty; one that was stopped goes on with `mend_store`."""
        self._run("s", [sys.executable, "-c", SERVER, str(STORE_PORT), f"{self.net}.{STORE}"], {}, stdin=self._pipe())
        self._wait(f"{self.access['AWS_ENDPOINT_URL']}/moto-api/data.json", 60)

    def join(self, number: int) -> None:
        """Start Ray on a host, anew after it was killed."""
        address = HEAD + 1 + number
        end = time.monotonic() + 180
        while f"{self.net}.{address}" in self._alive():  # the head has not noticed yet that it was killed
            assert time.monotonic() < end, f"host {number} stays"
            time.sleep(0.5)
        self._ray(str(number), address, [f"--address={self.net}.{HEAD}:{PORT}", f"--num-cpus={CPUS}"])
        while f"{self.net}.{address}" not in self._alive():
            assert time.monotonic() < end, "\n".join(file.read_text() for file in self.folder.glob("*.log"))
            time.sleep(0.5)

    def kill(self, number: int) -> None:
        """As if its power went."""
        for pid in self._pids(str(number)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, which: int | str) -> None:
        """Take the cable out: a host's number, or "s" for the store. What runs there goes on."""
        _ip("link", "set", self._cable(str(which)), "down")

    def mend(self, which: int | str) -> None:
        _ip("link", "set", self._cable(str(which)), "up")

    def freeze_store(self, yes: bool) -> None:
        """Connections are taken and nothing answers, as of a store that is overrun."""
        for pid in self._pids("s"):
            os.kill(pid, signal.SIGSTOP if yes else signal.SIGCONT)

    def drain(self, number: int, seconds: int) -> None:
        """A notice that the host will be gone, as its cloud gives it."""
        node = self.node_id(number)
        words = ["drain-node", "--address", f"{self.net}.{HEAD}:{PORT}", "--node-id", node]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(seconds)]
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        subprocess.run(self._inside("h", command), env=self._values(HEAD), check=True, capture_output=True, timeout=120)

    def node_id(self, number: int) -> str:
        return next(node["node_id"] for node in self._nodes() if node["node_ip"] == f"{self.net}.{HEAD + 1 + number}")

    def processes(self, word: str, which: int | str | None = None) -> list[psutil.Process]:
        """Those with `word` in their command line, on one host or on all."""
        names = [str(which)] if which is not None else ["h", *map(str, range(self.count))]
        found = []
        for pid in (pid for name in names for pid in self._pids(name)):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def host_of(self, pid: int) -> int:
        """The number of the host that a process runs on; -1 for one that has ended, or runs on no numbered host."""
        return next((number for number in range(self.count) if pid in self._pids(str(number))), -1)

    def close(self) -> None:
        for name in ["h", *map(str, range(self.count)), "s"]:
            for _ in range(2):  # a process may have begun another one meanwhile
                for pid in self._pids(name):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            _ip("netns", "del", self._space(name), check=False)
        _ip("link", "del", self._bridge, check=False)
        for log in getattr(self, "_logs", []):
            log.close()

    def _add(self, name: str, address: int) -> None:
        space, cable = self._space(name), self._cable(name)
        _ip("netns", "add", space)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{self.net}.{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        # Nothing goes there: Ray takes the address that a packet to the outside would leave from for its own.
        _ip("-n", space, "route", "add", "default", "via", f"{self.net}.1")

    def _ray(self, name: str, address: int, options: list[str]) -> None:
        own = ["--block", f"--node-ip-address={self.net}.{address}", "--object-store-memory=100000000"]
        # A socket's path may have 107 characters. Of its own, else each node's log monitor reads the others' logs.
        own += [f"--temp-dir={self.scratch}/{name}", "--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *own]
        self._run(name, command, self._values(address))

    def _values(self, address: int) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "AWS_", "RAYSD"))}
        return {
            **kept,
            **self.access,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / f"cache-{address}"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            # A host that is cut off is given up after some 10 s rather than half a minute.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "8",
        }

    def _run(self, name: str, command: list[str], values: dict[str, str], stdin: int = subprocess.DEVNULL) -> None:
        log = (self.folder / f"{name}.log").open("a")
        self._logs = [*getattr(self, "_logs", []), log]
        subprocess.Popen(
            self._inside(name, command),
            env=values or os.environ,
            stdin=stdin,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def _pipe(self) -> int:
        """The store's standard input: it ends when the tests do."""
        reader, self._writer = os.pipe()
        return reader

    def _inside(self, name: str, command: list[str]) -> list[str]:
        # Processes of its own: a command looks for Ray among those it sees, and a lease for its holder's pid.
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self._space(name), *alone, *command]

    def _pids(self, name: str) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def _alive(self) -> set[str]:
        """Addresses of the nodes that the head takes for alive."""
        return {node["node_ip"] for node in self._nodes()}

    def _nodes(self) -> list[dict[str, str]]:
        """Those that the head takes for alive."""
        found = json.loads(self._get(f"{self.url}/api/v0/nodes?detail=1&limit=100"))
        return [node for node in found["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def _get(self, url: str) -> bytes:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token_file.read_text()}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def _wait(self, url: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                self._get(url)
                return
            except OSError:
                assert time.monotonic() < end, "\n".join(file.read_text() for file in self.folder.glob("*.log"))
                time.sleep(0.3)

    @property
    def _bridge(self) -> str:
        return f"rsb{self.name}"

    def _space(self, name: str) -> str:
        return f"raysd-{self.name}-{name}"

    def _cable(self, name: str) -> str:
        return f"rs{self.name}{name}"


@contextmanager
def hosts(folder: Path, count: int = 3) -> Iterator[Hosts]:
    """Running hosts. Skips the test where there may be none."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("hosts of their own are network namespaces, which need root, iproute2 and unshare")
    running = Hosts(folder, count)
    try:
        running.start()
        yield running
    finally:
        running.close()


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)
