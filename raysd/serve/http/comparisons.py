"""Blind comparisons: two versions draw the same, and nobody is told which is which before the choice."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from raysd.errors import RequestError
from raysd.serve.http.asking import Told, fingerprint, hold, submit, told_by
from raysd.serve.http.catalog import find
from raysd.serve.http.desk import Served
from raysd.serve.http.errors import OPENAI
from raysd.serve.http.links import derived
from raysd.serve.http.service import Service, caller_of, may
from raysd.serve.http.wire import Addressed, Name, drawing
from raysd.serve.predictions import Prediction

SIDES = ("left", "right")


class ComparisonRequest(Addressed):
    """One picture, to be drawn by two versions from the same noise."""

    versions: Annotated[list[Name], Field(min_length=2, max_length=2)] | None = None
    """As model@number; the two that have the largest shares of the model's traffic if not given."""


class ComparisonAnswer(BaseModel):
    """Two generations whose pictures are there when they are drawn. Who draws which is told after the choice."""

    id: str
    left: str
    right: str


def routes(service: Service) -> APIRouter:
    """POST /v1/comparisons."""
    router = APIRouter(tags=["feedback"], responses=OPENAI)

    @router.post("/v1/comparisons", status_code=201, dependencies=[may("generate")])
    async def compare(
        request: Request, asked: ComparisonRequest, told: Annotated[Told, Depends(told_by)]
    ) -> ComparisonAnswer:
        """Have two versions draw the same, to be compared blind."""
        return await _compare(service, request, asked, told)

    return router


async def _compare(service: Service, request: Request, asked: ComparisonRequest, told: Told) -> ComparisonAnswer:
    if asked.lora is not None:
        raise RequestError("lora: both sides would be drawn by it; name LoRA versions under versions")
    versions = _versions(service.desk.models(), asked)
    wanted = drawing(asked, service.spec, **asked.pixels())
    id = _comparison(service, request, told)
    if hmac.digest(derived(service.secret, "sides"), id.encode(), "sha256")[0] % 2:
        versions = (versions[1], versions[0])
    keys = [told.idempotency_key and _digest(f"{told.idempotency_key} {side}") for side in SIDES]
    await hold(service, request, keys[0], versions[0], times=2)
    drawn: list[Prediction] = []
    for side, version, key in zip(SIDES, versions, keys, strict=True):
        try:
            prediction = await submit(
                service,
                request,
                replace(told, idempotency_key=key),
                api="openai",
                model=version,
                drawing=wanted,
                user=asked.user,
                comparison=id,
                deadline=time.time() + service.spec.life_seconds,
                body=fingerprint(f"comparison {side}", asked),
            )
        except Exception:
            if drawn and key is None:  # with a key it is asked for again, and the first is drawn already
                service.later(service.desk.cancel(drawn[0].id))
            raise
        drawn.append(prediction)
        wanted = wanted.model_copy(update={"seed": prediction.drawing["seed"]})  # of a former try, if it was one
    left, right = (f"{prediction.id}-0" for prediction in drawn)
    return ComparisonAnswer(id=id, left=left, right=right)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _comparison(service: Service, request: Request, told: Told) -> str:
    """A new id; with an idempotency key always the same, and so the same sides."""
    if told.idempotency_key is None:
        return secrets.token_hex(13)
    scope = f"{caller_of(request).owner} {told.idempotency_key}".encode()
    return hmac.digest(derived(service.secret, "comparisons"), scope, "sha256").hex()[:26]


def _versions(served: Sequence[Served], asked: ComparisonRequest) -> tuple[str, str]:
    found = find(served, asked.model)
    if asked.versions is not None:
        first, second = asked.versions
        if first == second:
            raise RequestError("versions: are the same; name two")
        return first, second
    model = next(model for model in served if model.name == found.model)
    if len(model.traffic) < 2:
        raise RequestError(f"versions: {model.name} has one version in its traffic; name two as {model.name}@number")
    return model.traffic[0].ref, model.traffic[1].ref
