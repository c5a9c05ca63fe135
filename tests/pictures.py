"""Pictures for tests, made by numpy: the same seed gives the same picture."""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 128, height: int | None = None) -> Image.Image:
    """A cloudy colour picture with the spectrum of photographs (amplitude 1/f)."""
    return _cloudy(seed, width, height or width).copy()


@lru_cache(maxsize=512)
def _cloudy(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    falloff = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    falloff[0, 0] = 1
    common = rng.normal(size=(height, width))
    channels = []
    for _ in range(3):
        values = np.fft.ifft2(np.fft.fft2(common + 0.5 * rng.normal(size=(height, width))) / falloff).real
        channels.append(128 + 25 * rng.normal() + 45 * (values - values.mean()) / values.std())
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def noise(seed: int, side: int = 128) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    body = io.BytesIO()
    picture.save(body, kind, **options)
    return body.getvalue()


def scanned(count: int, picture: Image.Image | None = None) -> bytes:
    """A JPEG of one brightness, or of `picture`, which says the last of its scans so many times more."""
    body = encoded(picture or Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = body.rindex(b"\xff\xda")
    return body[:-2] + body[last:-2] * count + body[-2:]


@lru_cache(maxsize=512)
def _png(seed: int, side: int) -> bytes:
    return encoded(photo(seed, side))


def folder(root: Path, count: int = 6, captions: bool = True, first: int = 0, side: int = 128) -> Path:
    """`count` different photos `p0.png`, … with captions beside them."""
    root.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        (root / f"p{index}.png").write_bytes(_png(index, side))
        if captions:
            (root / f"p{index}.txt").write_text(f"a photo number {index}")
    return root
