"""Commands as jobs of a cluster with a token: from submission to a registered version, over lost drivers, and stopped."""

import asyncio
import datetime
import http.server
import ipaddress
import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import psutil
import pytest
from aiohttp import web

from raysd.registry import Registry
from raysd.storage import Storage
from raysd.train import checkpoint, runs
from tests.base import toml
from tests.cluster import json_of, raysd, start
from tests.dashboard import Secured, secured
from tests.ports import free_port

SECRET = "hunter2-of-the-store"
LONG = {"optim__steps": 1000, "checkpoint__every": 5}


@dataclass(frozen=True)
class Place:
    """A cluster, a bucket that it reaches, and the environment of somebody outside who may use both."""

    cluster: Secured
    storage: str
    environment: dict[str, str]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return raysd(*words, storage=self.storage, **{**self.environment, **environment})

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return start(*words, storage=self.storage, **self.environment)

    def jobs(self) -> list[dict[str, Any]]:
        return json_of(self.run("jobs", "list", "--json"))

    def job(self, id: str) -> dict[str, Any]:
        return next(job for job in self.jobs() if job["id"] == id)


@pytest.fixture(scope="module")
def place(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("jobs")
    bucket = f"jobs-{uuid.uuid4().hex}"
    access = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET}
    access["AWS_DEFAULT_REGION"] = "us-east-1"
    fsspec.filesystem("s3", endpoint_url=s3_endpoint, key="test", secret=SECRET).mkdir(bucket)
    with secured(folder, cpus=3, XDG_CACHE_HOME=str(folder / "cache"), **access) as cluster:
        table = f'[test]\nurl = "{cluster.url}"\nshared_folders = ["{tmp_path_factory.getbasetemp()}"]\n'
        (folder / "clusters.toml").write_text(table)
        own = {"RAYSD_CLUSTERS": str(folder / "clusters.toml"), "RAYSD_CLUSTER": "test", **access}
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_file), "RAY_AUTH_TOKEN": ""}
        yield Place(cluster, f"s3://{bucket}/root", {**own, "RAYSD_DATABASE": f"postgresql://me:{SECRET}@db/raysd"})


@pytest.fixture
def storage(place: Place, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The bucket, as the test itself sees it."""
    for name, value in place.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return Storage(place.storage)


def wait_for(what: Callable[[], Any], seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
    return done.stderr


def test_without_the_token_nothing_is_submitted_and_the_message_says_what_to_set(place):
    before = place.jobs()
    message = refused(place.run("submit", "--", "runs", "list", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_MODE=""))
    assert "wants a token" in message
    assert "RAY_AUTH_TOKEN_PATH" in message
    message = refused(place.run("submit", "--", "runs", "list", RAY_AUTH_TOKEN="wrong-one"))
    assert "refuses this token, which came from RAY_AUTH_TOKEN" in message
    assert "wrong-one" not in message
    assert place.jobs() == before


def test_a_cluster_that_is_not_there_fails_by_name_within_seconds(place, tmp_path):
    known = tmp_path / "clusters.toml"
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
        known.write_text(f'[gone]\nurl = "http://127.0.0.1:{free_port()}"\n[mute]\nurl = "{mute}"\n')
        for name, reason in (("gone", "nobody answers there"), ("mute", "took too long")):
            began = time.monotonic()
            message = refused(place.run("submit", "--cluster", name, "--", "runs", "list", RAYSD_CLUSTERS=str(known)))
            assert f"cluster {name} (http://127.0.0.1:" in message
            assert reason in message
            assert time.monotonic() - began < 40


def test_followed_to_a_registered_version_and_the_same_submission_is_the_same_job(
    place, storage, tiny_base, tiny_pictures, tmp_path
):
    recipe = toml(tmp_path, tiny_base, tiny_pictures)
    words = ("train", str(recipe), "--name", "followed")
    follower = place.start("submit", "--follow", "--", *words)
    first = wait_for(lambda: [job for job in place.jobs() if job["run"] == "followed"])[0]
    second = place.run("submit", "--json", "--", *words)
    assert json_of(second)["id"] == first["id"]
    assert json_of(second)["new"] is False
    assert "is this submission already" in second.stderr
    log, said = follower.communicate(timeout=300)
    assert follower.returncode == 0, log + said
    assert f"submitted job {first['id']}, run followed" in said
    assert "step 6/6" in log
    assert "\x1b" not in log
    assert Registry(storage).resolve("cats@1").ref == "cats@1"
    assert [job["status"] for job in place.jobs() if job["run"] == "followed"] == ["succeeded"]
    again = place.run("submit", "--follow", "--", *words)
    assert again.returncode == 0
    assert "It has succeeded" in again.stderr
    assert again.stdout == log, "the same log once more, whole"
    everything = _raw(place, "/api/jobs/")
    assert SECRET not in everything + log + said + json.dumps(second.stderr)
    assert "not sent, they look like secrets: RAYSD_DATABASE" in said
    # The head takes no work: the command ran on the node that does.
    jobs = {job["submission_id"]: job for job in json.loads(everything)}
    nodes = json.loads(_raw(place, "/api/v0/nodes?detail=1"))["data"]["result"]["result"]
    head = next(node["node_id"] for node in nodes if node["is_head_node"])
    assert jobs[first["id"]]["driver_node_id"] != head


@pytest.mark.long
def test_a_failing_command_gives_its_exit_status_and_may_be_submitted_again(place):
    words = ("submit", "--follow", "--", "runs", "show", "nothing")
    first = place.run(*words)
    assert first.returncode == 2, first.stdout
    assert "run nothing: not in" in first.stdout
    assert "started again" not in first.stdout
    second = place.run(*words)
    assert second.returncode == 2
    ids = [job["id"] for job in place.jobs() if job["command"] == "raysd runs show nothing"]
    assert len(ids) == 2
    assert ids[1] == f"{ids[0]}-2"
    assert place.run("jobs", "wait", ids[0]).returncode == 2
    assert "run nothing: not in" in place.run("jobs", "logs", ids[0]).stdout
    assert refused(place.run("jobs", "logs", "unknown")).startswith("job unknown: not on cluster test")
    assert "is over: failed" in refused(place.run("jobs", "stop", ids[0]))


@pytest.mark.long
def test_the_commands_own_process_runs_where_it_was_asked_to(place):
    there = ["--entry-resource", "desk=1", "--entry-label", "room=attic"]
    assert place.run("submit", "--follow", *there, "--", "models", "list", "--json").returncode == 0
    assert "--entry-resource desk=" in refused(place.run("submit", "--entry-resource", "desk=x", "--", "runs", "list"))
    assert "expected NAME=VALUE" in refused(place.run("submit", "--entry-label", "room", "--", "runs", "list"))
    nowhere = json_of(place.run("submit", "--json", "--entry-label", "room=cellar", "--", "runs", "list"))
    time.sleep(5)
    # Until Ray gives up, as it cannot be stopped before it starts.
    assert place.job(nowhere["id"])["status"] == "pending"


def test_this_folder_goes_along_without_its_secrets(place, tiny_pictures, tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    for picture in tiny_pictures.iterdir():
        (tmp_path / "cats" / picture.name).write_bytes(picture.read_bytes())
    (tmp_path / ".env").write_text(SECRET)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    monkeypatch.chdir(tmp_path)
    done = place.run("submit", "--send", "--follow", "--", "data", "check", "./cats", "--resolution", "64", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out, they look like secrets: .env" in done.stderr
    assert "left out: 1 files and folders" in done.stderr
    unpacked = list(place.cluster.scratch.glob("session_2*/runtime_resources/working_dir_files/*/cats"))
    assert unpacked, "the job ran in the folder"
    assert all(not (folder.parent / name).exists() for folder in unpacked for name in (".env", "venv"))


@pytest.mark.long
def test_a_job_whose_own_process_is_killed_is_submitted_again_by_who_follows(place):
    follower = place.start("submit", "--follow", "--", "models", "list")
    killed = wait_for(lambda: _processes("raysd.jobs.driver", "models list"))[0]
    killed.kill()
    log, said = follower.communicate(timeout=120)
    assert follower.returncode == 0, log + said
    ids = [job["id"] for job in place.jobs() if job["command"] == "raysd models list"]
    assert [place.job(id)["status"] for id in ids] == ["failed", "succeeded"]
    assert f"job {ids[0]} was lost with its process or node; it goes on as {ids[1]}" in said


@pytest.mark.soak
def test_stopping_leaves_a_checkpoint_and_the_same_submission_goes_on_though_its_driver_is_killed(
    place, storage, tiny_base, tiny_pictures, tmp_path
):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so it is in the background, and processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    recipe = toml(tmp_path, tiny_base, tiny_pictures, publish__model=None, **LONG)
    words = ("submit", "--follow", "--", "train", str(recipe), "--name", "stopped")
    follower = place.start(*words)
    id = wait_for(lambda: [job["id"] for job in place.jobs() if job["run"] == "stopped"])[0]
    run = runs.storage_of(storage, "stopped")
    wait_for(lambda: len(runs.metrics(run)) > 5)
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert f"detached; the job goes on. Come back: raysd jobs logs {id} --follow" in said
    assert place.job(id)["status"] == "running"

    stopped = place.run("jobs", "stop", id, "--json")
    assert json_of(stopped)["status"] == "stopped", stopped.stderr
    newest = checkpoint.latest(run)
    assert newest is not None
    assert newest.step >= runs.metrics(run)[-1]["step"], "nothing that was done is lost"
    assert newest.step < LONG["optim__steps"]
    assert runs.read(storage, "stopped").status == "interrupted"
    assert not storage.list(f"jobs/{id}"), "nothing is left of the wish to stop"

    follower = place.start(*words)
    wait_for(lambda: checkpoint.latest(run).step > newest.step)
    _processes("from raysd.cli import main", str(recipe))[0].kill()
    killed = checkpoint.latest(run)
    wait_for(lambda: _starts(place, f"{id}-2")[1:] and checkpoint.latest(run).step > killed.step)
    assert json_of(place.run("jobs", "stop", f"{id}-2", "--json"))["status"] == "stopped"
    log, said = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert f"submitted job {id}-2, run stopped: attempt 2" in said
    assert f"job {id}-2 stopped: it was stopped" in said
    assert "the command was ended by SIGKILL; it is started again" in log
    assert log == place.run("jobs", "logs", f"{id}-2").stdout
    first, second = _starts(place, f"{id}-2")
    assert first == newest.step
    assert second >= killed.step


def _starts(place: Place, id: str) -> list[int]:
    """The steps that a job's trainings began from."""
    return [int(step) for step in re.findall(r"from step (\d+) of", place.run("jobs", "logs", id).stdout)]


def _processes(*parts: str) -> list[psutil.Process]:
    """Python processes whose command line has all the parts; a shell that starts one does not count."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line and "python" in line[0] and all(part in " ".join(line) for part in parts):
            found.append(process)
    return [process for process in found if "submit" not in process.info["cmdline"]]


def _raw(place: Place, path: str) -> str:
    import httpx

    token = place.cluster.token_file.read_text()
    return httpx.get(place.cluster.url + path, headers={"Authorization": f"Bearer {token}"}, timeout=30).text


# Without a cluster: a server that stands for one where a real one cannot be made to do it


@pytest.fixture
def flaky() -> Iterator[SimpleNamespace]:
    """A job server whose log comes in pieces of which each connection gets a few more, and then breaks."""
    lines = [f"line {number} äöü\n" for number in range(40)]
    state = SimpleNamespace(port=free_port(), lines=lines, connections=0)

    async def details(request: web.Request) -> web.Response:
        over = state.connections >= 4
        body = {
            "type": "SUBMISSION",
            "submission_id": "x",
            "entrypoint": "x",
            "status": "SUCCEEDED" if over else "RUNNING",
        }
        return web.json_response(body)

    async def tail(request: web.Request) -> web.WebSocketResponse:
        state.connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cuts = 2 + state.connections  # the pieces of each connection are cut elsewhere
        text = "".join(lines[: 10 * min(state.connections, 4)])
        for at in range(0, len(text), 7 * cuts):
            await socket.send_str(text[at : at + 7 * cuts])
        if state.connections < 4:
            request.transport.abort()
        return socket

    application = web.Application()
    application.router.add_get("/api/jobs/x", details)
    application.router.add_get("/api/jobs/x/logs/tail", tail)
    loop = asyncio.new_event_loop()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = web.AppRunner(application)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", state.port).start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", state.port)) == 0, 20)
    yield state
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_a_log_over_broken_connections_has_no_gap_and_no_repetition(flaky):
    from ray.job_submission import JobDetails

    from raysd.jobs.follow import Follower

    class Here:
        _address, _headers, _ssl_context = f"http://127.0.0.1:{flaky.port}", {}, None

        def details(self, id: str) -> JobDetails:
            import httpx

            return JobDetails(**httpx.get(f"{self._address}/api/jobs/{id}").json())

    written: list[str] = []
    said: list[str] = []
    job = Follower(Here(), "x", written.append, said.append).follow()  # type: ignore[arg-type]
    assert "".join(written) == "".join(flaky.lines)
    assert job.status == "SUCCEEDED"
    assert flaky.connections >= 4


@pytest.fixture
def https(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A dashboard's version behind a certificate that only its own authority vouches for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    certificate, private = tmp_path / "ca.pem", tmp_path / "server.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(key.private_bytes(*form))
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            body = json.dumps({"version": "4", "ray_version": "2.60.0"} if "version" in self.path else []).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(url=f"https://127.0.0.1:{server.server_address[1]}", certificate=str(certificate), seen=seen)
    server.shutdown()
    thread.join()


def test_tls_with_an_authority_of_ones_own(https, tmp_path):
    done = raysd("jobs", "list", "--cluster", https.url, storage=tmp_path, SSL_CERT_FILE="", REQUESTS_CA_BUNDLE="")
    assert "its certificate is not trusted" in refused(done)
    assert "SSL_CERT_FILE" in done.stderr
    assert not https.seen, "no token goes to who cannot be trusted"
    own = {
        "SSL_CERT_FILE": https.certificate,
        "REQUESTS_CA_BUNDLE": "",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "abc",
    }
    assert json_of(raysd("jobs", "list", "--json", "--cluster", https.url, storage=tmp_path, **own)) == []
    assert set(https.seen) == {"Bearer abc"}


def test_a_server_that_is_no_dashboard_is_named(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    assert "does not answer as a Ray dashboard" in refused(raysd("jobs", "list", "--cluster", url, storage=tmp_path))
    server.shutdown()
    thread.join()
