"""From a run's checkpoint to a version in the registry. Needs no GPU and no Ray; doing it twice gives the same version.

A checkpoint of another step is another version: a trial that a budget cut short may go on, and be published again.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from raysd import revision
from raysd.config import TrainingSpec
from raysd.methods import METHODS
from raysd.references import Located
from raysd.registry import Registry, Version
from raysd.storage import Storage
from raysd.train import checkpoint
from raysd.train.checkpoint import Checkpoint
from raysd.train.frozen import FrozenData
from raysd.train.runs import RunRecord, public_spec


def publish(
    record: RunRecord,
    spec: TrainingSpec,
    root: Storage,
    run: Storage,
    located: Located,
    frozen: FrozenData,
    origin: Mapping[str, object] | None = None,
) -> Version | None:
    """Publish the run's best or last weights as `publish.model`, and move the alias; None where the spec names no model.

    `origin` goes into the lineage beside what the run knows itself: who asked for it.
    """
    if spec.publish.model is None:
        return None
    chosen = chosen_checkpoint(run, spec)
    registry = Registry(root)
    with tempfile.TemporaryDirectory(prefix="raysd-") as scratch:
        out = Path(scratch)
        write_files(run, chosen, spec, located, out)
        files = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
        lineage = {**_lineage(record, chosen, located, frozen), **(origin or {})}
        version = registry.publish(spec.publish.model, files, lineage, key=f"{record.id}@{chosen.step}")
    if spec.publish.alias is not None and record.version != version.ref:  # once: it may have been moved since
        registry.alias(version, spec.publish.alias)
    return version


def chosen_checkpoint(run: Storage, spec: TrainingSpec) -> Checkpoint:
    """The checkpoint of the lowest validation loss where the run kept it, else the last."""
    newest = checkpoint.latest(run)
    assert newest is not None, "a finished run has a checkpoint"
    best = newest.progress.best_step
    if spec.validation.keeps_best and best is not None:
        return checkpoint.at_step(run, best)
    return newest


def write_files(run: Storage, chosen: Checkpoint, spec: TrainingSpec, located: Located, out: Path) -> None:
    """A version's files, from a checkpoint: the moving average's weights where the run keeps one."""
    tensors = checkpoint.weights(run, chosen, ema=spec.optim.ema is not None)
    METHODS[spec.method.kind].write(located.family, located.folder, tensors, spec, out)


def _lineage(record: RunRecord, chosen: Checkpoint, located: Located, frozen: FrozenData) -> dict[str, object]:
    """Where a version comes from, whole: enough to train it again."""
    parent = located.version
    return {
        "family": located.family.name,
        "method": record.spec["method"]["kind"],
        "base": located.ref,
        "base_digest": frozen.base_digest,
        "parent": None if parent is None else {"ref": parent.ref, "digest": parent.digest},
        "data_digest": frozen.data_digest,
        "pictures": {"train": len(frozen.train), "validation": len(frozen.validation)},
        "run": {"name": record.name, "id": record.id, "step": chosen.step},
        "spec": public_spec(record.spec),
        "metrics": {"base_validation_loss": chosen.progress.base_loss, "validation_loss": chosen.progress.last},
        "code": revision.code(),
    }
