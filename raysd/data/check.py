"""Look at every picture once, act on what is wrong, and say so: nothing is left out, kept or changed in silence."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import Any

import numpy as np

from raysd.config.data import DataSpec
from raysd.data.balance import balances, caption_of, is_template
from raysd.data.compare import OUTLIER, diversity, near_groups, outlier_scores
from raysd.data.facts import Facts, measure
from raysd.data.findings import Duplicates, Finding, Report, refusals, warnings
from raysd.data.place import locate
from raysd.data.source import Entry, Source
from raysd.errors import DataError

__all__ = ["Examination", "Picture", "Report", "check", "examine"]

BLURRY = 0.6
"""From this value of `facts.blur` on a picture is blurry: a Gaussian of about 1% of the shorter side."""
COMPARED = 100
"""Diversity is that of at most so many pictures, chosen by content: as a share it would fall with their number."""
EXAMPLES = 24
REMOTE_READERS = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """A readable picture: where it is, what was measured, the key of its group of duplicates, its final caption."""

    entry: Entry
    facts: Facts
    group: str
    """Smallest sha256 in the group: the same whatever the files are called."""
    caption: str
    """"" if it has none."""


@dataclass(frozen=True)
class Examination:
    """A report, and the pictures that are used in the order of their names."""

    report: Report
    pictures: list[Picture]


def check(source: Source, spec: DataSpec, progress: Progress | None = None) -> Report:
    """Read every picture once and report; `Report.refusals` says whether and why they may not be used.

    `progress` is called with (done, total). Raises StorageError where the store fails, never for a bad picture.
    """
    return examine(source, spec, progress).report


def examine(source: Source, spec: DataSpec, progress: Progress | None = None) -> Examination:
    """What `check` does, with the pictures. Memory: about 3 KB a picture, and one decoded picture a thread."""
    readable, unreadable = _measure(source.entries, progress)
    pictures, groups = _grouped(readable, spec)
    copies = [part for group in groups for part in _parts(group) if len(part) > 1]
    dropped = {p.entry.name for part in copies for p in part[1:]} if spec.duplicates == "drop" else set()
    blurry, odd = _suspects([p for p in pictures if p.entry.name not in dropped], groups)
    dropped |= {finding.name for finding in blurry} if spec.blurry == "drop" else set()
    dropped |= {finding.name for finding in odd} if spec.outliers == "drop" else set()
    used = [picture for picture in pictures if picture.entry.name not in dropped]
    report = Report(
        origin=source.origin,
        found=len(source.entries),
        used=len(used),
        unreadable=unreadable,
        duplicates=tuple(_duplicates(part) for part in copies),
        blurry=blurry,
        outliers=odd,
        dropped=tuple(sorted(dropped)),
        **_about_used(used, spec),
    )
    said = {"warnings": (*source.notes, *warnings(report, spec)), "refusals": tuple(refusals(report, spec))}
    return Examination(report.model_copy(update=said), used)


def _measure(
    entries: Sequence[Entry], progress: Progress | None
) -> tuple[list[tuple[Entry, Facts]], tuple[Finding, ...]]:
    """Facts of the pictures that can be read, and the others with the reason. Several at a time, in order."""
    if not entries:
        return [], ()
    store, remote = locate(entries[0].path)[0], "://" in entries[0].path
    readable, unreadable = [], []
    with ThreadPoolExecutor(REMOTE_READERS if remote else cpu_count() or 1) as pool:
        results = pool.map(lambda entry: _try(entry, store), entries)
        for done, (entry, result) in enumerate(zip(entries, results, strict=True), start=1):
            if isinstance(result, Facts):
                readable.append((entry, result))
            else:
                unreadable.append(Finding(name=entry.name, what=result))
            if progress is not None:
                progress(done, len(entries))
    return readable, tuple(unreadable)


def _try(entry: Entry, store: Any) -> Facts | str:
    try:
        return measure(entry.path, store)
    except DataError as error:
        return str(error)


def _grouped(readable: Sequence[tuple[Entry, Facts]], spec: DataSpec) -> tuple[list[Picture], list[list[Picture]]]:
    """Pictures by name, and in groups of duplicates, in each the one to keep first: captioned, sharp, large."""
    labels = near_groups([facts for _, facts in readable])
    keys: dict[int, str] = {}
    for label, (_, facts) in zip(labels, readable, strict=True):
        keys[label] = min(keys.get(label, facts.id), facts.id)
    pictures, groups = [], dict[str, list[Picture]]()
    for label, (entry, facts) in zip(labels, readable, strict=True):
        pictures.append(Picture(entry, facts, keys[label], caption_of(entry.caption, spec.prompt)))
        groups.setdefault(keys[label], []).append(pictures[-1])
    return pictures, [sorted(group, key=_preference) for group in groups.values()]


def _parts(group: Sequence[Picture]) -> list[list[Picture]]:
    """A group in lists of one picture each: the one to keep, then those with its bytes, its caption, or none.

    What looks alike to a hash of 64 bits (two letters on white) and has captions that differ is two pictures: a caption is
    what its owner says of it.
    """
    parts: list[list[Picture]] = []
    found: dict[str | None, list[Picture]] = {}
    for picture in group:
        about = (picture.facts.id, picture.entry.caption)
        part = next((found[key] for key in about if key in found), None)
        if part is None:
            part = []
            parts.append(part)
            found.update(dict.fromkeys(about, part))
            found.setdefault(None, part)
        part.append(picture)
    return parts


def _preference(picture: Picture) -> tuple[bool, bool, int, str, str]:
    facts = picture.facts
    return (
        picture.entry.caption is None,
        facts.blur >= BLURRY,
        -facts.width * facts.height,
        facts.id,
        picture.entry.name,
    )


def _suspects(
    pictures: Sequence[Picture], groups: Sequence[Sequence[Picture]]
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """(blurry, odd) pictures. Odd is judged by one of each group: else noise and its copy would be at home together."""
    firsts = [group[0] for group in groups]
    features = np.stack([p.facts.features for p in firsts]) if firsts else np.zeros((0, 1), np.float32)
    scores = dict(zip((p.group for p in firsts), outlier_scores(features).tolist(), strict=True))
    blurry = [Finding(name=p.entry.name, what=f"{p.facts.blur:.2f}") for p in pictures if p.facts.blur >= BLURRY]
    odd = [p for p in pictures if scores[p.group] >= OUTLIER]
    return tuple(blurry), tuple(Finding(name=p.entry.name, what=f"{scores[p.group]:.1f}") for p in odd)


def _duplicates(group: Sequence[Picture]) -> Duplicates:
    return Duplicates(
        names=tuple(p.entry.name for p in group),
        exact=len({p.facts.id for p in group}) == 1,
        captions_differ=len({p.entry.caption for p in group if p.entry.caption}) > 1,
    )


def _about_used(used: Sequence[Picture], spec: DataSpec) -> dict[str, Any]:
    """The fields of a report that speak of the pictures left in the end."""
    replaces = spec.prompt is not None and not is_template(spec.prompt)
    chosen = sorted(used, key=lambda picture: picture.facts.id)[:COMPARED]
    return {
        "upscaled": tuple(p.entry.name for p in used if min(p.facts.width, p.facts.height) < spec.resolution),
        "missing_captions": tuple(p.entry.name for p in used if p.entry.caption is None),
        "without_caption": sum(not p.caption for p in used),
        "replaced_captions": sum(replaces and p.entry.caption not in (None, p.caption) for p in used),
        "diversity": round(diversity(np.stack([p.facts.features for p in chosen])), 3) if chosen else None,
        "balance": balances([p.caption for p in used], [p.entry.folder for p in used]),
        "examples": tuple(p.entry.name for p in chosen[:EXAMPLES]),
    }
