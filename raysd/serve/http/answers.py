"""From an accepted request to the answer of the Images API: waiting for the end, its pictures, its events."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel

from raysd.errors import NotFound, RaysdError
from raysd.serve.drawing import Drawing
from raysd.serve.http import pictures
from raysd.serve.http.desk import Ended, Event, Preview
from raysd.serve.http.errors import Refused, fault, refusal
from raysd.serve.http.pictures import Format
from raysd.serve.http.service import Service
from raysd.serve.predictions import POLICY, Picture, Prediction

HEARTBEAT = 15.0
"""Seconds without an event after which a comment is sent: proxies take a silent connection for a dead one."""
NEVER_AGAIN = {"X-Should-Retry": "false"}
"""OpenAI's clients send again what got 409 or 500, unless told not to."""
LATE = "it was not drawn in time; ask for less, or try again"


@dataclass(frozen=True)
class Wanted:
    """How the pictures are to be handed over."""

    format: Format = "png"
    quality: int | None = None
    url: bool = False


class Image(BaseModel):
    """A picture. `generation` is what feedback is given to; `version` and `digest` say what drew it."""

    b64_json: str | None = None
    url: str | None = None
    generation: str
    seed: int
    version: str | None
    digest: str | None


class Images(BaseModel):
    created: int
    data: list[Image]
    size: str
    output_format: Format
    background: Literal["opaque"]


async def finished(
    service: Service, request: Request, prediction: Prediction, deadline: float, *, keep: bool
) -> Prediction:
    """The prediction once it has ended. Canceled at the deadline, and if the client goes away and does not `keep` it."""
    waiting = asyncio.ensure_future(service.desk.wait(prediction.id, max(0.0, deadline - time.time())))
    leaving = asyncio.ensure_future(_gone(request))
    stop = not keep  # also where this task is cancelled, which is how Ray Serve says that the client went away
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Refused(499, "the client went away")
        last = waiting.result()
        stop = not last.ended
        if stop:
            raise Refused(504, LATE)
        return last
    finally:
        if stop:
            service.later(service.desk.cancel(prediction.id))
        waiting.cancel()
        leaving.cancel()


def check(last: Prediction) -> Prediction:
    """A prediction that has its pictures. Raises Refused saying why it has none."""
    if last.status == "succeeded":
        if not last.pictures:
            raise Refused(404, "its pictures are kept no longer", headers=NEVER_AGAIN)
        return last
    if last.status == "failed":
        error = last.error or "drawing failed"
        # A size that it cannot draw, or what the classifier held back.
        asked_for_it = error.partition(":")[0].partition(" ")[0] in (*Drawing.model_fields, POLICY)
        raise Refused(400 if asked_for_it else 500, error, headers=NEVER_AGAIN)
    if last.deadline is not None and last.deadline <= time.time():
        raise Refused(504, LATE)
    raise Refused(409, "it was canceled", headers=NEVER_AGAIN)


async def images(service: Service, last: Prediction, wanted: Wanted, base: str) -> Images:
    """The answer with all pictures."""
    data = []
    for picture in last.pictures:
        image = Image(**described(last, picture))
        if wanted.url:
            url = base + service.links.to(f"{image.generation}.{wanted.format}", wanted.quality)
            data.append(image.model_copy(update={"url": url}))
        else:
            data.append(image.model_copy(update={"b64_json": await _encoded(service, picture, wanted)}))
    return Images(
        created=int(last.created), data=data, size=_size(last), output_format=wanted.format, background="opaque"
    )


async def stream(
    service: Service, prediction: Prediction, wanted: Wanted, kind: str, deadline: float, *, keep: bool
) -> AsyncIterator[str]:
    """Server-sent events `kind`.partial_image and `kind`.completed, as OpenAI's clients read them."""
    ended = False
    try:
        async with aclosing(_with_heartbeat(service.desk.events(prediction.id), deadline)) as events:
            async for event in events:
                if event is None:
                    yield ": still drawing\n\n"
                elif isinstance(event, Preview):
                    yield await _partial(event, prediction, wanted, kind)
                else:
                    ended = True
                    last = check(event.prediction)
                    for picture in last.pictures:
                        yield await _completed(service, last, picture, wanted, kind)
    except (Refused, RaysdError) as error:
        refused = error if isinstance(error, Refused) else refusal(error)
        said = fault(refused.status_code, str(refused.detail)).model_dump()
        yield _sse("error", {"type": "error", "error": said})
    finally:
        if not (ended or keep):
            service.later(service.desk.cancel(prediction.id))


def described(last: Prediction, picture: Picture) -> dict[str, Any]:
    """What is said of a picture besides the picture."""
    version = {"version": None, "digest": None} if last.blind else {"version": last.ref, "digest": last.digest}
    return {"generation": f"{last.id}-{picture.number}", "seed": picture.seed, **version}


def version_headers(prediction: Prediction) -> dict[str, str]:
    """Which version draws it, unless nobody may be told."""
    if prediction.blind:
        return {}
    return {"X-Raysd-Version": prediction.ref, "X-Raysd-Digest": prediction.digest}


async def read(service: Service, path: str) -> bytes:
    """A drawn picture's PNG. Raises NotFound."""
    try:
        return await service.desk.read(path)
    except NotFound:
        raise NotFound("the picture is kept no longer") from None  # the store's own message says where it lies


async def _encoded(service: Service, picture: Picture, wanted: Wanted) -> str:
    png = await read(service, picture.path)
    body = await asyncio.to_thread(pictures.encoded, png, wanted.format, wanted.quality)
    return base64.b64encode(body).decode()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with_heartbeat(events: AsyncIterator[Event], deadline: float) -> AsyncGenerator[Event | None]:
    """The events, and None where none came for a while. Raises Refused at the deadline."""
    following: asyncio.Future[Event] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(_next(events))
            await asyncio.wait({following}, timeout=min(HEARTBEAT, max(0.0, deadline - time.time())))
            if following.done():
                event, following = following.result(), None
                yield event
                if isinstance(event, Ended):
                    return
            elif time.time() >= deadline:
                raise Refused(504, LATE)
            else:
                yield None
    finally:
        if following is not None:
            following.cancel()


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def _partial(event: Preview, prediction: Prediction, wanted: Wanted, kind: str) -> str:
    body = await asyncio.to_thread(pictures.encoded, event.png, wanted.format, wanted.quality)
    about = {"partial_image_index": event.index, "image_index": event.number}
    return _event(f"{kind}.partial_image", base64.b64encode(body).decode(), prediction, wanted, about)


async def _completed(service: Service, last: Prediction, picture: Picture, wanted: Wanted, kind: str) -> str:
    # Tokens are not what this service counts in, but the type has them.
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    details = {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
    about = {"image_index": picture.number, "usage": usage | details, **described(last, picture)}
    return _event(f"{kind}.completed", await _encoded(service, picture, wanted), last, wanted, about)


def _event(name: str, b64_json: str, prediction: Prediction, wanted: Wanted, about: dict[str, Any]) -> str:
    plain = {"background": "opaque", "quality": "auto", "output_format": wanted.format, "size": _size(prediction)}
    created = int(prediction.created)
    return _sse(name, {"type": name, "b64_json": b64_json, "created_at": created, **plain, **about})


def _sse(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _size(prediction: Prediction) -> str:
    if prediction.pictures:
        return f"{prediction.pictures[0].width}x{prediction.pictures[0].height}"
    width, height = prediction.drawing.get("width"), prediction.drawing.get("height")
    return f"{width}x{height}" if width and height else "auto"
