"""Requests that carry a key, so that sending one twice does it once. Neither the key nor the request is kept."""

import hashlib
import hmac
import json
from typing import NamedTuple


class Seal(NamedTuple):
    """`name` finds what the key was first used for, `body` tells whether that was the same request. Hex of SHA-256."""

    name: str
    body: str


def seal(key: str, body: str, *scope: str | None) -> Seal:
    """The seal of a request; the same key in another scope (owner, user) is another key.

    The body's digest is keyed: a prompt that is not kept cannot be found by trying prompts.
    """
    name = hashlib.sha256(json.dumps([*scope, key]).encode()).hexdigest()
    return Seal(name, hmac.digest(json.dumps(key).encode(), json.dumps(body).encode(), "sha256").hex())
