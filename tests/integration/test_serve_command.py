"""`raysd serve` as an operator runs it: a process that answers, is measured, and ends with all that it started."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from raysd.assets import asset
from raysd.registry import Registry
from raysd.serve.metrics import BATCH, IMAGES, REQUESTS, STEP, WAIT
from raysd.storage import Storage
from tests.adapters import publish_lora
from tests.cluster import json_of, raysd, start
from tests.dashboard import single
from tests.ports import free_port
from tests.prometheus import Prometheus, expressions

LOCAL = Path(__file__).parents[2] / "serve" / "local.yaml"
PATIENCE = 180
OF_VERSION = ("Requests by version A", "Duration A", "Pictures A", "One step A", "One step B", "Pictures a step A")
"""Panels that show a version which draws, a line each."""
OF_MODEL = ("Requests A", "Requests by outcome A", "95th percentile A", "Wait A", "Replicas A", "Models loaded A")


class Running:
    """The command, where it answers, and all processes that it started so far."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, store: Path):
        self.process, self.url, self.store = process, url, store
        self.family = psutil.Process(process.pid).children(recursive=True)

    def measured(self) -> dict[str, set[tuple[str, str]]]:
        """The (model, version) of each metric of ours that Ray exports."""
        found: dict[str, set[tuple[str, str]]] = {}
        for port in self._ports():
            with suppress(httpx.HTTPError, ValueError):
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
                for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
                    if sample.name.startswith("ray_raysd_") and sample.value > 0:
                        labels = sample.labels
                        found.setdefault(sample.name, set()).add((labels.get("model", ""), labels.get("version", "")))
        return found

    def metrics_port(self) -> int | None:
        """Where Ray's agent exports what is ours, once it does."""
        for port in self._ports():
            with suppress(httpx.HTTPError):
                if "ray_raysd_images_total" in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text:
                    return port
        return None

    def _ports(self) -> Iterator[int]:
        """Where Ray's agent listens: it tells nobody outside which port is the one of the metrics."""
        for process in self.family:
            with suppress(psutil.Error):
                if "agent" in " ".join(process.cmdline()).lower():
                    yield from (c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """serve/local.yaml with a version of the bundled model in place of the model itself."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tmp_path / "store"
    registry = Registry(Storage(str(store)))
    for seed in (1, 2):
        version = publish_lora(registry, asset("tiny-sd"), tmp_path / str(seed), seed)
        registry.alias(version, "production")
    registry.rollback("cats", "production")
    config = yaml.safe_load(LOCAL.read_text())
    config["applications"][0]["args"]["models"][0]["ref"] = "cats:production"
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    process = start("serve", str(tmp_path / "serve.yaml"), "--port", str(free_port()), storage=store)
    late = threading.Timer(PATIENCE, process.kill)
    late.start()
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    late.cancel()
    assert url, process.communicate()[1]
    service = Running(process, url, store)
    yield service
    for left in [process, *service.family]:
        with suppress(psutil.Error, ProcessLookupError):
            left.kill()
    process.communicate()


def test_it_draws_splits_is_measured_and_ends(running: Running) -> None:
    assert draw(running.url)["version"] == "cats@1"

    split = raysd("traffic", "cats", "v2=25", "--json", storage=running.store)
    assert json_of(split)["shares"] == {"2": 25.0}
    shown = raysd("traffic", "cats", storage=running.store).stdout
    assert [line.split() for line in shown.splitlines()[1:]] == [["cats@2", "25%"], ["as", "deployed", "75%"]]
    until = time.monotonic() + PATIENCE
    while shares(running) != {"cats@1": 0.75, "cats@2": 0.25}:
        assert time.monotonic() < until, f"the service did not follow: {shares(running)}"
        time.sleep(0.5)

    wanted = {name for metric in (REQUESTS, WAIT, STEP, BATCH, IMAGES) for name in metric.exported}
    until = time.monotonic() + 60
    while missing := {name for name in wanted if ("cats", "cats@1") not in running.measured().get(name, ())}:
        assert time.monotonic() < until, f"{sorted(missing)} not among {running.measured()}"
        time.sleep(1)

    running.family = psutil.Process(running.process.pid).children(recursive=True)
    assert running.family
    running.process.send_signal(signal.SIGTERM)
    said, errors = running.process.communicate(timeout=60)
    assert running.process.returncode == 0, errors
    assert "failed" not in said + errors, "ending is no failure"
    _, left = psutil.wait_procs(running.family, timeout=10)
    assert not left


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no Prometheus here: apt-get install prometheus")
def test_a_real_prometheus_has_what_the_dashboard_and_the_rules_ask_of_a_real_service(
    running: Running, tmp_path: Path
) -> None:
    """With the labels that the service's own processes give."""
    draw(running.url)
    until = time.monotonic() + PATIENCE
    while not (port := running.metrics_port()):
        assert time.monotonic() < until
        time.sleep(1)
    asked, wanted = expressions("cats", "cats@1"), {*OF_VERSION, *OF_MODEL}
    assert wanted <= set(asked)
    prometheus = Prometheus(tmp_path, f"127.0.0.1:{port}")
    try:
        until = time.monotonic() + PATIENCE
        while missing := {who for who in wanted if not prometheus.positive(asked[who])}:
            assert time.monotonic() < until, f"nothing of {sorted(missing)} among {sorted(prometheus.names())}"
            draw(running.url)
            time.sleep(1)
        for who in OF_VERSION:
            (row,) = prometheus.ask("query", query=asked[who])["result"]
            assert row["metric"] == {"version": "cats@1"}, who
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
        assert not [rule["name"] for rule in rules if rule["alerts"] and "raysd" in rule["query"]]
    finally:
        prometheus.stop()


@pytest.mark.long
def test_serve_deploy_takes_the_config_as_it_is(tmp_path: Path) -> None:
    """Ray's own command, on a cluster that runs: the address alone is another one."""
    config = yaml.safe_load(LOCAL.read_text())
    config["http_options"]["port"] = port = free_port()
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    url, places = (
        f"http://127.0.0.1:{port}",
        {"RAYSD_STORAGE": tmp_path / "store", "XDG_CACHE_HOME": tmp_path / "cache"},
    )
    with single(tmp_path, 3, **{name: str(place) for name, place in places.items()}) as dashboard:
        serve = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
        done = subprocess.run(serve, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        until = time.monotonic() + PATIENCE
        while not is_ready(url):
            assert time.monotonic() < until, httpx.get(f"{dashboard}/api/serve/applications/").text
            time.sleep(0.5)
        assert draw(url, model="tiny-sd")["version"] == "tiny-sd"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def draw(url: str, model: str = "cats") -> dict[str, Any]:
    """What the service says of one picture."""
    asked = {"model": model, "prompt": "a red circle", "num_inference_steps": 2}
    answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    drawn: dict[str, Any] = answer.json()["data"][0]
    return drawn


def shares(running: Running) -> dict[str, float]:
    """The traffic of cats as the service says it."""
    body = httpx.get(f"{running.url}/v1/models/cats", timeout=PATIENCE).json()
    return {share["version"]: share["weight"] for share in body["traffic"]}
