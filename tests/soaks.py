"""What the long tests found, kept in the repository: `make soak` writes it, `python -m benchmarks --page` shows it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import soaks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


_passed = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """Seeds and numbers for people. Of a test that passed they are kept where RAYSD_SOAK_RESULTS says."""
    facts: dict[str, object] = {}
    began = time.monotonic()
    yield facts
    folder = os.environ.get("RAYSD_SOAK_RESULTS")
    long = any(request.node.get_closest_marker(name) for name in ("soak", "measured"))
    if folder and long and request.node.stash.get(_passed, False):
        name = request.node.nodeid.removeprefix("tests/integration/")
        soaks.keep(Path(folder), name, time.monotonic() - began, facts)
