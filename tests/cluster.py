"""One local Ray cluster for the whole session, and the CLI run as a person runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster with more CPUs than cores: tests ask for workers, not for speed."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less for each run
    import ray

    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=10**9,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


_drivers: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_driver_outlives_its_test() -> Iterator[None]:
    """One that a failed test left would keep the cluster's CPUs from all tests after it."""
    yield
    while _drivers:
        driver = _drivers.pop()
        if driver.poll() is None:
            driver.kill()
            driver.communicate()


def raysd(
    *words: str, storage: Path | str, address: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it."""
    process = start(*words, storage=storage, address=address, **environment)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def start(*words: str, storage: Path | str, address: str | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start the command with a storage of its own."""
    values = {**os.environ, "RAYSD_STORAGE": str(storage), "RAY_AUTH_MODE": "disabled", "COLUMNS": "200", **environment}
    if address:
        values["RAY_ADDRESS"] = address
    command = [sys.executable, "-c", "from raysd.cli import main; main()", *words]
    process = subprocess.Popen(command, env=values, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if words[0] in ("train", "tune", "runs"):
        _drivers.append(process)
    return process


def json_of(done: subprocess.CompletedProcess[str]) -> Any:
    """Standard output as one JSON document; fails if there is anything else."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
