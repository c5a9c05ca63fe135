"""Foreign text (names, captions) made fit for one line of a message or a terminal."""

import re
from collections.abc import Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON can spell half characters, and file names can be any bytes."""
    return _SURROGATE.search(text) is None


def shown(text: str, most: int = 80) -> str:
    """`text` without control, formatting or surrogate characters (no terminal escapes, no new lines), shortened."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    return plain if len(plain) <= most and len(text) <= 4 * most else plain[: most - 1] + "…"


def named(names: Sequence[str], most: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name, 60) for name in names[:most]) + rest


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
