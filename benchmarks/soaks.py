"""What the long tests found when they were run by hand: one file a machine, one entry a test."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import hardware

FOLDER = Path(__file__).parent / "results" / "soaks"


def keep(folder: Path, test: str, seconds: float, facts: Mapping[str, object]) -> None:
    """The newest pass of a test replaces the one before."""
    machine = hardware.describe(gpu=False)
    path = folder / f"{hardware.slug(machine)}.json"
    body = json.loads(path.read_text()) if path.exists() else {"hardware": machine, "tests": {}}
    body["tests"][test] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": hardware.commit(),
        "minutes": round(seconds / 60, 1),
        "found": dict(facts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n")


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def rows(body: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """test, date, commit, minutes, what it found."""
    return [
        [
            f"`{test.replace('::', '` `')}`",
            one["date"],
            one["commit"] or "unknown",
            str(one["minutes"]),
            "; ".join(f"{name} {value}" for name, value in one["found"].items()),
        ]
        for test, one in sorted(body["tests"].items())
    ]
