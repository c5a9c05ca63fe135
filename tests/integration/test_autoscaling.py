"""Searches on a cluster that grows: waiting trials bring nodes up, and their end lets them go."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.base import toml
from tests.cluster import json_of, raysd
from tests.growing import IDLE_SECONDS, growing
from tests.integration.test_tune import search_file

pytestmark = pytest.mark.timeout(900)
ALIVE = """
import ray, sys
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("alive", sum(node["Alive"] for node in ray.nodes()))
"""


def nodes(address):
    """How many are alive, as a process of its own sees it: this one may be connected to another cluster."""
    done = subprocess.run([sys.executable, "-c", ALIVE, address], capture_output=True, text=True, check=True)
    found = re.findall(r"^alive (\d+)$", done.stdout, re.MULTILINE)  # the autoscaler prints there too
    return int(found[0])


@pytest.mark.long
@pytest.mark.measured
def test_waiting_trials_bring_nodes_up_and_their_end_lets_them_go(tiny_base, tiny_pictures, tmp_path, found):
    # Long enough that one trial does not end before the other one's node is up.
    changes = {"data__validation": 0.3, "scale__cpus": 1, "checkpoint__every": 40, "optim__steps": 80}
    recipe = toml(tmp_path, tiny_base, tiny_pictures, **changes)
    space = {"optim.lr": {"kind": "choice", "values": [1e-4, 1e-3]}}
    file = search_file(tmp_path, recipe, space, searcher={"kind": "grid"}, budget={})
    with growing(tmp_path, most=2) as address:
        assert nodes(address) == 1
        grows = {"address": address, "RAYSD_CLUSTER_RESOURCES": "CPU=2"}
        done = raysd("tune", str(file), "--name", "grow", "--json", storage=tmp_path / "store", **grows)
        body = json_of(done)
        last = max(trial["started"] + trial["seconds"] for trial in body["trials"])
        found["nodes gone and the command over, s after the last trial"] = round(time.time() - last, 1)
        found["idle timeout, s"] = IDLE_SECONDS
        assert [trial["status"] for trial in body["trials"]] == ["finished", "finished"]
        counts = [count for _, count in body["nodes"]]
        assert counts[0] == 1
        assert max(counts) == 3
        assert counts[-1] == 1, "the timeline ends before the nodes have gone"
        end = time.monotonic() + 20 * IDLE_SECONDS
        while nodes(address) > 1:
            assert time.monotonic() < end, "the nodes stay"
        greedy = raysd("tune", str(file), "--scale.workers", "3", storage=tmp_path / "other", **grows)
        assert greedy.returncode == 2
        assert "this cluster has 2 CPUs at most" in greedy.stderr
    page = tmp_path / "page.html"
    assert raysd("tune", "report", "grow", "--html", str(page), storage=tmp_path / "store").returncode == 0
    assert "Nodes of the cluster" in page.read_text()
    assert json.loads((tmp_path / "store/searches/grow/search.json").read_text())["nodes"] == body["nodes"]
