"""What is asked for, before anything is written: what is refused, which run it goes on with, what the data are."""

import os
from typing import Any

from raysd import cluster
from raysd.config import TrainingSpec
from raysd.config.training import ScaleSpec
from raysd.data.dataset import prepare
from raysd.data.source import public
from raysd.errors import NotFound, RequestError
from raysd.methods import METHODS
from raysd.plan.fit import check_dry
from raysd.references import Located, locate
from raysd.storage import Storage
from raysd.train import runs
from raysd.train.follow import Watch, tell
from raysd.train.frozen import FrozenData, cut_captions, freeze, total_steps
from raysd.train.runs import RunRecord
from raysd.train.track import require_trackers

CHANGEABLE = (
    *("workers", "zero_stage", "offload", "gradient_checkpointing", "gpus", "cpus", "accelerator", "placement"),
    *("hang_minutes", "restarts"),
)
"""Of `scale`: what may change between two attempts of one run."""


def preview(spec: TrainingSpec, name: str, root: Storage, watch: Watch) -> dict[str, Any]:
    """What a run would do, everything checked and nothing trained."""
    runs.storage_of(root, name)
    check_devices(spec)
    located = locate(spec.base, root)
    frozen = frozen_for(spec, root, located, watch)
    tell(watch, check_dry(spec, located.folder))
    return {
        "base": located.ref,
        "pictures": {"train": len(frozen.train), "validation": len(frozen.validation)},
        "steps": total_steps(spec, len(frozen.train)),
        "spec": runs.public_spec(spec.model_dump(mode="json")),
    }


def existing_run(root: Storage, name: str, spec: TrainingSpec) -> RunRecord | None:
    """The run of that name, if there is one and it learns the same: on how many workers, and where, may change.

    One of another spec that did no step is none: its request was wrong, or it was stopped before.
    """
    try:
        record = runs.read(root, name)
    except NotFound:
        return None
    if _learnt(record.training_spec()) != _learnt(spec):
        if record.checkpoint is None and not runs.metrics(runs.storage_of(root, name)):
            return None
        asked = RunRecord(name, spec.model_dump(mode="json"))
        changed = ", ".join(path for path, _, _ in runs.differences(record, asked) if not path.startswith("result."))
        raise RequestError(
            f"run {name} exists with other settings ({changed[:120]})\n"
            f"choose another --name, or go on with it as it is: raysd runs resume {name}\n"
            f"or remove it: raysd runs delete {name}"
        )
    return record


def _learnt(spec: TrainingSpec) -> TrainingSpec:
    """Without what changes how a run is computed and not what comes out, but for rounding."""
    plain = {name: field.default for name, field in ScaleSpec.model_fields.items() if name in CHANGEABLE}
    return spec.model_copy(update={"scale": spec.scale.model_copy(update=plain)})


def frozen_for(spec: TrainingSpec, root: Storage, located: Located, watch: Watch) -> FrozenData:
    """Check the data and the base; nothing is written. Raises RequestError."""
    _refuse_unfit(spec, located)
    watch({"kind": "phase", "text": f"checking {public(spec.data.source)}"})

    def count(done: int, of: int) -> None:
        watch({"kind": "count", "text": "check pictures", "done": done, "of": of})

    dataset = prepare(spec.data, root, count)
    watch({"kind": "data", "report": dataset.report})
    tell(watch, cut_captions(dataset, located))
    return freeze(dataset, located, spec)


def check_devices(spec: TrainingSpec) -> None:
    """What only the cluster can tell: RAY_ADDRESS's, which is joined, else that of this machine. Raises RequestError."""
    if os.environ.get("RAY_ADDRESS"):
        cluster.join(spec.scale.most_workers)
    if cluster.allot(spec.scale).gpus == 0 and spec.scale.precision == "fp16":
        raise RequestError("scale.precision fp16 needs a GPU: use bf16 or fp32")


def _refuse_unfit(spec: TrainingSpec, located: Located) -> None:
    """What only the base and the packages installed can tell. Raises RequestError."""
    require_trackers(spec)
    if located.lora is not None:
        raise RequestError(
            f"base {spec.base}: holds an adapter, not a whole model; train from its base, or a full version"
        )
    METHODS[spec.method.kind].check(located.family, located.folder, spec)
