"""From a spec to the examples of a run: open, check, split by content, weigh."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raysd.config.data import DataSpec
from raysd.data.balance import weights
from raysd.data.check import Examination, Picture, Progress, Report, examine
from raysd.data.source import open_source
from raysd.storage import Storage

SPLITTABLE = 5
"""From so many different pictures on, validation gets one at least."""


@dataclass(frozen=True)
class Example:
    """One picture of a data set."""

    id: str
    """sha256 of the file's bytes."""
    path: str
    """Absolute local path, or a URL that fsspec reads from any node: for `read_picture`."""
    name: str
    caption: str
    """Final: template or prompt applied."""
    width: int
    height: int
    """Upright, in pixels."""
    weight: float = 1.0
    """How often it is drawn in training, 1 on average; 1 in validation."""


@dataclass(frozen=True)
class Dataset:
    """What a run trains on and validates with, in an order that depends on content alone."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    report: Report
    digest: str
    """sha256 over ids, captions, weights and split: two data sets with the same digest train the same."""


def prepare(spec: DataSpec, storage: Storage, progress: Progress | None = None) -> Dataset:
    """Open, check, split and weigh. Archives are unpacked under `storage`/uploads.

    Raises DataError in three lines at most where the pictures cannot be used, StorageError where the store fails.
    """
    examination = examine(open_source(spec.source, storage.child("uploads")), spec, progress)
    examination.report.raise_if_refused()
    return assemble(examination, spec)


def assemble(examination: Examination, spec: DataSpec) -> Dataset:
    """Split and weigh pictures that were checked."""
    kept, apart = split(examination.pictures, spec.validation)
    validation = tuple(_example(picture) for picture in apart)
    train = tuple(_example(picture) for picture in kept)
    if spec.balance != "none":
        keys = [p.caption if spec.balance == "caption" else p.entry.folder for p in kept]
        train = tuple(replace(example, weight=w) for example, w in zip(train, weights(keys), strict=True))
    warnings = examination.report.warnings
    if spec.validation and not validation:
        warnings += (f"no validation set: it needs {SPLITTABLE} different pictures, or data.validation = 0",)
    said = {"train": len(train), "validation": len(validation), "warnings": warnings}
    return Dataset(train, validation, examination.report.model_copy(update=said), _digest(train, validation))


def split(pictures: Sequence[Picture], share: float) -> tuple[list[Picture], list[Picture]]:
    """(train, validation), each ordered by content. Groups of duplicates stay together.

    Groups are taken in the order of the hash of their key until `share` of the pictures is reached, so the split
    depends neither on names nor on order, and moves little when pictures are added.
    """
    groups: dict[str, list[Picture]] = {}
    for picture in sorted(pictures, key=lambda p: (p.facts.id, p.caption, p.entry.name)):
        groups.setdefault(picture.group, []).append(picture)
    ordered = sorted(groups, key=_place)
    chosen: set[str] = set()
    if share > 0 and len(groups) >= SPLITTABLE:
        chosen = _choose([(key, len(groups[key])) for key in ordered], max(1, round(share * len(pictures))))
    train = [picture for key in ordered if key not in chosen for picture in groups[key]]
    return train, [picture for key in ordered if key in chosen for picture in groups[key]]


def _choose(sizes: Sequence[tuple[str, int]], wanted: int) -> set[str]:
    """Groups that fit into `wanted` pictures, first come first served; the smallest if none fits. Never all of them."""
    chosen: set[str] = set()
    taken = 0
    for key, size in sizes:
        if taken + size <= wanted and len(chosen) < len(sizes) - 1:
            chosen.add(key)
            taken += size
    return chosen or {min(sizes, key=lambda item: item[1])[0]}


def _place(key: str) -> str:
    """Not the key itself: it is the hash of bytes that somebody chose, and others order by it too."""
    return hashlib.sha256(f"validation {key}".encode()).hexdigest()


def _example(picture: Picture) -> Example:
    entry, facts = picture.entry, picture.facts
    return Example(facts.id, entry.path, entry.name, picture.caption, facts.width, facts.height)


def _digest(train: Sequence[Example], validation: Sequence[Example]) -> str:
    rows = [[[e.id, e.caption, round(e.weight, 9)] for e in part] for part in (train, validation)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
