"""OpenAI's Images API: pictures from a prompt, and edits of a picture, at once or as a stream of events."""

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BeforeValidator, Field, model_validator

from raysd.serve.drawing import Drawing
from raysd.serve.http import pictures
from raysd.serve.http.answers import Images, Wanted, check, finished, images, stream, version_headers
from raysd.serve.http.asking import Told, fingerprint, hold, submit, told_by
from raysd.serve.http.errors import OPENAI
from raysd.serve.http.pictures import Format
from raysd.serve.http.service import Service, caller_of, may
from raysd.serve.http.wire import Addressed, User, drawing, field_of


def _not(why: str, *values: str) -> BeforeValidator:
    """Says why a value that OpenAI has cannot be had here."""

    def check(given: object) -> object:
        if given in values:
            raise ValueError(f"{given}: {why}")
        return given

    return BeforeValidator(check)


def _absent(given: object) -> object:
    if given is not None:
        raise ValueError("belongs to output_format gif or svg, which are not drawn here; leave it out")
    return given


Absent = Annotated[None, BeforeValidator(_absent)]
"""What goes with such a value: the client may send null."""
NotDrawn = _not("what is drawn is one picture of pixels; png, jpeg or webp", "gif", "svg")
Opaque = _not("no model here draws transparency; opaque or auto", "transparent")


class ImageRequest(Addressed):
    """What generations and edits share: OpenAI's fields, and those of raysd that they have none for."""

    n: int | None = field_of("count")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    """A url holds for a while, for anybody who has it."""
    output_format: Annotated[Format, NotDrawn] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of jpeg and webp."""
    stream: bool | None = False
    """Answer with server-sent events."""
    partial_images: int | None = field_of("partial_images")
    safety_identifier: User | None = None
    """The same, and goes before `user`."""
    background: Annotated[Literal["opaque", "auto"], Opaque] | None = "auto"
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = "auto"
    """Changes nothing: more steps draw better (num_inference_steps)."""
    style: Literal["vivid", "natural"] | None = None
    """Changes nothing: the prompt says how it is to look."""
    complexity: Literal["low", "medium", "high"] | None = None
    """Changes nothing: no picture is planned before it is drawn."""
    moderation: Literal["low", "auto"] | None = "auto"
    """Changes nothing: the service alone says what is held back."""
    frame_count: Absent = None
    frame_duration_ms: Absent = None
    svg: Absent = None

    @model_validator(mode="after")
    def _goes_together(self) -> "ImageRequest":
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: needs stream")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: a stream carries b64_json")
        if self.output_compression is not None and self.output_format in (None, "png"):
            raise ValueError("output_compression: needs output_format jpeg or webp")
        return self


class EditRequest(ImageRequest):
    """The form of an edit. One picture, as `image` or `image[]`."""

    image: list[UploadFile] = Field(default_factory=list, max_length=1)
    images: list[UploadFile] = Field(default_factory=list, max_length=1, alias="image[]")
    mask: UploadFile | None = None
    """Of the size of `image`: where it is fully transparent, the picture is drawn anew."""
    strength: float | None = field_of("strength")
    input_fidelity: Literal["high", "low"] | None = None
    """Changes nothing: strength says how much of the picture stays."""

    @model_validator(mode="after")
    def _has_one(self) -> "EditRequest":
        if len(self.image) + len(self.images) != 1:
            raise ValueError("image: give one picture")
        return self


def routes(service: Service) -> APIRouter:
    """POST /v1/images/generations and /v1/images/edits."""
    events = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    router = APIRouter(tags=["images"], dependencies=[may("generate")], responses={200: events, **OPENAI})

    @router.post("/v1/images/generations", response_model=Images)
    async def generations(request: Request, asked: ImageRequest, told: Annotated[Told, Depends(told_by)]) -> Response:
        """Draw pictures."""
        wanted = drawing(asked, service.spec, **asked.pixels())
        return await _draw(service, request, asked, told, wanted, "image_generation")

    @router.post("/v1/images/edits", response_model=Images)
    async def edits(
        request: Request,
        asked: Annotated[EditRequest, Form(media_type="multipart/form-data")],
        told: Annotated[Told, Depends(told_by)],
    ) -> Response:
        """Draw a picture anew, all of it or where the mask is transparent."""
        await hold(service, request, told.idempotency_key, asked.model)
        image, mask = await _uploads(service, caller_of(request).owner, asked)
        wanted = drawing(asked, service.spec, image=image, mask=mask, **asked.pixels())
        return await _draw(service, request, asked, told, wanted, "image_edit")

    return router


async def _uploads(service: Service, owner: str | None, asked: EditRequest) -> tuple[str, str | None]:
    (picture,) = asked.image or asked.images
    image, size = await service.aside.decode(pictures.upload, await picture.read(), "image")
    if asked.mask is None:
        return await service.desk.keep_upload(image, owner), None
    mask = await service.aside.decode(pictures.transparent_mask, await asked.mask.read(), "mask", size)
    return await service.desk.keep_upload(image, owner), await service.desk.keep_upload(mask, owner)


async def _draw(
    service: Service, request: Request, asked: ImageRequest, told: Told, wanted: Drawing, kind: str
) -> Response:
    deadline = time.time() + service.spec.wait_seconds
    body = fingerprint(kind, asked, wanted.image, wanted.mask)
    prediction = await submit(
        service,
        request,
        told,
        api="openai",
        model=asked.model,
        drawing=wanted,
        user=asked.safety_identifier or asked.user,
        lora=asked.lora,
        deadline=deadline,
        body=body,
    )
    headers = version_headers(prediction)
    look = Wanted(asked.output_format or "png", asked.output_compression, asked.response_format == "url")
    # Who gave a key may come back for it; for anybody else nobody would ever fetch the pictures.
    keep = told.idempotency_key is not None
    if asked.stream:
        events = stream(service, prediction, look, kind, deadline, keep=keep)
        unbuffered = headers | {"X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=unbuffered)
    ended = check(await finished(service, request, prediction, deadline, keep=keep))
    made = await images(service, ended, look, service.base(request))
    return JSONResponse(made.model_dump(exclude_unset=True), headers=headers)
