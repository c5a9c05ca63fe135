"""Pictures that come in, which nobody vouches for, and the formats in which they go out."""

import base64
import binascii
import io
from typing import Literal

from PIL import Image, ImageOps

from raysd.data.picture import FORMATS, decode
from raysd.errors import DataError, RequestError
from raysd.serve.drawing import LARGEST_SIDE

MOST_PIXELS = 4096 * 4096
"""Of an upload. Larger ones than can be drawn are made smaller."""
QUALITY = 95
"""Of jpeg and webp that no quality was asked for, of 100."""
Format = Literal["png", "jpeg", "webp"]
MEDIA: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def upload(body: bytes, field: str) -> tuple[bytes, tuple[int, int]]:
    """A picture as PNG of its pixels alone (upright, RGB, no side above what can be drawn), and the size that it came in.

    Raises RequestError naming the field for what is no JPEG, PNG or WebP, is damaged or too large.
    """
    picture = _decoded(body, field)
    size = picture.size
    return _png(_fitted(picture)), size


def mask(body: bytes, field: str, size: tuple[int, int]) -> bytes:
    """A mask whose white is drawn anew, as PNG. Raises RequestError where it is not of the picture's size."""
    picture = _decoded(body, field).convert("L")
    _check_size(picture, field, size)
    return _png(_fitted(picture))


def transparent_mask(body: bytes, field: str, size: tuple[int, int]) -> bytes:
    """The same of a mask as OpenAI has it: what is fully transparent is drawn anew."""
    _decoded(body, field)  # whether it is a picture at all, and not too large
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(body), formats=FORMATS))
    if not picture.has_transparency_data:
        raise RequestError(f"{field}: has no transparency; make what is to be drawn anew transparent (alpha 0)")
    _check_size(picture, field, size)
    alpha = picture.convert("RGBA").getchannel("A")
    return _png(_fitted(alpha.point([255] + [0] * 255)))


def from_data_uri(text: str, field: str) -> bytes:
    """The bytes of data:[type][;base64],… Raises RequestError."""
    head, comma, data = text.partition(",")
    if not (head.startswith("data:") and comma and head.endswith(";base64")):
        raise RequestError(f"{field}: give a picture as data:image/png;base64,… or as a URL that /v1/files answered")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{field}: what follows base64, is not base64") from None


def encoded(png: bytes, kind: Format, quality: int | None = None) -> bytes:
    """A drawn picture in another format. What is written in the PNG (version, seed) is not in the others."""
    if kind == "png":
        return png
    body = io.BytesIO()
    Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB").save(
        body, kind.upper(), quality=QUALITY if quality is None else quality
    )
    return body.getvalue()


def bare(png: bytes) -> bytes:
    """A drawn picture without what is written in its file."""
    return _png(Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB"))


def _decoded(body: bytes, field: str) -> Image.Image:
    try:
        return decode(body, MOST_PIXELS).picture
    except DataError as error:
        raise RequestError(f"{field}: {error}") from None


def _check_size(picture: Image.Image, field: str, size: tuple[int, int]) -> None:
    if picture.size != size:
        (width, height), (its_width, its_height) = size, picture.size
        raise RequestError(f"{field}: is {its_width}x{its_height}, the picture {width}x{height}; make them the same")


def _fitted(picture: Image.Image) -> Image.Image:
    if max(picture.size) <= LARGEST_SIDE:
        return picture
    nearest = picture.mode == "L"  # a mask stays black and white
    picture = picture.copy()
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)
    return picture


def _png(picture: Image.Image) -> bytes:
    body = io.BytesIO()
    bare = Image.frombytes(picture.mode, picture.size, picture.tobytes())  # no text, profile or date of the upload
    bare.save(body, "PNG", compress_level=1)
    return body.getvalue()
