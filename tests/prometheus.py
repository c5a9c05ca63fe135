"""A real Prometheus with the rules of serve/, and what the rules and the dashboard ask of it."""

import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests.ports import free_port

SERVE = Path(__file__).parents[1] / "serve"
RULES = SERVE / "prometheus" / "rules.yaml"
CONFIG, DASHBOARD = SERVE / "prometheus" / "prometheus.yaml", SERVE / "grafana" / "dashboard.json"


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return list(json.loads(DASHBOARD.read_text())["panels"])


def expressions(model: str = ".*", version: str = ".*") -> dict[str, str]:
    """Every query by who asks it, Grafana's variables replaced."""
    asked = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel.get("targets", []):
            asked[f"{panel['title']} {target['refId']}"] = target["expr"]
    values = {"$__rate_interval": "1m", "$__range": "3h", "$model": model, "$version": version}
    for name, value in values.items():
        asked = {who: expression.replace(name, value) for who, expression in asked.items()}
    return asked


class Prometheus:
    """A server with the rules of serve/ and one node of a Ray cluster to scrape."""

    def __init__(self, folder: Path, target: str):
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES)]
        config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(folder / "nodes.json")]
        (folder / "nodes.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [target]}]))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        where = ["--config.file", folder / "prometheus.yaml", "--storage.tsdb.path", folder / "tsdb"]
        words = ["prometheus", *where, "--web.listen-address", self.url.removeprefix("http://")]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)

    def ask(self, path: str, **values: str) -> Any:
        """What the API answers; fails for a query that it refuses."""
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(values)}", timeout=10) as answer:
            body = json.load(answer)
        assert body["status"] == "success"
        return body["data"]

    def positive(self, expression: str) -> bool:
        """Whether a query has an answer that is more than nothing."""
        try:
            return any(float(row["value"][1]) > 0 for row in self.ask("query", query=expression)["result"])
        except OSError:
            assert self.process.poll() is None, "prometheus ended"
            return False

    def names(self) -> set[str]:
        try:
            return set(self.ask("label/__name__/values"))
        except OSError:
            assert self.process.poll() is None, "prometheus ended"
            return set()

    def firing(self) -> set[str]:
        rows = self.ask("query", query='ALERTS{alertstate="firing"}')["result"]
        return {row["metric"]["alertname"] for row in rows}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
