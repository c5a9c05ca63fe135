"""Models whose scheduler's configuration says something else than their base's."""

import json
import shutil
from pathlib import Path
from typing import Any


def rescheduled(base: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a base in `folder`, with other values in its scheduler's configuration."""
    shutil.copytree(base, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", config["_class_name"]]}))
    return folder


def consistent(base: Path, folder: Path, **changes: Any) -> Path:
    """A copy that says that it is a latent consistency model."""
    return rescheduled(base, folder, _class_name="LCMScheduler", **changes)
