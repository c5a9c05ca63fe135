"""Checkpoints of a run: named fp32 tensors in safetensors, readable at any world size and ZeRO stage.

    checkpoints/<step>-<token>/part-<rank>.safetensors     weight/<name>, state/<name>/<entry>, ema/<name>
    checkpoints/<step>-<token>/checkpoint.json             written last: a checkpoint without it does not exist

The token is the lease's: two drivers of one run never write into the same folder.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raysd.errors import IntegrityError, NotFound, RaysdError, StorageError
from raysd.storage import Storage, sha256_of
from raysd.train.ema import Ema
from raysd.train.engine import Engine

MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """What a run knows about itself besides tensors."""

    step: int = 0
    best: float | None = None  # lowest validation loss so far
    best_step: int | None = None
    stale: int = 0  # validations since the best one
    last: float | None = None  # newest validation loss
    base_loss: float | None = None  # validation loss before the first step


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `parts`: [{path, sha256, size}]; `scalars`: the engine's."""

    folder: str
    progress: Progress
    parts: list[dict[str, Any]]
    scalars: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.progress.step


def complete(run: Storage) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = [entry.path for entry in run.list("checkpoints") if entry.path.endswith(MANIFEST)]
    return sorted((_read(run, path) for path in found), key=lambda checkpoint: (checkpoint.step, checkpoint.folder))


def latest(run: Storage) -> Checkpoint | None:
    return next(reversed(complete(run)), None)


def at_step(run: Storage, step: int) -> Checkpoint:
    """The newest complete checkpoint of that step. Raises NotFound."""
    matches = [checkpoint for checkpoint in complete(run) if checkpoint.step == step]
    if not matches:
        raise NotFound(f"{run.url}: no complete checkpoint of step {step}")
    return matches[-1]


@contextmanager
def tensors(run: Storage, checkpoint: Checkpoint) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """{name: reader} over all parts, digests checked first. Raises IntegrityError naming the part."""
    with tempfile.TemporaryDirectory(prefix="raysd-") as scratch:
        readers: dict[str, Callable[[], Tensor]] = {}
        for number, part in enumerate(checkpoint.parts):
            path = run.local_path(part["path"])
            if path is None:
                path = Path(scratch) / f"{number}.safetensors"
                run.download(part["path"], path)
            if path.stat().st_size != part["size"] or sha256_of(path) != part["sha256"]:
                raise IntegrityError(
                    f"{run.url}/{part['path']}: not the bytes that were written; delete this checkpoint"
                )
            file = safe_open(path, "pt")
            readers.update({name: lambda file=file, name=name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        yield readers


def weights(run: Storage, checkpoint: Checkpoint, ema: bool) -> dict[str, Tensor]:
    """Trained tensors by name: the moving average where the run keeps one and `ema` is asked, else the last weights."""
    prefix = "ema/" if ema else "weight/"
    with tensors(run, checkpoint) as readers:
        return {name.removeprefix(prefix): read().clone() for name, read in readers.items() if name.startswith(prefix)}


def save(
    run: Storage, engine: Engine, ema: Ema | None, progress: Progress, token: int, fence: Callable[[], None]
) -> Checkpoint:
    """Write a checkpoint. COLLECTIVE: every rank calls it; gathers tensor by tensor, each rank keeps and writes a part.

    `fence` is called by rank 0 before the checkpoint becomes visible. Raises on every rank what went wrong on any.
    """
    folder = f"checkpoints/{progress.step:08d}-{token:04d}"
    kept = _collect(engine, ema)
    part = _everywhere(engine, lambda: _write_part(run, f"{folder}/part-{engine.rank:04d}.safetensors", kept))
    parts = [entry for entry in part if entry["size"]]
    checkpoint = Checkpoint(folder, progress, parts, engine.scalars())

    def finish() -> None:
        if engine.rank == 0:
            fence()
            run.write(f"{folder}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())

    _everywhere(engine, finish)
    return checkpoint


def load_state(run: Storage, checkpoint: Checkpoint, engine: Engine, ema: Ema | None) -> None:
    """Give a fresh engine the optimiser's state and the moving average. The weights went into its module before."""
    with tensors(run, checkpoint) as readers:
        states: dict[str, dict[str, Tensor]] = {name: {} for name in engine.trainable_names()}
        for name, read in readers.items():
            if name.startswith("state/"):
                parameter, entry = name.removeprefix("state/").rsplit("/", 1)
                states[parameter][entry] = read()
        engine.load_optimizer_state(states, checkpoint.step)
        engine.load_scalars(checkpoint.scalars)
        if ema is not None:
            ema.load({name.removeprefix("ema/"): read() for name, read in readers.items() if name.startswith("ema/")})


def prune(run: Storage, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; a manifest goes before its parts."""
    for checkpoint in complete(run)[:-keep]:
        if checkpoint.step != best_step:
            run.delete(f"{checkpoint.folder}/{MANIFEST}")
            run.delete_tree(checkpoint.folder)


def _collect(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """This rank's share of all tensors, on the CPU. All ranks gather every tensor in the same order."""
    kept: dict[str, Tensor] = {}
    for number, name in enumerate(engine.trainable_names()):
        gathered = {f"weight/{name}": engine.full_weight(name)}
        gathered.update({f"state/{name}/{entry}": value for entry, value in engine.optimizer_state(name).items()})
        if ema is not None:
            gathered[f"ema/{name}"] = ema.full(name)
        if number % engine.world == engine.rank:
            kept.update({key: value.detach().to("cpu", copy=True).contiguous() for key, value in gathered.items()})
    return kept


def _write_part(run: Storage, path: str, kept: dict[str, Tensor]) -> dict[str, Any]:
    if not kept:
        return {"path": path, "sha256": "", "size": 0}
    with tempfile.TemporaryDirectory(prefix="raysd-") as scratch:
        local = Path(scratch) / "part.safetensors"
        try:
            save_file(kept, local)
        except Exception as error:
            raise StorageError(
                f"{local.parent}: writing a checkpoint failed: {error}; free space or set TMPDIR"
            ) from None
        run.upload(local, path)
        return {"path": path, "sha256": sha256_of(local), "size": local.stat().st_size}


def _everywhere(engine: Engine, work: Callable[[], Any]) -> list[Any]:
    """Do `work` on every rank and return all results; if one rank fails, all raise, so that none waits for ever."""
    result: Any = None
    problem: RaysdError | None = None
    try:
        result = work()
    except RaysdError as error:
        problem = error
    except Exception as error:
        problem = StorageError(f"checkpoint on rank {engine.rank}: {type(error).__name__}: {error}")
    if engine.world == 1:
        outcomes = [(result, problem)]
    else:
        outcomes = [(None, None)] * engine.world
        dist.all_gather_object(outcomes, (result, problem))
    for _, raised in outcomes:
        if raised is not None:
            raise raised
    return [value for value, _ in outcomes]


def _read(run: Storage, path: str) -> Checkpoint:
    body = json.loads(run.read(path))
    return Checkpoint(body["folder"], Progress(**body["progress"]), body["parts"], body["scalars"])
