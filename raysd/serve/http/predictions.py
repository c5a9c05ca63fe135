"""Predictions in Replicate's shape: asked for now, fetched when they are done, told to a webhook."""

import asyncio
import base64
import binascii
import math
import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from raysd.errors import RequestError
from raysd.serve.http import uploads, webhooks
from raysd.serve.http.answers import version_headers
from raysd.serve.http.asking import Told, fingerprint, hold, submit, told_by
from raysd.serve.http.catalog import OWNER
from raysd.serve.http.errors import REPLICATE
from raysd.serve.http.replicate import PredictionAnswer, said
from raysd.serve.http.service import Service, caller_of, may
from raysd.serve.http.webhooks import EVENTS, Event
from raysd.serve.http.wire import Input, Name, Wire, drawing
from raysd.serve.predictions import Cursor, Prediction

PAGE = 100
LONGEST_WAIT = 60
SHORTEST_LIFE, LONGEST_LIFE = 5, 24 * 3600
"""Seconds of Cancel-After."""
_LIFE = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,5})m)?(?:(\d{1,6})s?)?")
Wait = Annotated[
    str | None,
    Header(
        alias="Prefer",
        max_length=200,
        description=f"wait, or wait=SECONDS (1 to {LONGEST_WAIT}): answer when it has ended, or then. Others are ignored.",
    ),
]
Life = Annotated[
    str | None,
    Header(
        alias="Cancel-After",
        pattern=rf"^{_LIFE.pattern}$",
        min_length=1,
        max_length=20,
        description="Seconds, or as 1h30m15s: after which it is given up. From 5 seconds to a day; else what the service says.",
    ),
]


class PredictionRequest(Wire):
    """Which model, or which version of one, is to draw what."""

    input: Input
    version: Name | None = None
    """A version's digest, as model@number, or a model's name."""
    model: Name | None = None
    webhook: Annotated[str, Field(max_length=webhooks.LONGEST_URL)] | None = None
    """An http(s) address that is told what becomes of it."""
    webhook_events_filter: list[Event] | None = None
    webhook_completed: Annotated[str, Field(max_length=webhooks.LONGEST_URL)] | None = None
    """Replicate's older word for a webhook of the end alone."""
    stream: Literal[False] | None = None
    """Streams are the Images API's."""


class Page(BaseModel):
    previous: str | None
    next: str | None
    results: list[PredictionAnswer]


def routes(service: Service) -> APIRouter:
    """/v1/predictions and what lies under it."""
    router = APIRouter(tags=["predictions"], dependencies=[may("generate")], responses=REPLICATE)
    _asking(router, service)
    _having(router, service)
    return router


def _asking(router: APIRouter, service: Service) -> None:
    """What begins predictions."""
    taking: dict[str, Any] = {
        "status_code": 201,
        "response_model": PredictionAnswer,
        "responses": {202: {"model": PredictionAnswer, "description": "It had not ended when the wait was over"}},
    }

    @router.post("/v1/predictions", **taking)
    async def create(
        request: Request,
        asked: PredictionRequest,
        told: Annotated[Told, Depends(told_by)],
        prefer: Wait = None,
        cancel_after: Life = None,
    ) -> Response:
        """Ask for pictures."""
        return await _create(service, request, asked, told, prefer, cancel_after)

    @router.post(f"/v1/models/{OWNER}/{{name}}/predictions", **taking)
    async def create_by_model(
        request: Request,
        name: str,
        asked: PredictionRequest,
        told: Annotated[Told, Depends(told_by)],
        prefer: Wait = None,
        cancel_after: Life = None,
    ) -> Response:
        """Ask a model for pictures."""
        asked = asked.model_copy(update={"model": f"{OWNER}/{name}", "version": None})
        return await _create(service, request, asked, told, prefer, cancel_after)


def _having(router: APIRouter, service: Service) -> None:
    """What finds, stops and removes them."""

    @router.get("/v1/predictions", response_model=Page)
    async def find(request: Request, cursor: Annotated[str | None, Query(max_length=200)] = None) -> Page:
        """One's predictions, newest first, a hundred a page."""
        before = _cursor(cursor) if cursor is not None else None
        owner = caller_of(request).lists
        found = await asyncio.to_thread(service.queue.find, owner, before, PAGE)
        base = service.base(request)
        following = f"{base}/v1/predictions?cursor={_written(found[-1])}" if len(found) == PAGE else None
        return Page(previous=None, next=following, results=[said(service.links, base, each) for each in found])

    @router.get("/v1/predictions/{id}", response_model=PredictionAnswer)
    async def get(request: Request, id: str) -> Response:
        """A prediction as it stands."""
        return _answer(service, request, await service.own(id, request), 200)

    @router.post("/v1/predictions/{id}/cancel", response_model=PredictionAnswer)
    async def cancel(request: Request, id: str) -> Response:
        """Stop it at its next step. What has ended stays as it is."""
        await service.own(id, request)
        return _answer(service, request, await service.desk.cancel(id), 200)

    @router.delete("/v1/predictions/{id}", status_code=204)
    async def delete(request: Request, id: str) -> None:
        """Stop it, and remove its prompt, its pictures, those it started from, and what was written of them, for good."""
        await service.own(id, request)
        await service.desk.delete(id)

    @router.get("/v1/webhooks/default/secret")
    async def secret(request: Request) -> dict[str, str]:
        """What the caller's webhooks are signed with."""
        return {"key": webhooks.secret_of(service.secret, caller_of(request).owner)}


async def _create(
    service: Service, request: Request, asked: PredictionRequest, told: Told, prefer: str | None, life: str | None
) -> Response:
    seconds, deadline = _wait(prefer), _deadline(life, service.spec.life_seconds)
    webhook, events = await _webhook(service, asked)
    if asked.input.image is not None:
        await hold(service, request, told.idempotency_key, asked.version or asked.model)
    image, mask = await uploads.of_input(service, caller_of(request).owner, asked.input)
    prediction = await submit(
        service,
        request,
        told,
        api="predictions",
        model=asked.version or asked.model,
        drawing=drawing(asked.input, service.spec, image=image, mask=mask),
        lora=asked.input.lora,
        deadline=deadline,
        webhook=webhook,
        webhook_events=events,
        body=fingerprint("prediction", asked, image, mask),
    )
    base = service.base(request)
    if service.courier is not None and prediction.webhook is not None:
        await asyncio.to_thread(service.courier.follow, prediction, base)
    if seconds is None:
        return _answer(service, request, prediction, 201)
    prediction = await service.desk.wait(prediction.id, seconds)
    answer = _answer(service, request, prediction, 201 if prediction.ended else 202, waited=True)
    answer.headers["Preference-Applied"] = f"wait={seconds:g}"
    return answer


def _answer(
    service: Service, request: Request, prediction: Prediction, status: int, *, waited: bool = False
) -> JSONResponse:
    answer = said(service.links, service.base(request), prediction)
    if waited and answer.status == "processing":
        # Replicate's client takes `processing` after a wait for the end, and would give no pictures.
        answer.status = "starting"
    headers = version_headers(prediction) | {"Location": answer.urls.get}
    return JSONResponse(answer.model_dump(), status, headers)


def _wait(prefer: str | None) -> float | None:
    """Seconds to wait. What else may be preferred (RFC 7240) is ignored."""
    for preference in (prefer or "").split(","):
        name, _, value = preference.partition(";")[0].strip().partition("=")
        if name.strip().lower() != "wait":
            continue
        if not value.strip():
            return LONGEST_WAIT
        seconds = value.strip().strip('"')
        if not (seconds.isascii() and seconds.isdigit() and 1 <= int(seconds[:6]) <= LONGEST_WAIT):
            raise RequestError(f"Prefer: wait={seconds[:10]}: give 1 to {LONGEST_WAIT} seconds")
        return int(seconds)
    return None


def _deadline(life: str | None, default: float) -> float:
    if life is None:
        return time.time() + default
    match = _LIFE.fullmatch(life)
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not SHORTEST_LIFE <= total <= LONGEST_LIFE:
        raise RequestError("Cancel-After: give 5s to 24h, as seconds or as 1h30m15s")
    return time.time() + total


async def _webhook(service: Service, asked: PredictionRequest) -> tuple[str | None, tuple[Event, ...]]:
    url = asked.webhook or asked.webhook_completed
    if url is None:
        if asked.webhook_events_filter:
            raise RequestError("webhook_events_filter: needs webhook, the address to be told")
        return None, ()
    if service.courier is None:
        raise RequestError("webhook: this service tells none; ask with GET instead")
    if asked.webhook is None:
        return await webhooks.check(url, service.aside), ("completed",)
    events = EVENTS if asked.webhook_events_filter is None else tuple(dict.fromkeys(asked.webhook_events_filter))
    return await webhooks.check(url, service.aside), events


def _written(last: Prediction) -> str:
    return base64.urlsafe_b64encode(f"{last.created!r} {last.id}".encode()).decode().rstrip("=")


def _cursor(text: str) -> Cursor:
    try:
        created, id = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode().split(" ")
        if re.fullmatch(r"[a-z2-7]{26}", id) and math.isfinite(float(created)):
            return Cursor(float(created), id)
    except (ValueError, binascii.Error):
        pass
    raise RequestError("cursor: not one that this list answered; begin without it")
