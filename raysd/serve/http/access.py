"""Whose a request is: an API key's, or on loopback this machine's own user's."""

import asyncio
import re
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from raysd.serve.http.errors import Refused
from raysd.serve.keys import ROLES, Checker, Role

_HEADER = re.compile(r"(?:bearer|token) +([!-~]{1,512})", re.IGNORECASE)
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="raysd"'}


@dataclass(frozen=True)
class Caller:
    """Who asks. `owner` is the key's id, None for this machine's own user."""

    owner: str | None
    roles: frozenset[Role]

    def may(self, role: Role) -> bool:
        """Whether it has the role; `admin` has all."""
        return role in self.roles or "admin" in self.roles

    @property
    def lists(self) -> str | None:
        """Whose predictions and generations it may see: None for everybody's."""
        return None if "admin" in self.roles else self.owner

    def sees(self, owner: str | None) -> bool:
        """Whether what belongs to that owner may be seen."""
        return "admin" in self.roles or (owner is not None and owner == self.owner)


HERE = Caller(None, frozenset(ROLES))
"""The user of this machine."""
NOBODY = Caller(None, frozenset())
"""Of what needs no key: the page, its picture links, health."""


class Access:
    """Who may come in. On `loopback` everybody does: a known key acts as itself, anything else as this machine's user."""

    def __init__(self, checker: Checker, *, loopback: bool) -> None:
        self._checker, self.loopback = checker, loopback

    async def identify(self, connection: HTTPConnection) -> Caller:
        """Whose request it is. Raises Refused (401) where that has to be known and is not."""
        if _open(connection.scope["path"]):
            return NOBODY
        sent = _HEADER.fullmatch(connection.headers.get("authorization", "").strip())
        key = await asyncio.to_thread(self._checker.check, sent[1]) if sent else None
        if key is not None:
            return Caller(key.id, frozenset(key.roles))
        if self.loopback:
            return HERE
        reason = "this key is unknown or was revoked" if sent else "give an API key: Authorization: Bearer KEY"
        raise Refused(401, reason, headers=CHALLENGE)


def _open(path: str) -> bool:
    return path in ("/", "/healthz", "/readyz", "/openapi.json") or path.startswith("/v1/pictures/")
