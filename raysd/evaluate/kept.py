"""The evaluations that a storage keeps. Imports no torch: a version is shown at once.

evaluations/<model>/<album>/<key>.json            the result; <key> stands for the spec, the data and the other model
evaluations/<model>/<album>/pictures/00000.png    see `pictures`
"""

import json
from typing import Any

from raysd.registry import Version
from raysd.storage import Storage

ROOT = "evaluations"


def of_version(version: Version, storage: Storage) -> list[dict[str, Any]]:
    """The kept evaluations of a version, oldest first: when, how many pictures, against what, and the values."""
    folder = f"{ROOT}/{version.digest[:32]}"
    paths = [entry.path for entry in storage.list(folder) if entry.path.endswith(".json")]
    return sorted((_summary(json.loads(storage.read(path))) for path in paths), key=lambda row: str(row["created"]))


def _summary(body: dict[str, Any]) -> dict[str, Any]:
    model = body["model"]
    values = {score["name"]: score["value"] for score in model["scores"]}
    if model["losses"]:
        values["validation_loss"] = model["losses"]["validation"]["value"]
    against = body["against"]["ref"] if body["against"] else None
    said = {"key": body["key"], "created": body["created"], "pictures": body["spec"]["count"], "against": against}
    return {**said, "features": body["features"], "matcher": body["matcher"], "scores": values}
