"""One picture: from bytes that nobody vouches for to upright RGB."""

import hashlib
import io
import re
import threading
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from raysd.data.place import read_bytes
from raysd.errors import DataError
from raysd.words import shown

MAX_PIXELS = 100_000_000
"""A larger picture is taken for a decompression bomb (RGB of this size is 300 MB)."""
MAX_BYTES = 128 * 2**20
"""Largest file of a picture."""
LARGE = 16_000_000
"""Pictures of more pixels are decoded one at a time, so that a pool of threads has bounded memory."""

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that run: by content, whatever the suffix says. Others are not even tried."""
MOST_SCANS = 100
"""Of a JPEG. Progressive ones have about ten; each costs a pass over all pixels, however few bytes it is written in."""
MOST_SEGMENTS = 10_000
"""Of a JPEG: scans, tables, and metadata in pieces of up to 64 KiB."""
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""How one begins. The other markers (restarts, escaped bytes of pixels) have no length, and decoders pass over them."""
_END, _SCAN = 0xD9, 0xDA

_one_large = threading.Lock()


class Decoded(NamedTuple):
    """An upright RGB picture, and the upright (width, height) that its file has (a reduced decode is smaller)."""

    picture: Image.Image
    size: tuple[int, int]


def read_picture(path: str, limit_pixels: int = MAX_PIXELS, digest: str | None = None) -> Image.Image:
    """The picture at a local path or fsspec URL as RGB: upright, alpha flattened on white, CMYK converted.

    Raises DataError naming the path where it is no JPEG, PNG or WebP, is damaged, has more than `limit_pixels`, or is
    not the file of this sha256.
    """
    body = read_bytes(path, MAX_BYTES)
    try:
        if digest is not None and hashlib.sha256(body).hexdigest() != digest:
            raise DataError("changed since the run began; put it back, or start a new run")
        return decode(body, limit_pixels).picture
    except DataError as error:
        end = path if len(path) <= 80 else "…" + path[-79:]  # the file's name says more than where the folder lies
        raise DataError(f"{shown(end)}: {error}") from None


def decode(body: bytes, limit_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Decoded:
    """Bytes to upright RGB. With `at_least`, a large JPEG may come smaller, no side below that (cheaper to decode).

    Raises DataError with the reason.
    """
    picture = _open(body)
    pixels = picture.width * picture.height
    if pixels > limit_pixels:
        raise DataError(f"{picture.width}x{picture.height} is more than {limit_pixels:,} pixels")
    if picture.format in ("JPEG", "MPO"):
        _check_scans(body)
    if pixels <= LARGE:
        return _load(picture, at_least)
    with _one_large:
        return _load(picture, at_least)


def _open(body: bytes) -> Image.Image:
    """The header alone: Pillow decodes pixels only when they are asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(body), formats=FORMATS)
    except Image.DecompressionBombError:
        raise DataError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # a broken header raises OSError, SyntaxError, ValueError, struct.error …
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({_reason(error)})"
        raise DataError("empty" if not body else f"not a readable JPEG, PNG or WebP{reason}") from None


def _check_scans(body: bytes) -> None:
    """Raises DataError for a JPEG that takes many times longer to decode than one of its size does.

    Goes through it as decoders do, up to the end of the first picture: thumbnails lie within segments, further pictures
    and films behind it.
    """
    at, scans = len(b"\xff\xd8"), 0
    for _ in range(MOST_SEGMENTS):
        found = _SEGMENT.search(body, at)
        if found is None or body[found.start() + 1] == _END:
            return
        scans += body[found.start() + 1] == _SCAN
        if scans > MOST_SCANS:
            raise DataError(f"more than {MOST_SCANS} scans; save it anew")
        at = found.end() + max(2, int.from_bytes(body[found.end() : found.end() + 2], "big"))
    raise DataError(f"more than {MOST_SEGMENTS:,} segments; save it anew")


def _load(picture: Image.Image, at_least: int | None) -> Decoded:
    width, height = picture.size
    try:
        if at_least is not None and picture.format in ("JPEG", "MPO"):
            picture.draft(None, (at_least, at_least))
        picture.load()
        sideways = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        rgb = _rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # decoders raise whatever their format's module raises
        raise DataError(f"damaged ({_reason(error)})") from None
    return Decoded(rgb, (height, width) if sideways else (width, height))


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, 16 bits are scaled to 8 (Pillow's convert would clip them)."""
    if picture.mode.startswith("I") or picture.mode == "F":
        scaled = np.clip(np.asarray(picture, dtype=np.float32) / 257, 0, 255).round().astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _reason(error: Exception) -> str:
    return shown(str(error) or type(error).__name__, 60)
