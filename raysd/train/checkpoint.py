"""Checkpoints of a run: named fp32 tensors in safetensors, readable at any world size and ZeRO stage.

    checkpoints/<step>-<writer>/part-<rank>.safetensors     weight/<name>, state/<name>/<entry>, ema/<name>
    checkpoints/<step>-<writer>/checkpoint.json             written last: a checkpoint without it does not exist

The writer is the lease's token and the attempt's name: neither two drivers of one run nor two attempts of one driver ever
write into the same folder.
"""

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raysd.errors import IntegrityError, NotFound, RaysdError, StorageError
from raysd.registry.files import cache_folder
from raysd.storage import Storage, sha256_of
from raysd.storage.shared import shared
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

    def judged(self, loss: float) -> "Progress":
        """After a validation at this step."""
        if self.best is None or loss < self.best:
            return replace(self, last=loss, best=loss, best_step=self.step, stale=0)
        return replace(self, last=loss, stale=self.stale + 1)

    def exhausts(self, patience: int | None) -> bool:
        """Whether so many validations brought no improvement; never without a `patience`."""
        return patience is not None and self.stale >= patience


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
    there = (_read_if_there(run, path) for path in found)
    return sorted((one for one in there if one is not None), key=lambda one: (one.step, one.folder))


def _read_if_there(run: Storage, path: str) -> Checkpoint | None:
    """None for one that the run has pruned meanwhile."""
    try:
        return _read(run, path)
    except NotFound:
        return None


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
    """{name: reader} over all parts, digests checked first. Raises IntegrityError naming the part.

    Ranks on one machine share what is downloaded: a part crosses the network once a machine, not once a rank.
    """
    with ExitStack() as stack:
        readers: dict[str, Callable[[], Tensor]] = {}
        for part in checkpoint.parts:
            path = run.local_path(part["path"])
            if path is None:
                place = cache_folder() / "checkpoints" / f"{part['sha256']}.safetensors"
                path = stack.enter_context(shared(place, partial(run.download, part["path"])))
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


class Saver:
    """Writes a run's checkpoints beside its training: a part a rank on a thread of its own, then the manifest.

    `begin`, `finish` and `save` are COLLECTIVE. `fence` is called by rank 0 before a checkpoint becomes visible.
    """

    def __init__(self, run: Storage, engine: Engine, ema: Ema | None, writer: str, fence: Callable[[], None]):
        self.run, self.engine, self.ema, self.writer, self.fence = run, engine, ema, writer, fence
        self.pending: Progress | None = None
        """What a checkpoint that was begun and not finished holds."""

    def begin(self, progress: Progress) -> None:
        """Gather tensor by tensor, each rank keeping a part; from then on training may go on."""
        assert self.pending is None, "one checkpoint at a time"
        self.pending, self._scalars = progress, self.engine.scalars()
        self._folder = f"checkpoints/{progress.step:08d}-{self.writer}"
        kept, path = _collect(self.engine, self.ema), f"{self._folder}/part-{self.engine.rank:04d}.safetensors"
        self._outcome: list[Any] = []
        work = threading.Thread(
            target=lambda: self._outcome.append(_tried(self.engine.rank, lambda: _write_part(self.run, path, kept))),
            name="checkpoint",
        )
        work.start()
        self._work = work

    @property
    def written(self) -> bool:
        """Whether this rank's part is written, or has failed."""
        return self.pending is not None and not self._work.is_alive()

    def finish(self) -> Checkpoint:
        """Wait for all parts and make the checkpoint visible. Raises on every rank what went wrong on any."""
        assert self.pending is not None
        self._work.join()
        parts = _agreed(self.engine, self._outcome[0])
        progress, self.pending = self.pending, None
        checkpoint = Checkpoint(self._folder, progress, [part for part in parts if part["size"]], self._scalars)

        def show() -> None:
            if self.engine.rank == 0:
                self.fence()
                self.run.write(f"{checkpoint.folder}/{MANIFEST}", json.dumps(asdict(checkpoint)).encode())

        _agreed(self.engine, _tried(self.engine.rank, show))
        return checkpoint

    def save(self, progress: Progress) -> Checkpoint:
        """Begin and finish."""
        self.begin(progress)
        return self.finish()


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
    """Delete all but the newest `keep` checkpoints and the best one; a manifest goes before its parts.

    And what attempts that died left of checkpoints older than the newest. By the run's only writer, between two of them.
    """
    found = complete(run)
    for checkpoint in found[:-keep]:
        if checkpoint.step != best_step:
            run.delete(f"{checkpoint.folder}/{MANIFEST}")
            run.delete_tree(checkpoint.folder)
    begun = {entry.path.rpartition("/")[0] for entry in run.list("checkpoints")}
    for folder in sorted(begun - {checkpoint.folder for checkpoint in found}):
        if found and folder < found[-1].folder:
            run.delete_tree(folder)


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


def _tried(rank: int, work: Callable[[], Any]) -> tuple[Any, RaysdError | None]:
    """(what it returned, what went wrong)."""
    try:
        return work(), None
    except RaysdError as error:
        return None, error
    except Exception as error:
        return None, StorageError(f"checkpoint on rank {rank}: {type(error).__name__}: {error}")


def _agreed(engine: Engine, outcome: tuple[Any, RaysdError | None]) -> list[Any]:
    """All ranks' results; if one rank failed, all raise, so that none waits for ever."""
    outcomes = [outcome]
    if engine.world > 1:
        outcomes = [(None, None)] * engine.world
        dist.all_gather_object(outcomes, outcome)
    for _, raised in outcomes:
        if raised is not None:
            raise raised
    return [value for value, _ in outcomes]


def _read(run: Storage, path: str) -> Checkpoint:
    body = json.loads(run.read(path))
    return Checkpoint(body["folder"], Progress(**body["progress"]), body["parts"], body["scalars"])
