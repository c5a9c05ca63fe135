"""Which code this is, for the records of runs and versions."""

import functools
import subprocess
from pathlib import Path

from raysd import __version__


@functools.cache
def code() -> str:
    """The version, and in a checkout the commit: 0.1.0+g1a2b3c4d5e6f, with .dirty where files of the package differ."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return __version__
    try:
        commit = _git(checkout, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(checkout, "status", "--porcelain", "--", "raysd").strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{commit}{'.dirty' if changed else ''}"


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
