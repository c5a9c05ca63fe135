"""An S3 server in a process of its own, reached over HTTP on the loopback interface; and a registry to start from."""

import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from raysd.registry import Registry, Version
from raysd.storage import Storage
from tests.ports import free_port
from tests.versions import files_of

# moto looks at a condition and writes in two steps; S3 does it in one, so requests take turns here.
SERVER = """
import os, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

turn, app = threading.Lock(), DomainDispatcherApplication(create_backend_app)

def in_turn(environ, start_response):
    with turn:
        return app(environ, start_response)

# The pipe closes when the tests end, however they do.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
run_simple(sys.argv[2], int(sys.argv[1]), in_turn, threaded=True, request_handler=MotoRequestHandler)
"""


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port), "127.0.0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(server, f"http://127.0.0.1:{port}/moto-api/data.json")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a folder in a new bucket, with the environment set as a user would."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"test-{uuid.uuid4().hex}"
    options = {"endpoint_url": s3_endpoint, "key": "test", "secret": "test"}
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return f"s3://{bucket}/root"


@pytest.fixture(params=["local", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind."""
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry in a local folder, and a local cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Registry(Storage(str(tmp_path / "store")))


@pytest.fixture
def put(registry: Registry, tmp_path: Path) -> Callable[[int], Version]:
    """Publishes cats of a seed in it."""

    def publish_one(seed: int) -> Version:
        return registry.publish("cats", files_of(tmp_path / f"files{seed}", seed), {"seed": seed}, key=f"key{seed}")

    return publish_one


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < end, "the S3 server did not start"
            time.sleep(0.05)
