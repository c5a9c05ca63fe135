"""What an evaluation draws: prompts from a file, from captions, or the bundled list."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raysd.errors import NotFound, RequestError
from raysd.words import is_text

BUNDLED = Path(__file__).with_name("prompts.txt")
"""What tiny-sd was trained for: every shape in every colour."""
MOST = 100_000
"""Prompts in a file."""
LONGEST = 2000
"""Characters of a prompt."""


@dataclass(frozen=True)
class Prompt:
    text: str
    negative: str | None = None


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Each prompt of a file once, in order: one a line, or in a .jsonl file {"prompt": …, "negative": …} a line.

    Raises NotFound, or RequestError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # no other line ends: JSON holds some of them
    except FileNotFoundError:
        raise NotFound(f"prompts {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"prompts {path}: not a readable UTF-8 file: {error}"[:300]) from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows or len(rows) > MOST:
        raise RequestError(f"prompts {path}: {len(rows):,} prompts in it; give 1 to {MOST:,}, one a line")
    read = _from_json if path.suffix.lower() == ".jsonl" else _from_text
    return unique([read(line, f"prompts {path}: line {number}") for number, line in rows])


def unique(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Each once: a picture's seed depends on its prompt, so the same prompt again would be the same picture again."""
    return tuple(dict.fromkeys(prompts))


def _from_text(line: str, where: str) -> Prompt:
    return Prompt(_checked(line, f"{where}: prompt").strip())


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not row.keys() <= {"prompt", "negative"}:
        raise RequestError(f'{where}: wanted {{"prompt": "…", "negative": "…"}} and nothing else')
    prompt, negative = row.get("prompt"), row.get("negative")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"{where}: prompt: required, and text")
    if negative is not None and not isinstance(negative, str):
        raise RequestError(f"{where}: negative: text or null")
    given = None if negative is None else _checked(negative, f"{where}: negative")
    return Prompt(_checked(prompt, f"{where}: prompt"), given)


def _checked(text: str, where: str) -> str:
    if len(text) > LONGEST or "\0" in text or not is_text(text):
        raise RequestError(f"{where}: at most {LONGEST:,} characters of text, and no NUL")
    return text
