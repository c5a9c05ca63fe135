"""Pictures of nothing in particular: gradients, blobs, outlines and lines in any colours.

The autoencoder sees some, so that it also carries pictures that the renderer could not have drawn.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 4
Colour = tuple[int, int, int]


def _colour(rng: Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _gradient(side: int, rng: Random) -> Image.Image:
    """A linear change between two colours in any direction."""
    y, x = np.mgrid[0:side, 0:side] / side
    weight = np.clip(0.5 + rng.uniform(-1, 1) * (x - 0.5) + rng.uniform(-1, 1) * (y - 0.5), 0, 1)[..., None]
    first, second = np.array(_colour(rng)), np.array(_colour(rng))
    return Image.fromarray((first * weight + second * (1 - weight)).astype(np.uint8))


def _box(side: int, rng: Random) -> tuple[float, float, float, float]:
    """A box that may reach over the edge; small ones (eyes, dots) are as likely as large ones."""
    width, height = (side * rng.choice([0.06, 0.12, 0.25, 0.5]) * rng.uniform(0.6, 1.4) for _ in range(2))
    x, y = rng.uniform(-0.1, 1) * side, rng.uniform(-0.1, 1) * side
    return x, y, x + width, y + height


def _mark(draw: ImageDraw.ImageDraw, side: int, rng: Random) -> None:
    """One blob, outlined blob, box, arc or line."""
    box, width = _box(side, rng), round(side * rng.uniform(0.015, 0.06))
    kind = rng.randrange(5)
    if kind == 0:
        draw.ellipse(box, fill=_colour(rng))
    elif kind == 1:
        draw.ellipse(box, fill=_colour(rng), outline=_colour(rng), width=width)
    elif kind == 2:
        draw.rectangle(box, fill=_colour(rng))
    elif kind == 3:
        draw.arc(box, rng.randrange(360), rng.randrange(360), fill=_colour(rng), width=width)
    else:
        draw.line(box, fill=_colour(rng), width=width)


def clutter(resolution: int, rng: Random) -> Image.Image:
    """An RGB picture of 3 to 20 marks on a gradient, sometimes blurred."""
    side = resolution * SUPERSAMPLING
    canvas = _gradient(side, rng)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(3, 20)):
        _mark(draw, side, rng)
    if rng.random() < 0.2:
        canvas = canvas.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.005, 0.05)))
    return canvas.reduce(SUPERSAMPLING)
