"""The pictures of an evaluation: drawn once, by Ray workers or this process, kept in the storage, drawn on where they lack.

    evaluations/<model>/<album>/pictures/00000.png …

<model> is the version's digest, or that of the model's files; <album> stands for prompts, seed, steps and guidance.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from raysd.config.evaluation import EvaluationSpec
from raysd.draw import Request, draw_batch, open_pipeline, png
from raysd.evaluate.kept import ROOT
from raysd.evaluate.prompts import Prompt
from raysd.references import Located, identity, locate
from raysd.seeding import seed_of
from raysd.storage import Storage

CPUS_A_WORKER = 4
"""More threads draw a batch little faster."""
READ_AHEAD = 64
Progress = Callable[[int, int], None]
Chunk = list[tuple[str, Request]]
"""Path in the storage and what to draw there."""


def model_digest(located: Located) -> str:
    """What stands for the model in paths: 32 hexadecimal digits."""
    return (located.version.digest if located.version else identity(located.folder))[:32]


class Album:
    """Pictures of one model: picture n shows prompt n modulo their number, with a seed that depends on both alone.

    A longer evaluation of the same prompts goes on where a shorter one ended.
    """

    def __init__(self, located: Located, prompts: Sequence[Prompt], spec: EvaluationSpec, storage: Storage):
        self.located, self.prompts, self.storage = located, tuple(prompts), storage
        self.requests = [_request(self.prompts, spec, n) for n in range(spec.count)]
        settings = [[[p.text, p.negative] for p in self.prompts], spec.seed, spec.steps, spec.guidance]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.folder = f"{ROOT}/{model_digest(located)}/{digest[:32]}"

    def prompt_of(self, number: int) -> int:
        """Which prompt picture `number` shows."""
        return number % len(self.prompts)

    def path(self, number: int) -> str:
        return f"{self.folder}/pictures/{number:05}.png"

    def missing(self) -> list[int]:
        """Pictures that are not there yet."""
        there = {entry.path for entry in self.storage.list(f"{self.folder}/pictures")}
        return [number for number in range(len(self.requests)) if self.path(number) not in there]

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Pictures that were drawn. Raises NotFound."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda n: _decoded(self.storage.read(self.path(n))), numbers))

    def pictures(self) -> Iterator[Image.Image]:
        """All of them in order, a few in memory at once."""
        total = len(self.requests)
        for first in range(0, total, READ_AHEAD):
            yield from self.read(range(first, min(first + READ_AHEAD, total)))


def draw_album(album: Album, spec: EvaluationSpec, progress: Progress) -> int:
    """Draw what is missing. Returns how many pictures that were. Raises RaysdError where the workers die."""
    absent = album.missing()
    rows = [(album.path(number), album.requests[number]) for number in absent]
    chunks = [rows[first : first + spec.batch] for first in range(0, len(rows), spec.batch)]
    total = len(album.requests)
    done = total - len(absent)
    progress(done, total)
    if chunks:
        draw = _on_ray if takes_ray(spec.workers) else _here
        for drawn in draw(chunks, album, spec):
            done += drawn
            progress(done, total)
    return len(absent)


class Painter:
    """One pipeline in one process, which draws chunk after chunk."""

    def __init__(self, root: str, ref: str, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.storage = Storage(root)
        self.located = locate(ref, self.storage)
        self.pipeline = open_pipeline(self.located)

    def draw(self, chunk: Chunk) -> int:
        """Draw and write; a chunk that is drawn again gives the same files."""
        images = draw_batch(self.pipeline, [request for _, request in chunk])
        for (path, request), image in zip(chunk, images, strict=True):
            self.storage.write(path, png(image, self.located, request))
        return len(chunk)


class Crew(NamedTuple):
    """How many workers draw, and what each gets."""

    workers: int
    cpus: int
    gpus: int


def crew(nodes: Sequence[dict[str, float]], chunks: int, workers: int | None) -> Crew:
    """One worker a GPU; on CPUs alone one for every 4 of a node, or as many as asked for. Each fits on some node."""
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return Crew(min(chunks, workers or gpus, gpus), 1, 1)
    counts = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    each = max(1, sum(counts) // workers) if workers else CPUS_A_WORKER
    each = min(each, min(counts))
    most = sum(count // each for count in counts)
    return Crew(min(chunks, workers or most, most), each, 0)


def takes_ray(workers: int | None) -> bool:
    """Whether others draw. Where one would be all that this machine has room for, it would only cost Ray's start."""
    import ray

    if workers is not None or ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        return workers != 0
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return crew([here], chunks=2, workers=None).workers > 1


def _here(chunks: Sequence[Chunk], album: Album, spec: EvaluationSpec) -> Iterator[int]:
    painter = Painter(album.storage.url, _portable(album.located))
    for chunk in chunks:
        yield painter.draw(chunk)


def _on_ray(chunks: Sequence[Chunk], album: Album, spec: EvaluationSpec) -> Iterator[int]:
    """Two chunks a worker are on their way, so that none waits; a worker that dies is started again."""
    import ray

    from raysd import cluster

    cluster.join(spec.workers or 1)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    chosen = crew(nodes, len(chunks), spec.workers)
    actor = ray.remote(num_cpus=chosen.cpus, num_gpus=chosen.gpus, max_restarts=2, max_task_retries=2)(Painter)
    arguments = (album.storage.url, _portable(album.located), chosen.cpus)
    painters = [actor.remote(*arguments) for _ in range(chosen.workers)]
    waiting = list(reversed(chunks))
    running: dict[Any, Any] = {}

    def start(painter: Any) -> None:
        if waiting:
            running[painter.draw.remote(waiting.pop())] = painter

    try:
        for painter in [*painters, *painters]:
            start(painter)
        while running:
            [first], _ = ray.wait(list(running), num_returns=1)
            painter = running.pop(first)
            start(painter)
            yield cluster.result(first, "drawing")
    finally:
        for painter in painters:
            ray.kill(painter)


def _request(prompts: Sequence[Prompt], spec: EvaluationSpec, number: int) -> Request:
    prompt = prompts[number % len(prompts)]
    again = number // len(prompts)
    seed = seed_of(spec.seed, "evaluation", prompt.text, prompt.negative or "", again)
    return Request(prompt.text, prompt.negative, seed, spec.steps, spec.guidance)


def _portable(located: Located) -> str:
    """A reference that means the same files in another process, whatever an alias does meanwhile."""
    if located.version is not None:
        return located.version.ref
    return str(located.folder) if Path(located.ref).expanduser().exists() else located.ref


def _decoded(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")
