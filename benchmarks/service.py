"""A service over HTTP with 32 clients beside a bare batched diffusers loop, and what a request costs outside its engine.

tiny-sd, fp32, 25 steps, guidance 3.5: `raysd serve` as a person starts it, Ray Serve and its proxy on the same cores as the
engine. The loop draws as many pictures in full batches. Own time: from a lone request over HTTP to its answer, less the
time in the scheduler; with Serve's hops, and without them, where the same application, router and replica are in one
process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import httpx

from benchmarks import spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target
from benchmarks.scheduler import GUIDANCE, bare_loop

CLIENTS = 32


def run(options: Options) -> Result:
    count = 32 if options.quick else 128
    bare = spawned.alone(bare_loop, count)
    took, hops = _served(options.work, count)
    own = spawned.alone(_without_serve, options.work)
    return Result(
        targets=[
            Target("32 clients: pictures/s, HTTP / bare loop", bare / took, 0.75, True),
            Target("a request's time outside the engine, without Serve, median", 1000 * median(own), 15, False, "ms"),
        ],
        tables=[
            Table(
                "Drawing 25 steps",
                ["", "pictures/s"],
                [["bare loop", round(count / bare, 2)], [f"HTTP, {CLIENTS} clients", round(count / took, 2)]],
            ),
            Table(
                "A lone request outside the engine, at the client",
                ["", "median, ms"],
                [[name, round(1000 * median(found), 1)] for name, found in (("without Serve", own), ("with it", hops))],
            ),
        ],
        samples={"bare loop": [bare], "HTTP": [took], "own time, s": own, "own time with Serve's hops, s": hops},
        settings={"pictures": count, "clients": CLIENTS, "guidance": GUIDANCE},
    )


def _served(work: Path, count: int) -> tuple[float, list[float]]:
    """Seconds for all with 32 clients; and of lone requests the seconds outside the engine."""
    port = spawned.free_port()
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
            return _at_once(client, count), _lone(client)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def _without_serve(work: Path) -> list[float]:
    """Seconds of lone requests outside the engine, where nothing of Ray Serve lies between."""
    import uvicorn

    from raysd.config.serving import ModelSpec, ServingSpec
    from raysd.database import Database
    from raysd.feedback.generations import Generations
    from raysd.serve.http.application import build
    from raysd.serve.metrics import Metrics
    from raysd.serve.queue import Queue
    from raysd.serve.replica import Replica
    from raysd.serve.router import Router
    from raysd.serve.routes import Routes
    from raysd.storage import Storage

    store, port = Storage(str(work / "without")), spawned.free_port()
    database, model = Database(None, store), ModelSpec(ref="tiny-sd", cpus=os.cpu_count() or 1)
    database.migrate()
    replica = Replica(model, store.url, None, 86400.0)
    drawing, canceling = SimpleNamespace(remote=replica.draw), SimpleNamespace(remote=replica.cancel)
    handle = SimpleNamespace(options=lambda stream: SimpleNamespace(draw=drawing), cancel=canceling)
    queue, routes, metrics = Queue(database), Routes(store, [model]), Metrics.off()
    generations = Generations(database, store)
    router = Router(queue, store, routes, {"tiny-sd": handle}, metrics, {"tiny-sd": 64}, generations)
    application = build(router, queue, database, store, ServingSpec(models=(model,)), metrics)
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        own = _lone(client)
    server.should_exit = True
    thread.join()
    return own


def _at_once(client: httpx.Client, count: int) -> float:
    """Seconds for `count` pictures with 32 clients."""
    with ThreadPoolExecutor(CLIENTS) as people:
        list(people.map(lambda seed: _draw(client, seed, 2), range(CLIENTS)))
        began = time.perf_counter()
        list(people.map(lambda seed: _draw(client, seed, 25), range(count)))
        return time.perf_counter() - began


def _lone(client: httpx.Client) -> list[float]:
    """Of requests one after the other, the seconds that were not in the engine."""
    _draw(client, 999, 4)
    answers = [_draw(client, seed, 4) for seed in range(1000, 1030)]
    newest = client.get("/v1/predictions").json()["results"][: len(answers)]
    engine = [prediction["metrics"]["draw_time"] for prediction in reversed(newest)]
    return [answer - drawing for answer, drawing in zip(answers, engine, strict=True)]


def _draw(client: httpx.Client, seed: int, steps: int) -> float:
    """Seconds of a request."""
    asked = {"model": "tiny-sd", "prompt": f"a red circle {seed}", "seed": seed}
    asked |= {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    began = time.perf_counter()
    client.post("/v1/images/generations", json=asked).raise_for_status()
    return time.perf_counter() - began
