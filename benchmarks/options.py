"""What a benchmark is told, and how it says that it cannot run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """`work` is an empty folder for the benchmark's files; `quick` asks for the smallest size that still runs it all."""

    work: Path
    quick: bool = False
    small: bool = False
    peer_script: Path | None = None
    peer_python: Path | None = None


class Skipped(Exception):
    """This benchmark cannot run here; the message says what it needs."""
