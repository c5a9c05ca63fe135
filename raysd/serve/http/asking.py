"""From a request that was understood to one that is written down: whose it is, what its headers say, its limits."""

import asyncio
import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header, Request

from raysd.errors import TooMany
from raysd.serve import tracing
from raysd.serve.drawing import Drawing
from raysd.serve.http.catalog import find
from raysd.serve.http.links import user_digest
from raysd.serve.http.service import Service, caller_of
from raysd.serve.http.wire import User, Wire
from raysd.serve.predictions import Api, Ask, Prediction

_TRACE = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="The same key with the same body again gives the former answer; with another body it is refused.",
    ),
]


@dataclass(frozen=True)
class Told:
    """What headers say of a request."""

    idempotency_key: str | None
    withhold: bool
    traceparent: str | None
    user: str | None


def told_by(
    idempotency_key: Key = None,
    withhold: Annotated[
        bool, Header(alias="X-Raysd-Withhold", description="The prompt is not kept once the pictures are drawn.")
    ] = False,
    traceparent: Annotated[str | None, Header(description="Trace Context (W3C).")] = None,
    user: Annotated[
        User | None, Header(alias="X-Raysd-User", description="Who asks, in your words; kept as a digest alone.")
    ] = None,
) -> Told:
    """A dependency: the headers of a request that draws."""
    trace = traceparent if traceparent and _TRACE.fullmatch(traceparent) else None
    return Told(idempotency_key, withhold, trace, user)


def fingerprint(kind: str, asked: Wire, *uploads: str | None) -> str:
    """What two requests have in common where they ask for the same. `uploads` are digests of its pictures."""
    plain = asked.model_dump_json(exclude={"image", "images", "mask"})
    return hashlib.sha256("\n".join([kind, plain, *(upload or "" for upload in uploads)]).encode()).hexdigest()


async def hold(service: Service, request: Request, key: str | None, model: str | None, times: int = 1) -> None:
    """Raises TooMany where the caller's API key may not have `times` more requests drawn now.

    Called before something is kept for them. Not of what was asked for before with the same idempotency key.
    """
    owner = caller_of(request).owner
    if owner is None or await asyncio.to_thread(service.queue.former, key, owner) is not None:
        return
    try:
        await asyncio.to_thread(service.queue.hold, owner, times)
    except TooMany:
        service.metrics.refused(find(service.desk.models(), model).model, "")  # no version was chosen yet
        raise


async def submit(
    service: Service,
    request: Request,
    told: Told,
    *,
    api: Api,
    model: str | None,
    drawing: Drawing,
    user: str | None = None,
    **more: Any,
) -> Prediction:
    """Have it written down. `user` goes before that of the headers; `more` are fields of `Ask`. Raises what the desk does."""
    user = user or told.user
    caller, found = caller_of(request), find(service.desk.models(), model)
    ask = Ask(
        api=api,
        model=found.model,
        version=found.version,
        drawing=drawing,
        owner=caller.owner,
        user=user_digest(service.secret, caller.owner, user) if user else None,
        idempotency_key=told.idempotency_key,
        withhold=told.withhold or service.spec.withhold,
        request_id=request.state.request_id,
        traceparent=tracing.carried() or told.traceparent,
        **more,
    )
    return await service.desk.submit(ask)
