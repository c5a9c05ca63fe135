"""What every request passes: whose it is, whether it may come at all, how long its body may take, and what it is called."""

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raysd.host import is_loopback
from raysd.serve import tracing
from raysd.serve.http.errors import Refused, answer

log = logging.getLogger("raysd.serve.http")
MOST_HEADER_BYTES = 32 * 1024
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::[0-9]{1,5})?", re.ASCII)
UNTRACED = ("/healthz", "/readyz")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """ASGI middleware. `identify` says whose a request is, or raises Refused; its answer lies in `request.state.caller`.
    `limit_of` a path is the size in bytes of its largest body, which may take `body_seconds` to arrive.

    With `loopback` the service is this machine's alone: who comes from elsewhere is refused, wherever it listens. So are
    other host names, so that no page of another site reaches it under a name of its own (DNS rebinding), and requests
    that a browser sends for another site.
    """

    def __init__(
        self,
        app: ASGIApp,
        identify: Callable[[HTTPConnection], Any],
        *,
        loopback: bool,
        origins: tuple[str, ...],
        limit_of: Callable[[str], int],
        body_seconds: float,
    ) -> None:
        self.app, self.identify, self.limit_of = app, identify, limit_of
        self.loopback, self.origins, self.body_seconds = loopback, origins, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        passing = _Passing(scope, send, request_id)
        if tracing.on() and scope["path"] not in UNTRACED:
            with tracing.span(scope["method"], passing.about, headers=headers, kind=SpanKind.SERVER) as span:
                await self._pass(scope, headers, receive, passing)
                passing.told(span)
        else:
            await self._pass(scope, headers, receive, passing)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, passing: "_Passing") -> None:
        request_id = passing.request_id
        try:
            self._check(scope, headers)
            scope["state"]["caller"] = await self.identify(HTTPConnection(scope))
            await self.app(scope, self._bounded(scope, headers, receive), passing.send)
        except Refused as refused:
            await passing.answer(refused.status_code, str(refused.detail), receive, refused.headers)
        except Exception as error:
            # Its message may quote what was asked for, and that is not logged.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %s: %s\n%s", request_id, type(error).__name__, where)
            await passing.answer(500, f"failed; the service's log has more under {request_id}", receive)
        finally:
            passing.log()

    def _check(self, scope: Scope, headers: Headers) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            raise Refused(431, f"the headers have more than {MOST_HEADER_BYTES:,} bytes")
        hosts = headers.getlist("host")
        named = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if named is None:
            raise Refused(400, "Host: give one, as name or name:port")
        if not self.loopback:
            return
        client = scope.get("client")
        if client is None or not is_loopback(client[0]):
            raise Refused(
                403, "this service is for its own machine alone; for others set public: true, and give them keys"
            )
        if not is_loopback(named["name"]):
            raise Refused(421, "this service is for its own machine: address it as 127.0.0.1 or localhost")
        origin, own = headers.get("origin"), f"{scope['scheme']}://{hosts[0]}"
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere if origin is None else origin not in (own, *self.origins):
            raise Refused(403, "sent by a page of another site; name that site in origins if it may")

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """The body in time, and no more of it than the route takes. After it, waiting is for the client to go away."""
        most = self.limit_of(scope["path"])
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise _too_large(most)
        end = time.monotonic() + self.body_seconds
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise Refused(408, f"the body did not arrive within {self.body_seconds:g} s") from None
            size += len(message.get("body", b""))
            if size > most:
                raise _too_large(most)
            whole = not message.get("more_body", False)
            return message

        return bounded


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body has more than {most:,} bytes, which is the most here")


class _Passing:
    """One request on its way: its answer gets headers, and one line of the log."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.scope, self._send, self.request_id = scope, send, request_id
        self.status: int | None = None
        self.began = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def answer(self, status: int, message: str, receive: Receive, headers: Any = None) -> None:
        if self.status is None:
            await answer(self.scope["path"], status, message, headers)(self.scope, receive, self.send)

    @property
    def route(self) -> str | None:
        """Not the path: what is not a route may hold anything, and a link's is a key to a picture."""
        return getattr(self.scope.get("route"), "path", None)

    @property
    def about(self) -> dict[str, Any]:
        """What a span says of a request when it begins."""
        return {"http.request.method": self.scope["method"], "raysd.request_id": self.request_id}

    def told(self, span: Any) -> None:
        """What a span says of it at the end."""
        span.update_name(f"{self.scope['method']} {self.route or 'no route'}")
        tracing.note({"http.route": self.route, "http.response.status_code": self.status})
        if self.status is None or self.status >= 500:
            tracing.failed(span, str(self.status or "no answer"))

    def log(self) -> None:
        line = {
            "request": self.request_id,
            "method": self.scope["method"],
            "route": self.route,
            "status": self.status,
            "ms": round(1000 * (time.monotonic() - self.began), 1),
        }
        log.info(json.dumps(line))
