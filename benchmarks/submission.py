"""From a command to its first training step on a warm cluster: `raysd submit` beside the same command on that cluster.

A Ray cluster with a token is up; `raysd train` joins it by its address, and `raysd submit` goes through its dashboard: both
begin a run of the bundled base's shape in a store that all of it shares. In turns; each run is stopped at its first step.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks.options import Options
from benchmarks.results import Result, Table, Target
from tests.dashboard import Secured, secured

BOUND = 1.3
PATIENCE = 300.0


def run(options: Options) -> Result:
    turns = 1 if options.quick else 3
    seconds: dict[str, list[float]] = {"raysd train": [], "raysd submit": []}
    (options.work / "cluster").mkdir()
    with secured(options.work / "cluster", cpus=(os.cpu_count() or 1) + 1) as cluster:  # one for a job's own process
        environment = _environment(options.work, cluster)
        _first_step(environment, options.work / "store", "warm-job", None)  # waits for the cluster's node
        _first_step(environment, options.work / "store", "warm-local", cluster)
        for turn in range(turns):
            seconds["raysd train"].append(_first_step(environment, options.work / "store", f"local-{turn}", cluster))
            seconds["raysd submit"].append(_first_step(environment, options.work / "store", f"job-{turn}", None))
    typical = {name: median(found) for name, found in seconds.items()}
    return Result(
        targets=[
            Target(
                "seconds to the first step, submit / train",
                typical["raysd submit"] / typical["raysd train"],
                BOUND,
                False,
            )
        ],
        tables=[Table("To the first step", ["", "s"], [[name, round(value, 1)] for name, value in typical.items()])],
        samples=seconds,
        settings={"turns": turns},
    )


def _environment(work: Path, cluster: Secured) -> dict[str, str]:
    table = f'[test]\nurl = "{cluster.url}"\nshared_folders = ["{work}"]\n'
    (work / "clusters.toml").write_text(table)
    own = {"RAYSD_CLUSTERS": str(work / "clusters.toml"), "RAYSD_CLUSTER": "test", "RAYSD_STORAGE": str(work / "store")}
    return {**os.environ, **own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_file)}


def _first_step(environment: Mapping[str, str], store: Path, name: str, joined: Secured | None) -> float:
    """Seconds from a command to its run's first step; by submission, or as a driver of the cluster `joined`."""
    words = ["train", "lora-demo", "--name", name, "--optim.steps", "3", "--publish.model", "null"]
    values = dict(environment)
    if joined is not None:
        values["RAY_ADDRESS"] = joined.address
    command = [*([] if joined is not None else ["submit", "--follow", "--"]), *words]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from raysd.cli import main; main()", *command],
        env=values,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows = store / "runs" / name / "metrics.jsonl"
    while not (rows.exists() and '"step": 1,' in rows.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.perf_counter() - began < PATIENCE, "no first step"
        time.sleep(0.02)
    took = time.perf_counter() - began
    process.communicate(timeout=PATIENCE)
    return took
