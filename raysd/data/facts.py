"""What is kept of a picture after one pass over its bytes: a few numbers, about 1.5 KB, never the picture."""

import hashlib
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raysd.data.picture import MAX_BYTES, decode
from raysd.data.place import read_bytes

Floats = NDArray[np.float32]

WORKING_SIDE = 256
"""Blur and hash are measured with the shorter side reduced to this, so that they mean the same at every size."""
THUMB = 8
TAPS = 9
"""Width of the blur that `blur` compares with, at the working size (Crete et al. 2007)."""
STEP = 2
"""Changes between neighbours up to this (of 255) are rounding, which makes stairs of smooth slopes."""
CELLS, DIRECTIONS, LEVELS = 4, 8, 4
COLOUR, TEXTURE = slice(0, 64), slice(192, 201)
"""Parts of the features; layout lies between them."""


@dataclass(frozen=True)
class Facts:
    """One readable picture."""

    id: str
    """sha256 of the file's bytes."""
    width: int
    height: int
    """Upright, in pixels."""
    hash: int
    """64 bits of perceptual hash (DCT of the brightness)."""
    thumb: NDArray[np.int16]
    """[8, 8, 3] mean colours, 0 to 255."""
    blur: float
    """0 sharp to 1 blurred or blank."""
    features: Floats
    """[201] of length 1: see `features`."""


def measure(path: str, store: Any = None) -> Facts:
    """Read a picture once and measure it. Raises DataError with the reason where it cannot be used."""
    body = read_bytes(path, MAX_BYTES, store)
    picture, (width, height) = decode(body, at_least=2 * WORKING_SIDE)
    small = _reduced(picture)
    bits = np.packbits(imagehash.phash(small).hash.flatten())
    thumb = np.asarray(small.resize((THUMB, THUMB), Image.Resampling.BOX), dtype=np.int16)
    identity = hashlib.sha256(body).hexdigest()
    return Facts(identity, width, height, int.from_bytes(bits.tobytes()), thumb, blur(small), features(small))


def blur(picture: Image.Image) -> float:
    """0 sharp to 1 blurred or blank: how little of the change between neighbours a further blur takes away.

    The measure of Crete et al. 2007 (The blur effect, equations 1 to 8). Unlike the variance of the Laplacian it
    depends neither on contrast nor on how many edges there are: a flat drawing with crisp edges is sharp.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    # The colour that varies most, not brightness: blue on purple of the same brightness has edges too.
    plane = pixels[..., int(np.argmax(pixels.var(axis=(0, 1))))]
    if min(plane.shape) <= TAPS or float(plane.var()) < 1.0:
        return 1.0
    return max(_blur_along(plane), _blur_along(plane.T))


def _blur_along(plane: Floats) -> float:
    sums = np.cumsum(np.pad(plane, ((TAPS // 2 + 1, TAPS // 2), (0, 0)), mode="edge"), axis=0, dtype=np.float64)
    smooth = (sums[TAPS:] - sums[:-TAPS]) / TAPS
    change, changed = np.abs(np.diff(plane, axis=0)), np.abs(np.diff(smooth, axis=0))
    seen = change > STEP
    lost = np.maximum(0, change - changed)[seen].sum()
    return float(1 - lost / change[seen].sum()) if seen.any() else 1.0


def features(picture: Image.Image) -> Floats:
    """[201] = roots of three histograms, together of length 1: colours (4x4x4), gradient directions in 4x4 cells (8),
    strength of fine detail (9 powers of two).

    Roots of shares make the dot product a mean Bhattacharyya coefficient: 1 for equal histograms, 0 for disjoint ones.
    Cheap and the same on every machine; it sees colour, layout and texture, not meaning.
    """
    pixels = np.asarray(picture.resize((64, 64), Image.Resampling.BOX), dtype=np.float32)
    level = np.minimum(pixels // (256 / LEVELS), LEVELS - 1).astype(np.int64)
    colours = np.bincount((level @ np.array([LEVELS**2, LEVELS, 1])).ravel(), minlength=LEVELS**3)
    parts = [colours, _directions(pixels.mean(axis=2)), _detail(np.asarray(picture.convert("L"), dtype=np.float32))]
    return np.concatenate([np.sqrt(part / part.sum() / len(parts)) for part in parts]).astype(np.float32)


def _directions(grey: Floats) -> NDArray[Any]:
    """[4 * 4 * 8] gradient magnitude by cell and direction; a floor keeps flat pictures from being all noise."""
    down, across = np.gradient(grey)
    turn = np.floor((np.arctan2(down, across) % np.pi) / np.pi * DIRECTIONS).astype(np.int64) % DIRECTIONS
    rows, columns = np.indices(grey.shape) * CELLS // grey.shape[0]
    place = (rows * CELLS + columns) * DIRECTIONS + turn
    weights = np.hypot(down, across)
    return np.bincount(place.ravel(), weights.ravel(), minlength=CELLS**2 * DIRECTIONS) + 1.0


def _detail(grey: Floats) -> NDArray[Any]:
    """[9] how many pixels differ from their neighbours by 0, 1, 2 to 3, 4 to 7 … of 255; noise is all at the end."""
    steps = np.concatenate([np.abs(np.diff(grey, axis=0)).ravel(), np.abs(np.diff(grey, axis=1)).ravel()])
    return np.bincount(np.ceil(np.log2(steps + 1)).astype(np.int64), minlength=9)[:9] + 1.0


def _reduced(picture: Image.Image) -> Image.Image:
    factor = WORKING_SIDE / min(picture.size)
    if factor >= 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
