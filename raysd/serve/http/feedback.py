"""What people say of pictures, and the pictures themselves: by their owner, or by a signed link."""

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel

from raysd.errors import NotFound
from raysd.feedback.generations import Generation
from raysd.feedback.wire import Answer, Feedback
from raysd.serve.http import pictures
from raysd.serve.http.answers import read
from raysd.serve.http.asking import Key
from raysd.serve.http.errors import OPENAI, Refused
from raysd.serve.http.links import user_digest
from raysd.serve.http.pictures import MEDIA, Format
from raysd.serve.http.service import Service, caller_of, may
from raysd.serve.http.wire import User
from raysd.serve.metrics import Opinion

OPINIONS: tuple[Opinion, ...] = ("stars", "tags", "text", "report")
_ID = re.compile(r"[a-z2-7]{26}-[0-9]{1,3}")
_PICTURE = re.compile(rf"({_ID.pattern})\.(png|jpeg|webp)")


class GenerationAnswer(BaseModel):
    """A drawn picture. Times are epoch seconds. A prompt that was withheld, or deleted, is null.

    So are model, version and digest until the choice of a comparison is made.
    """

    generation: str
    prediction: str
    model: str | None
    version: str | None
    digest: str | None
    prompt: str | None
    negative_prompt: str | None
    seed: int
    parameters: dict[str, Any]
    width: int
    height: int
    sha256: str
    created: float
    kept_until: float | None
    deleted: float | None


def routes(service: Service) -> APIRouter:
    """/v1/feedback and /v1/generations."""
    router = APIRouter(tags=["feedback"], responses=OPENAI)

    @router.post("/v1/feedback", status_code=201, dependencies=[may("feedback")], responses={200: {"model": Answer}})
    async def feedback(
        request: Request,
        response: Response,
        said: Feedback,
        idempotency_key: Key = None,
        user: Annotated[User | None, Header(alias="X-Raysd-User", description="Who says it, in your words.")] = None,
    ) -> Answer:
        """Say what one thinks of a generation, or which of two is better. The same key again changes nothing: 200."""
        owner = caller_of(request).owner
        person = user_digest(service.secret, owner, user or "")
        kept = await asyncio.to_thread(service.records.keep, said, user=person, owner=owner, key=idempotency_key)
        response.status_code = 201 if kept.new else 200
        if kept.new:
            await _count(service, said)
        return Answer(id=kept.id, left=kept.left, right=kept.right)

    @router.get("/v1/generations/{generation}", dependencies=[may("generate")])
    async def get(request: Request, generation: str) -> GenerationAnswer:
        """What is kept of a generation."""
        return _said(await _own(service, request, generation))

    @router.delete("/v1/generations/{generation}", status_code=204, dependencies=[may("generate")])
    async def delete(request: Request, generation: str) -> None:
        """Remove the picture, its prompt and what was written of it, for good."""
        await _own(service, request, generation)
        await asyncio.to_thread(service.generations.delete, generation, caller_of(request).lists)

    png: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}

    @router.get(
        "/v1/generations/{generation}/picture",
        dependencies=[may("generate")],
        response_class=Response,
        responses=png,
    )
    async def picture(request: Request, generation: str) -> Response:
        """Its picture, once it is drawn."""
        return await _picture(service, await _own(service, request, generation), "png")

    return router


def links(service: Service) -> APIRouter:
    """/v1/pictures: what a signed link leads to."""
    router = APIRouter(tags=["images"], responses=OPENAI)
    kinds: dict[int | str, dict[str, Any]] = {200: {"content": {media: {} for media in MEDIA.values()}}}

    @router.get("/v1/pictures/{picture}", response_class=Response, responses=kinds)
    async def linked(
        picture: str,
        expires: Annotated[int, Query(ge=0, le=2**53)],
        signature: Annotated[str, Query(max_length=64)],
        quality: Annotated[int | None, Query(ge=0, le=100)] = None,
    ) -> Response:
        """The picture that a link in an answer names, for as long as the link holds."""
        found = _PICTURE.fullmatch(picture)
        if found is None or not service.links.holds(picture, expires, signature, quality):
            raise Refused(403, "this link has ended, or is not one that this service gave")
        generation = await asyncio.to_thread(service.generations.get, found[1])
        kind: Format = found[2]  # type: ignore[assignment]
        response = await _picture(service, generation, kind, quality)
        response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # whoever has the link may show the picture
        return response

    return router


async def _own(service: Service, request: Request, id: str) -> Generation:
    if _ID.fullmatch(id) is None:
        raise NotFound("generation: there is none of that id")
    generation = await asyncio.to_thread(service.generations.get, id, caller_of(request).lists)
    return generation


async def _picture(service: Service, generation: Generation, kind: Format, quality: int | None = None) -> Response:
    if generation.path is None or generation.deleted is not None:
        raise NotFound("the picture is kept no longer")
    body = await read(service, generation.path)
    if generation.blind:
        body = await asyncio.to_thread(pictures.bare, body)  # the file says which version drew it
    body = await asyncio.to_thread(pictures.encoded, body, kind, quality)
    return Response(body, media_type=MEDIA[kind], headers={"Cache-Control": "private, max-age=3600"})


def _said(generation: Generation) -> GenerationAnswer:
    blind = generation.blind
    return GenerationAnswer(
        generation=generation.id,
        prediction=generation.prediction_id,
        model=None if blind else generation.model,
        version=None if blind else generation.ref,
        digest=None if blind else generation.digest,
        prompt=generation.prompt,
        negative_prompt=generation.negative,
        seed=generation.seed,
        parameters=generation.parameters,
        width=generation.width,
        height=generation.height,
        sha256=generation.sha256,
        created=generation.created,
        kept_until=generation.kept_until,
        deleted=generation.deleted,
    )


async def _count(service: Service, said: Feedback) -> None:
    """Tell the metrics of it, by the version that it is about."""
    if said.pair is not None:
        model = (await asyncio.to_thread(service.generations.get, said.pair.left)).model
        service.metrics.told(model, "", "choice")
        return
    generation = await asyncio.to_thread(service.generations.get, said.generation or "")
    opinions: list[Opinion] = [name for name in OPINIONS if getattr(said, name) is not None]
    for opinion in [*opinions, *([said.thumb] if said.thumb else [])]:
        service.metrics.told(generation.model, generation.ref, opinion)
