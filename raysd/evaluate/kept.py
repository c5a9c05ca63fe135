"""The evaluations that a storage keeps. Imports no torch: a version is shown at once.

evaluations/<model>/<album>/<key>.json            the result; <key> stands for the spec, the data and the other model
evaluations/<model>/<album>/pictures/00000.png    see `pictures`
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from raysd.registry import Registry, Version
from raysd.storage import Storage

ROOT = "evaluations"


def of_version(version: Version, storage: Storage) -> list[dict[str, Any]]:
    """The kept evaluations of a version, oldest first: when, how many pictures, against what, and the values."""
    folder = f"{ROOT}/{version.digest[:32]}"
    paths = [entry.path for entry in storage.list(folder) if entry.path.endswith(".json")]
    return sorted((_summary(json.loads(storage.read(path))) for path in paths), key=lambda row: str(row["created"]))


class Kept(NamedTuple):
    """Pictures that a version drew, and their folder in the storage."""

    ref: str
    album: str


def other_versions(shown: Iterable[Kept], storage: Storage, most: int = 4) -> list[Kept]:
    """The newest other versions of the first one's model that drew the same prompts with the same seeds, oldest first."""
    shown = list(shown)
    model, _, number = shown[0].ref.partition("@")
    if not number:
        return []
    registry, name = Registry(storage), shown[0].album.rpartition("/")[2]
    numbers = next((one.versions for one in registry.models() if one.name == model), [])
    refs = [f"{model}@{number}" for number in sorted(numbers) if f"{model}@{number}" not in {one.ref for one in shown}]
    versions = [registry.resolve(ref, withdrawn_ok=True) for ref in refs]
    found = [Kept(version.ref, f"{ROOT}/{version.digest[:32]}/{name}") for version in versions]
    return [one for one in found if storage.exists(f"{one.album}/pictures/00000.png")][-most:]


def _summary(body: dict[str, Any]) -> dict[str, Any]:
    model = body["model"]
    values = {score["name"]: score["value"] for score in model["scores"]}
    if model["losses"]:
        values["validation_loss"] = model["losses"]["validation"]["value"]
    against = body["against"]["ref"] if body["against"] else None
    said = {"key": body["key"], "created": body["created"], "pictures": body["spec"]["count"], "against": against}
    return {**said, "features": body["features"], "matcher": body["matcher"], "scores": values}
