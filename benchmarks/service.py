"""A service over HTTP with 32 clients beside a bare batched diffusers loop, and what a request costs outside its engine.

tiny-sd, fp32, 25 steps, guidance 3.5: `raysd serve` as a person starts it, Ray Serve and its proxy on the same cores as the
engine. The loop draws as many pictures in full batches. Own time: from a request to its
answer, less the time in the scheduler.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx

from benchmarks import spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target
from benchmarks.scheduler import GUIDANCE, bare_loop

CLIENTS = 32


def run(options: Options) -> Result:
    count = 32 if options.quick else 128
    bare = spawned.alone(bare_loop, count)
    took, alone = _served(options.work, count)
    own = [answer - engine for answer, engine in alone]
    return Result(
        targets=[
            Target("32 clients: pictures/s, HTTP / bare loop", bare / took, 0.75, True),
            Target("a request's time outside the engine, median", 1000 * median(own), 15, False, "ms"),
        ],
        tables=[
            Table(
                "Drawing 25 steps",
                ["", "pictures/s"],
                [["bare loop", round(count / bare, 2)], [f"HTTP, {CLIENTS} clients", round(count / took, 2)]],
            )
        ],
        samples={"bare loop": [bare], "HTTP": [took], "own time, s": own},
        settings={"pictures": count, "clients": CLIENTS, "guidance": GUIDANCE},
        notes=["The time outside the engine is taken at the client here, so Serve's hops and the network are in it."],
    )


def _served(work: Path, count: int) -> tuple[float, list[tuple[float, float]]]:
    """Seconds for all with 32 clients; and of lone requests the seconds to the answer and those in the engine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = os.cpu_count() or 1
    environment = {**os.environ, "RAYSD_STORAGE": str(work / "store"), "RAY_AUTH_MODE": "disabled"}
    config = work / "serve.yaml"
    config.write_text(
        f"applications: [{{name: raysd, import_path: 'raysd.serve.app:build', args: {{models: [{{ref: tiny-sd, "
        f"cpus: {cores}, rows: 32}}]}}}}]\n"
    )
    command = [sys.executable, "-c", "from raysd.cli import main; main()", "serve", str(config), "--port", str(port)]
    with (work / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http"), (work / "log").read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            return _measured(client, count)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def _measured(client: httpx.Client, count: int) -> tuple[float, list[tuple[float, float]]]:
    def draw(seed: int, steps: int = 25) -> float:
        asked = {"model": "tiny-sd", "prompt": f"a red circle {seed}", "seed": seed}
        asked |= {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
        began = time.perf_counter()
        answer = client.post("/v1/images/generations", json=asked)
        answer.raise_for_status()
        return time.perf_counter() - began

    with ThreadPoolExecutor(CLIENTS) as people:
        list(people.map(lambda seed: draw(seed, 2), range(CLIENTS)))
        began = time.perf_counter()
        list(people.map(draw, range(count)))
        took = time.perf_counter() - began
    lone = [draw(seed, 4) for seed in range(1000, 1030)]
    engine = [
        prediction["metrics"]["predict_time"]
        for prediction in client.get("/v1/predictions").json()["results"][: len(lone)]
    ]
    return took, list(zip(lone, reversed(engine), strict=False))
