"""What an operator's Prometheus and Grafana read: checked by promtool, and tried on a real Prometheus that scrapes a real Ray."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raysd.serve.metrics import METRICS, Metrics
from raysd.train import track
from raysd.train.follow import TRACKED
from tests.prometheus import CONFIG, RULES, Prometheus, alerts, expressions, panels

TESTS = RULES.with_name("rules_test.yaml")
TRAINED = {"ray_raysd_train_step", "ray_raysd_train_slowest_lag"}
EXPORTED = {name for metric in METRICS for name in metric.exported} | TRAINED
OF_RAY = {"ray_node_disk_utilization_percentage"}
LABELS = {"run", "model", "version", "outcome", "le", "WorkerId", "NodeAddress"}
PATIENCE = 60


def tell_everything(metrics: Metrics) -> None:
    """All that can happen to a model called cats."""
    metrics.ended("cats", "cats@3", "succeeded", 1.5)
    metrics.ended("cats", "cats@3", "failed", 0.5)
    metrics.refused("cats", "cats@3")
    metrics.waited("cats", "cats@3", 0.25)
    metrics.stepped("cats", "cats@3", 0.02, 4)
    metrics.drawn("cats", "cats@3", 4)
    metrics.not_finite("cats", "cats@3")
    metrics.flagged("cats", "cats@3")
    metrics.in_progress("cats", 4)
    metrics.queued("cats", 2)
    metrics.ready("cats")
    metrics.loaded("cats", "cats@3", "succeeded")
    metrics.lora_loaded("cats", "cats@3", 0.5)
    metrics.told("cats", "cats@3", "up")
    metrics.told("cats", "", "choice")
    metrics.database_failed()


@pytest.mark.parametrize(
    "words",
    [("check", "rules", RULES), ("check", "config", CONFIG), ("test", "rules", TESTS)],
    ids=lambda words: " ".join(words[:2]),
)
def test_promtool_finds_nothing_wrong(words: tuple[str, str, Path]) -> None:
    if not shutil.which("promtool"):
        pytest.skip("no promtool here: apt-get install prometheus")
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_and_says_what_to_do() -> None:
    tried: dict[str, list[bool]] = {}
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for row in test["alert_rule_test"]:
            tried.setdefault(row["alertname"], []).append(bool(row["exp_alerts"]))
    assert set(tried) == {rule["alert"] for rule in alerts()}
    assert not [name for name, comes in tried.items() if not any(comes)]
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_queries_name_what_is_exported() -> None:
    for who, expression in expressions().items():
        names = set(re.findall(r"\bray_\w+", expression))
        assert names, who
        assert names <= EXPORTED | OF_RAY, who
        labels = {
            label.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")
        }
        labels |= {label for group in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)=", group)}
        assert labels <= LABELS, who


def test_the_dashboard_shows_every_metric_and_no_panel_over_another() -> None:
    shown = {name for text in expressions().values() for name in re.findall(r"\bray_\w+", text)}
    assert not [metric.name for metric in METRICS if not shown & set(metric.exported)]
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_what_happened_is_told_with_all_its_labels_and_no_other() -> None:
    told = []
    tell_everything(Metrics(lambda metric, value, labels: told.append((metric, labels))))
    assert {metric for metric, _ in told} == set(METRICS)
    for metric, labels in told:
        assert set(metric.labels) <= {"model", "version", "outcome"}
        assert tuple(labels) == metric.labels
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
    tell_everything(Metrics.off())


@pytest.fixture
def prometheus(ray_address: str, tmp_path: Path) -> Iterator[Prometheus]:
    if not shutil.which("prometheus"):
        pytest.skip("no Prometheus here: apt-get install prometheus")
    import ray

    tell_everything(Metrics.to_ray())
    tell_everything(Metrics.to_ray())  # two parts of one process share its metrics
    track.Prometheus("cats").log(1, dict.fromkeys(TRACKED, 1.0))
    node = ray.nodes()[0]
    server = Prometheus(tmp_path, f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}")
    yield server
    server.stop()


def test_a_real_prometheus_finds_the_metrics_and_rings(prometheus: Prometheus) -> None:
    end = time.monotonic() + PATIENCE
    while (missing := (EXPORTED | OF_RAY) - prometheus.names()) or not prometheus.firing():
        assert time.monotonic() < end, f"not there: {sorted(missing)}"
        time.sleep(0.25)
    assert prometheus.firing() == {"RaysdNanPictures"}
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    for who, expression in expressions().items():
        assert prometheus.ask("query", query=expression)["resultType"] == "vector", who
    (drawn,) = prometheus.ask("query", query="sum by (model, version) (ray_raysd_images_total)")["result"]
    assert drawn["metric"] == {"model": "cats", "version": "cats@3"}
    assert drawn["value"][1] == "8"
