"""Which share of a served model's requests other versions than the deployed one draw: canaries, and shadows.

models/<model>/traffic.json is one object, changed by compare-and-swap, with every change it went through.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raysd.errors import IntegrityError, NotFound, RequestError, Stale
from raysd.registry.catalog import load
from raysd.registry.records import check_name, timestamp
from raysd.storage import Storage

KEPT = 100
"""Changes that are kept in the object."""


@dataclass(frozen=True)
class Traffic:
    """Percent of the requests by version number; what is left goes to the deployed version.

    `shadow`: requests that this version draws as well, for comparison, and nobody sees. `seq` counts the changes.
    """

    shares: dict[int, float] = field(default_factory=dict)
    shadow: dict[int, float] = field(default_factory=dict)
    seq: int = 0
    changed: str = ""

    def version(self, sticky: str) -> int | None:
        """The version that a request belongs to; None: the deployed one. The same word always gives the same one.

        The newest version's share keeps those who have it as it grows.
        """
        place = _place(f"share\0{sticky}") * 100
        for number, share in sorted(self.shares.items(), reverse=True):
            if place < share:
                return number
            place -= share
        return None

    def shadows(self, sticky: str) -> list[int]:
        """The versions that draw it besides."""
        return [number for number, share in self.shadow.items() if _place(f"shadow{number}\0{sticky}") * 100 < share]


def read(storage: Storage, model: str) -> Traffic:
    """The split as it stands; no shares where none was made. Raises IntegrityError."""
    return _read(storage, model)[0]


def in_use(storage: Storage, model: str) -> Traffic:
    """The split without versions that were withdrawn since: nothing goes to those."""
    now = read(storage, model)
    left = {number for number in {*now.shares, *now.shadow} if not load(storage, model, number).withdrawn}
    shares, shadow = ({n: share for n, share in part.items() if n in left} for part in (now.shares, now.shadow))
    return replace(now, shares=shares, shadow=shadow)


def change(storage: Storage, model: str, shares: Mapping[int, float], shadow: Mapping[int, float]) -> Traffic:
    """Set the split. Raises RequestError for shares that are none, NotFound, and Stale in a race.

    A version that was withdrawn is refused.
    """
    check_name(model, "model")
    if any(not 0 <= share <= 100 for share in [*shares.values(), *shadow.values()]) or sum(shares.values()) > 100:
        raise RequestError(f"{model}: shares are percent and sum up to 100 at most: {dict(shares)}")
    for number in {*shares, *shadow}:
        if load(storage, model, number).withdrawn:
            raise RequestError(f"{model}@{number}: was withdrawn: send traffic to another version")
    former, moves, tag = _read(storage, model)
    new = Traffic(
        {number: share for number, share in shares.items() if share > 0},
        {number: share for number, share in shadow.items() if share > 0},
        former.seq + 1,
        timestamp(),
    )
    body = {"now": asdict(new), "changes": [*moves, asdict(new)][-KEPT:]}
    try:
        storage.swap(_path(model), json.dumps(body, indent=1).encode(), tag)
    except Stale:
        raise Stale(f"{model}: its traffic was changed by another just now: look at it first") from None
    return new


def _read(storage: Storage, model: str) -> tuple[Traffic, list[dict[str, Any]], str | None]:
    try:
        data, tag = storage.read_tagged(_path(model))
    except NotFound:
        return Traffic(), [], None
    try:
        body = json.loads(data)
        now = body["now"]
        shares, shadow = ({int(n): float(p) for n, p in now[name].items()} for name in ("shares", "shadow"))
        return Traffic(shares, shadow, now["seq"], now["changed"]), body["changes"], tag
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{model}: {_path(model)} is damaged: set the traffic anew after deleting it") from None


def _path(model: str) -> str:
    return f"models/{model}/traffic.json"


def _place(word: str) -> float:
    """A place in [0, 1) that the word alone decides."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") / 2**64
