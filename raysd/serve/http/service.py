"""What all routes work with, and the words that several of them share."""

import asyncio
import re
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, Request

from raysd.config.http import HttpSpec
from raysd.errors import NotFound, RaysdError
from raysd.feedback.generations import Generations
from raysd.feedback.records import Records
from raysd.serve.http.access import Caller
from raysd.serve.http.aside import Aside
from raysd.serve.http.desk import Desk
from raysd.serve.http.errors import Refused
from raysd.serve.http.links import Links
from raysd.serve.http.webhooks import Courier
from raysd.serve.keys import Role
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import Prediction
from raysd.serve.queue import Queue

_ID = re.compile(r"[a-z2-7]{26}")


@dataclass(frozen=True)
class Service:
    """The application's parts. `secret` is the service's own, the same in all its processes."""

    desk: Desk
    queue: Queue
    records: Records
    generations: Generations
    spec: HttpSpec
    secret: bytes
    links: Links
    courier: Courier | None
    """None where predictions may name no webhook."""
    metrics: Metrics
    aside: Aside = field(default_factory=Aside)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def base(self, request: Request) -> str:
        """What addresses in answers begin with."""
        return self.spec.public_url or str(request.base_url).rstrip("/")

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do it beside the request, and also if the request ends meanwhile. Nobody is told if it fails."""

        async def quietly() -> None:
            with suppress(RaysdError):
                await work

        task = asyncio.get_running_loop().create_task(quietly())
        self.tasks.add(task)  # else nothing holds it
        task.add_done_callback(self.tasks.discard)

    async def own(self, id: str, request: Request) -> Prediction:
        """A prediction that the caller may see. Raises NotFound, as for one that there is not, if he may not."""
        absent = NotFound("prediction: there is none of that id")
        if _ID.fullmatch(id) is None:
            raise absent
        prediction = await asyncio.to_thread(self.queue.get, id)
        if prediction.shadow_of is not None or not caller_of(request).sees(prediction.owner):
            raise absent
        return prediction


def caller_of(request: Request) -> Caller:
    """Whose request it is, as the gate found out."""
    caller: Caller = request.state.caller
    return caller


def may(role: Role) -> Any:
    """A dependency: the caller has the role."""

    async def check(request: Request) -> None:
        if not caller_of(request).may(role):
            raise Refused(403, f"this key has not the role {role!r}")

    return Depends(check)
