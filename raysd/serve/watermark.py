"""An invisible mark in a picture: the first 32 bits of the digest of the version that drew it.

Why no network: most of those published (HiDDeN, Stable Signature, WAM) come as pickles or TorchScript, which run code
when they are loaded, and want torchvision or OpenCV. RivaGAN comes as ONNX: tried on pictures of 256 pixels, it read 27
to 32 of 32 bits right before any loss, at 42 dB and a second a picture. Quantised DCT coefficients need no weights: all
bits right after JPEG of quality 90, at 48 dB and some milliseconds, and what JPEG does to them can be computed. The mark
is made to survive saving, not an enemy: it is lost where a picture is scaled, turned, or cropped off the grid of 8
pixels. What is written in the PNG itself says more, and is lost more easily.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn, idctn

from raysd.errors import RequestError

BITS = 32
AGREE = 29
"""Bits that must be right for a mark to be taken for a version's: by chance one of 780,000 pictures has so many."""
BLOCK = 8
"""Side of JPEG's blocks, whose grid the mark shares."""
PLACES = ((1, 1), (0, 2), (2, 0), (1, 2))
"""Coefficients of a block that carry the mark: low enough to be kept by JPEG, high enough not to be seen."""
STEP = 12.0
"""Distance of two equal values of a coefficient. A coefficient is read rightly if it is off by less than a quarter of
this, 3; JPEG at quality 90 quantises these with steps of 2 to 3, and so moves them by 1.5 at most."""
LEAST_BLOCKS = 32
"""Of a picture that is marked: four coefficients a bit."""
ROUNDS = 3
_LUMA = np.array([0.299, 0.587, 0.114])
"""Y of RGB (ITU-R BT.601), as JPEG has it."""

Floats = NDArray[np.float64]


def message(digest: str) -> NDArray[np.int8]:
    """The first 32 bits of a digest in hexadecimal, the highest first. [32] of 0 and 1"""
    value = int(digest[: BITS // 4], 16)
    return np.array([value >> (BITS - 1 - bit) & 1 for bit in range(BITS)], dtype=np.int8)


def mark(image: Image.Image, digest: str) -> Image.Image:
    """The picture with a version's mark, by quantisation index modulation (Chen & Wornell 2001, sec. IV) of luminance.

    Raises RequestError for a picture of less than 32 blocks of 8 x 8 pixels.
    """
    picture = np.asarray(image.convert("RGB"), dtype=np.float64)  # [H, W, 3]
    height, width = picture.shape[0] // BLOCK * BLOCK, picture.shape[1] // BLOCK * BLOCK
    if height * width < LEAST_BLOCKS * BLOCK * BLOCK:
        raise RequestError(
            f"width {image.width}: {image.width}x{image.height} is too small to be marked; ask for 64x64"
        )
    inner = picture[:height, :width]
    offsets = _offsets(height // BLOCK, width // BLOCK, message(digest))
    for _ in range(ROUNDS):  # make room where the change would leave 0 to 255: else white and black lose the mark
        room = np.abs(_change(inner, offsets))
        room = _spread(_blocks(room).max(axis=(2, 3)))[..., None]
        inner = np.clip(inner, room, 255 - room)
    inner = inner + _change(inner, offsets)[..., None]
    marked = np.asarray(image.convert("RGB")).copy()
    marked[:height, :width] = np.clip(np.rint(inner), 0, 255).astype(np.uint8)
    return Image.fromarray(marked)


def read(image: Image.Image) -> NDArray[np.int8]:
    """The 32 bits that the picture says, by the sum of its coefficients' votes; of an unmarked one they mean nothing."""
    picture = np.asarray(image.convert("RGB"), dtype=np.float64)
    height, width = picture.shape[0] // BLOCK * BLOCK, picture.shape[1] // BLOCK * BLOCK
    coefficients = _coefficients(picture[:height, :width])
    bits, signs = _plan(*coefficients.shape[:2])
    votes = signs * np.sin(2 * np.pi * coefficients / STEP)
    return (np.bincount(bits.ravel(), votes.ravel(), BITS) > 0).astype(np.int8)


def drawn_by(image: Image.Image, digest: str) -> bool:
    """Whether the picture bears the mark of that version."""
    return int((read(image) == message(digest)).sum()) >= AGREE


def _change(picture: Floats, offsets: Floats) -> Floats:
    """What is to be added to each channel for the nearest coefficients that say the message. [H, W]"""
    now = _coefficients(picture)
    wanted = np.rint((now - offsets) / STEP) * STEP + offsets
    height, width = picture.shape[0] // BLOCK, picture.shape[1] // BLOCK
    change = np.zeros((height, width, BLOCK, BLOCK))
    for number, (row, column) in enumerate(PLACES):
        change[:, :, row, column] = (wanted - now)[..., number]
    pixels = idctn(change, axes=(2, 3), norm="ortho")
    return pixels.transpose(0, 2, 1, 3).reshape(height * BLOCK, width * BLOCK)


def _coefficients(picture: Floats) -> Floats:
    """Those of `PLACES` in each block's luminance. [H, W, 3] -> [H/8, W/8, 4]"""
    frequencies = dctn(_blocks(picture @ _LUMA), axes=(2, 3), norm="ortho")
    return np.stack([frequencies[:, :, row, column] for row, column in PLACES], axis=-1)


def _blocks(plane: Floats) -> Floats:
    """[H, W] -> [H/8, W/8, 8, 8]"""
    height, width = plane.shape
    return plane.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(0, 2, 1, 3)


def _spread(values: Floats) -> Floats:
    """One value a block -> one a pixel."""
    return values.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def _offsets(rows: int, columns: int, bits: NDArray[np.int8]) -> Floats:
    """Where in a step each coefficient has to lie: a quarter above for 1, a quarter below for 0, or turned round."""
    which, signs = _plan(rows, columns)
    return np.asarray((2.0 * bits[which] - 1) * signs * STEP / 4)


@lru_cache(maxsize=8)
def _plan(rows: int, columns: int) -> tuple[NDArray[np.int64], Floats]:
    """Which bit each coefficient carries, and whether it is turned round. [rows, columns, 4] each

    The turns make that flat pictures show no pattern, and that unmarked ones (coefficients of 0) say nothing in common.
    They are SHAKE-256's, which no library's release changes. Every bit has its share of each kind of coefficient.
    """
    count = rows * columns * len(PLACES)
    noise = np.frombuffer(hashlib.shake_256(b"raysd watermark 1").digest(count), dtype=np.uint8)
    block = np.arange(rows * columns)[:, None]
    bits = (block + 8 * np.arange(len(PLACES))[None]) % BITS
    shape = (rows, columns, len(PLACES))
    return bits.reshape(shape).astype(np.int64), ((noise & 1) * 2.0 - 1).reshape(shape).astype(np.float64)
