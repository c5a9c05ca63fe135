"""What a benchmark found: targets, tables and raw samples, in one JSON file a benchmark and hardware."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import hardware

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """A promise about one number: at least or at most `bound`."""

    what: str
    value: float
    bound: float
    at_least: bool
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Result:
    """`samples`: every measured number, by what was measured; medians are made from them."""

    targets: Sequence[Target]
    tables: Sequence[Table]
    samples: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any]
    notes: Sequence[str] = field(default_factory=tuple)
    gpu: bool = False


def document(name: str, result: Result, seconds: float, quick: bool) -> dict[str, Any]:
    """All that the file holds."""
    machine = hardware.describe(result.gpu)
    return {
        "name": name,
        "quick": quick,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "commit": hardware.commit(),
        "hardware": machine,
        "versions": hardware.versions(),
        "settings": dict(result.settings),
        "targets": [{**asdict(target), "met": target.met} for target in result.targets],
        "tables": [asdict(table) for table in result.tables],
        "medians": {what: median(values) for what, values in result.samples.items() if values},
        "samples": {what: list(values) for what, values in result.samples.items()},
        "notes": list(result.notes),
    }


def write(body: Mapping[str, Any], folder: Path) -> Path:
    """<name>-<hardware>.json; a quick one gets another suffix, so that it never replaces a real one."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".quick.json" if body["quick"] else ".json"
    path = folder / f"{body['name']}-{hardware.slug(body['hardware'])}{suffix}"
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path


def load(folder: Path) -> list[dict[str, Any]]:
    """The real results, by file name."""
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.endswith(".quick.json")]
    return [json.loads(path.read_text()) for path in paths]
