"""A PostgreSQL server of its own for the session, on the loopback interface, not run as root."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

PASSWORD = "s3cret-word"


class Postgres:
    """One server and its files. `stop` and `start` are a restart: the data stays."""

    def __init__(self, binaries: Path, folder: Path, identity: dict[str, int | list[int]]):
        self.binaries, self.folder, self.identity = binaries, folder, identity
        self.port = free_port()
        word = folder / "word"
        word.write_text(PASSWORD)
        os.chown(word, int(identity.get("user", os.getuid())), -1)
        self._run("initdb", "-D", str(folder / "data"), "-U", "raysd", "--auth=scram-sha-256", f"--pwfile={word}")
        self.start()

    def start(self) -> None:
        options = ["-p", str(self.port), "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        command = [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *options]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **self.identity)  # type: ignore[call-overload]
        end = time.monotonic() + 60
        while not self._ready():
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < end, "PostgreSQL did not start"
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # its fast shutdown
        self.process.wait(60)

    def url(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "raysd", name)
        return f"postgresql+psycopg://raysd:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def _ready(self) -> bool:
        command = [str(self.binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command).returncode == 0

    def _run(self, name: str, *words: str) -> None:
        environment = {**os.environ, "PGPASSWORD": PASSWORD, "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [str(self.binaries / name), *words],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            **self.identity,
        )  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server. Skips where Debian's package postgresql is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="raysd-postgres-"))  # pytest's own folders are closed to other users
    identity: dict[str, int | list[int]] = {}
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    try:
        server = Postgres(binaries, folder, identity)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/some where/x%y.db"
    return str(request.getfixturevalue("postgres").url())


def _binaries() -> Path | None:
    """Debian keeps them off the path, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path else None
