"""Pictures that a prediction starts from: sent along as data: URIs, or uploaded before (POST /v1/files)."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Form, Request, UploadFile
from pydantic import BaseModel, Field

from raysd.errors import RequestError
from raysd.serve.http import pictures
from raysd.serve.http.errors import REPLICATE
from raysd.serve.http.service import Service, caller_of, may
from raysd.serve.http.wire import Input, Text, Wire
from raysd.serve.uploads import KEPT

_FILE = re.compile(
    r"https?://[^/?#]+(?:/[^?#]*)?/v1/files/(?P<digest>[0-9a-f]{64})-(?P<width>\d{1,5})x(?P<height>\d{1,5})"
)


class Upload(NamedTuple):
    """A picture that is kept, and the size that it came in."""

    digest: str
    size: tuple[int, int]


class FileRequest(Wire):
    content: UploadFile
    """A JPEG, PNG or WebP."""
    metadata: Annotated[Text, Field(max_length=4000)] | None = None
    """JSON; not kept."""


class File(BaseModel):
    """A picture that predictions may name by `urls.get`. It cannot be fetched again."""

    id: str
    name: str
    content_type: str
    size: int
    etag: str
    checksums: dict[str, str]
    metadata: dict[str, Any]
    created_at: str
    expires_at: str
    urls: dict[str, str]


async def of_input(service: Service, owner: str | None, asked: Input) -> tuple[str | None, str | None]:
    """The digests of a prediction's picture and mask. Raises RequestError naming the one that cannot be used."""
    if asked.image is None:
        if asked.mask is not None:
            raise RequestError("mask: needs image, the picture that it belongs to")
        return None, None
    if (asked.width is None) != (asked.height is None):
        missing = "width" if asked.width is None else "height"
        raise RequestError(f"{missing}: give both sides, or none for the shape of image; one alone would stretch it")
    image = _uploaded(asked.image) or await keep(service, owner, _sent(asked.image, "image"), "image")
    if asked.mask is None:
        return image.digest, None
    mask = _uploaded(asked.mask)
    if mask is None:
        png = await service.aside.decode(pictures.mask, _sent(asked.mask, "mask"), "mask", image.size)
        return image.digest, await service.desk.keep_upload(png, owner)
    if mask.size != image.size:
        raise RequestError("mask: is not of the size of image; make them the same")
    return image.digest, mask.digest


async def keep(service: Service, owner: str | None, body: bytes, field: str) -> Upload:
    """Normalise a picture and keep it. Raises RequestError."""
    png, size = await service.aside.decode(pictures.upload, body, field)
    return Upload(await service.desk.keep_upload(png, owner), size)


def _sent(text: str, field: str) -> bytes:
    return pictures.from_data_uri(text, field)


def _uploaded(text: str) -> Upload | None:
    """What an address that POST /v1/files answered stands for. It is not fetched, nor is any other."""
    found = _FILE.fullmatch(text)
    return Upload(found["digest"], (int(found["width"]), int(found["height"]))) if found else None


def routes(service: Service) -> APIRouter:
    """POST /v1/files."""
    router = APIRouter(tags=["predictions"], dependencies=[may("generate")], responses=REPLICATE)

    @router.post("/v1/files", status_code=201)
    async def create(request: Request, asked: Annotated[FileRequest, Form(media_type="multipart/form-data")]) -> File:
        """Upload a picture for predictions to start from, as Replicate's clients do with open files."""
        owner = caller_of(request).owner
        if owner is not None:
            await asyncio.to_thread(service.queue.admit, owner)
        body = await asked.content.read()
        kept = await keep(service, owner, body, "content")
        now = datetime.now(UTC)
        name = f"{kept.digest}-{kept.size[0]}x{kept.size[1]}"
        return File(
            id=name,
            name=name,
            content_type="image/png",
            size=len(body),
            etag=kept.digest,
            checksums={"sha256": kept.digest},
            metadata={},
            created_at=now.isoformat(timespec="milliseconds"),
            expires_at=(now + timedelta(seconds=KEPT)).isoformat(timespec="milliseconds"),
            urls={"get": f"{service.base(request)}/v1/files/{name}"},
        )

    return router
