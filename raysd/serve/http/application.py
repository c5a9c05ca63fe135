"""The HTTP application: all routes over one desk, behind one gate."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer

from raysd.config.serving import ServingSpec
from raysd.database import Database
from raysd.errors import AlreadyExists, NotFound, RaysdError
from raysd.feedback.generations import Generations
from raysd.feedback.records import Records
from raysd.serve import limits, pages
from raysd.serve.http import catalog, comparisons, errors, feedback, openai, predictions, uploads
from raysd.serve.http.access import Access
from raysd.serve.http.desk import Desk
from raysd.serve.http.gate import Gate
from raysd.serve.http.links import Links
from raysd.serve.http.outbox import Outbox
from raysd.serve.http.replicate import said
from raysd.serve.http.service import Service
from raysd.serve.http.webhooks import PAUSES, Courier
from raysd.serve.keys import Checker, Keys
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import Prediction
from raysd.serve.queue import Queue
from raysd.storage import Storage

SECRET = "serving/secret"
_WITH_PICTURES = re.compile(r"/v1/(images/edits|files|predictions|models/[^/]+/[^/]+/predictions)")
READY_SECONDS = 5.0
"""For which the database may take to say that it is there."""
STAINLESS = ("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Retry-Count", "Timeout")
ALLOWED = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Prefer",
    "Cancel-After",
    "Traceparent",
    "X-Raysd-User",
    "X-Raysd-Withhold",
    "X-Request-Id",
    *(f"X-Stainless-{name}" for name in STAINLESS),
    "OpenAI-Organization",
    "OpenAI-Project",
)
"""What a page of another site may send, where one is named: all that is read here, and what OpenAI's client adds."""
EXPOSED = ("X-Request-Id", "X-Raysd-Version", "X-Raysd-Digest", "Retry-After", "X-Should-Retry", "Preference-Applied")


def build(
    desk: Desk,
    queue: Queue,
    database: Database,
    storage: Storage,
    spec: ServingSpec,
    metrics: Metrics,
    *,
    webhook_pauses: Sequence[float] = PAUSES,
) -> FastAPI:
    """The application of a service. The desk is started and closed with it.

    Unless `spec.public`, it is for this machine alone and asks for no key.
    """
    http, secret = spec.http, secret_in(storage)
    links = Links(secret, http.link_seconds)
    courier = Courier(Outbox(database), queue, secret, partial(_told, links), webhook_pauses)
    service = Service(
        desk=desk,
        queue=queue,
        records=Records(database, admit=limits.count),
        generations=Generations(database, storage),
        spec=http,
        secret=secret,
        links=links,
        courier=courier if http.webhooks else None,
        metrics=metrics,
    )
    app = FastAPI(
        title="raysd",
        version=version("raysd"),
        summary="Pictures from versioned diffusion models: OpenAI's Images API and Replicate's predictions",
        docs_url=None,  # their pages load from other hosts
        redoc_url=None,
        lifespan=_lifespan(service),
        dependencies=[Depends(HTTPBearer(auto_error=False))]
        if spec.public
        else [],  # for the document; the gate checks
        redirect_slashes=False,
    )
    for routes in (openai, predictions, uploads, catalog, feedback, comparisons):
        app.include_router(routes.routes(service))
    app.include_router(feedback.links(service))
    app.include_router(_health(service))
    if spec.page:
        app.include_router(_page(pages.Settings(spec.public, http.most_steps, http.most_pixels)))
    errors.handle(app)
    _guard(app, spec, database)
    return app


def _guard(app: FastAPI, spec: ServingSpec, database: Database) -> None:
    """The gate before all routes, and before it what other sites' pages may ask."""
    http = spec.http
    access = Access(Checker(Keys(database)), loopback=not spec.public)
    app.add_middleware(
        Gate,
        identify=access.identify,
        loopback=not spec.public,
        origins=http.origins,
        limit_of=lambda path: http.upload_bytes if _WITH_PICTURES.fullmatch(path) else http.json_bytes,
        body_seconds=http.body_seconds,
    )
    if http.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=ALLOWED,
            expose_headers=EXPOSED,
        )


def secret_in(storage: Storage) -> bytes:
    """The service's secret, made when it is first asked for: the same in all its processes, and after a restart."""
    try:
        return storage.read(SECRET)
    except NotFound:
        pass
    with suppress(AlreadyExists):
        storage.create(SECRET, secrets.token_bytes(32))
    return storage.read(SECRET)


def _lifespan(service: Service) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.desk.start()
        if service.courier is not None:
            service.courier.start()
        try:
            yield
        finally:
            if service.courier is not None:
                await service.courier.close()
            await service.desk.close()
            service.aside.close()

    return lifespan


def _told(links: Links, base: str, prediction: Prediction) -> dict[str, Any]:
    return said(links, base, prediction).model_dump()


def _health(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def alive() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"description": "It cannot take requests now"}})
    async def ready() -> Response:
        """Whether it can take requests: models are served, and the database is there."""
        try:
            served = [model for model in service.desk.models() if model.withdrawn is None]
            async with asyncio.timeout(READY_SECONDS):
                for model in served[:1]:
                    await asyncio.to_thread(service.queue.waiting, model.name)
        except (RaysdError, TimeoutError):
            served = []
        status = {"status": "ready" if served else "not ready", "models": [model.name for model in served]}
        return JSONResponse(status, 200 if served else 503)

    return router


def _page(settings: pages.Settings) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(pages.page(nonce, settings), headers={"Content-Security-Policy": pages.policy(nonce)})

    return router
