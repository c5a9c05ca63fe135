"""Errors in the words of the API that was called: OpenAI's shape, or Replicate's. None repeats what was sent."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from raysd.errors import NotFound, RaysdError, RequestError, TooMany
from raysd.serve.http.desk import Busy
from raysd.serve.predictions import POLICY

AGAIN = 2
"""Seconds after which to try again where a store did not answer."""
_REPLICATE = re.compile(r"/v1/(predictions|files|webhooks|models/[^/]+/[^/]+)(/|$)")
_FIELD = re.compile(r"([a-z_][\w.\[\]]*): ")
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "rate_limit_exceeded"}


class Refused(HTTPException):
    """An answer other than the one asked for. `detail` is one to three lines, and begins with the field that it is about."""


class OpenAIFault(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """What OpenAI's clients read of an error."""

    error: OpenAIFault


class Problem(BaseModel):
    """What Replicate's clients read of an error."""

    title: str
    detail: str
    status: int


OPENAI: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": OpenAIError, "description": "Refused, and why"},
    "5XX": {"model": OpenAIError, "description": "Not done, and whether to try again"},
}
REPLICATE: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "Refused, and why"},
    "5XX": {"model": Problem, "description": "Not done, and whether to try again"},
}


def answer(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The error as the API that `path` belongs to words it."""
    body: BaseModel
    if _REPLICATE.match(path):
        title = {401: "Unauthenticated", 404: "Not found", 422: "Input validation failed", 429: "Too many requests"}
        body = Problem(title=title.get(status, "Refused" if status < 500 else "Failed"), detail=message, status=status)
    else:
        body = OpenAIError(error=fault(status, message))
    return JSONResponse(body.model_dump(), status, dict(headers or {}))


def fault(status: int, message: str) -> OpenAIFault:
    """OpenAI's words for it. A message that begins with a field and a colon names the parameter."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    field = _FIELD.match(message)
    if field and field[1] == POLICY:
        return OpenAIFault(message=message.removeprefix(field[0]), type=kind, code=POLICY)
    return OpenAIFault(message=message, type=kind, param=field[1] if field else None, code=_CODES.get(status))


def refusal(error: RaysdError) -> Refused:
    """Which answer an error of raysd's becomes."""
    if isinstance(error, TooMany | Busy):
        again = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return Refused(503 if isinstance(error, Busy) else 429, str(error), headers=again)
    if isinstance(error, NotFound):
        return Refused(404, str(error))
    if isinstance(error, RequestError):
        return Refused(400, str(error))
    return Refused(503, "the service cannot reach its store just now; try again", headers={"Retry-After": str(AGAIN)})


def explained(problems: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> str:
    """Pydantic's findings as lines `field: what is wrong`, three at most. `names`: what a field is called outside."""
    lines = []
    for problem in problems:
        loc = () if problem["type"] == "json_invalid" else problem["loc"]  # where in the text, that is
        parts = [str(part) for part in loc if part not in ("body", "query", "header", "path")]
        field, reason = ".".join((names or {}).get(part, part) for part in parts), _reason(problem)
        named = field or ("" if _FIELD.match(reason) else "body")  # a check of several fields names its own
        lines.append(f"{named}: {reason}" if named else reason)
    lines = list(dict.fromkeys(lines))
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], f"… and {len(lines) - 2} more"])


def invalid(error: ValidationError, names: Mapping[str, str]) -> RequestError:
    """A value that the wire let through and a spec did not."""
    return RequestError(explained(error.errors(), names))


def _reason(problem: Mapping[str, Any]) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        return "unknown, or not offered here"
    if kind == "missing":
        return "required"
    if kind == "json_invalid":
        return f"not JSON: {problem['ctx']['error']}"
    if kind in ("model_attributes_type", "model_type", "dict_type"):
        return "give a JSON object, with Content-Type: application/json"
    if "UploadFile" in str(problem["msg"]):
        return "give a file"
    return str(problem["msg"]).removeprefix("Value error, ")


def handle(app: FastAPI) -> None:
    """Have the application answer errors so."""

    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request.url.path, error.status_code, str(error.detail), error.headers)

    async def failed(request: Request, error: RaysdError) -> JSONResponse:
        return await refused(request, refusal(error))

    async def unfit(request: Request, error: RequestValidationError) -> JSONResponse:
        status = 422 if _REPLICATE.match(request.url.path) else 400
        return answer(request.url.path, status, explained(error.errors()))

    app.exception_handler(HTTPException)(refused)
    app.exception_handler(RaysdError)(failed)
    app.exception_handler(RequestValidationError)(unfit)
