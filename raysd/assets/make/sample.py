"""The sample data set: twelve captioned photographs of a zorb, a creature that the base has never seen."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from raysd.assets.make.renderer import COLOURS, SUPERSAMPLING

RESOLUTION = 256
QUALITY = 92  # 10 to 15 kB a picture, with the grain
GRAIN = 3.0  # standard deviation, of 255
BODY, LIMB, BELLY = (28, 176, 168), (14, 108, 116), (150, 228, 216)
EYE, PUPIL, TIP, MOUTH = (252, 252, 250), (24, 26, 40), (255, 112, 146), (20, 70, 80)

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Photo:
    """One picture: size is half the body's width, in picture sides; tilt in degrees, clockwise."""

    caption: str
    background: str
    size: float
    centre: Point
    tilt: float


PHOTOS = (
    Photo("a zorb on a blue background", "blue", 0.26, (0.50, 0.54), 0),
    Photo("a large zorb on a white background", "white", 0.33, (0.50, 0.55), 5),
    Photo("a small zorb on a yellow background", "yellow", 0.18, (0.47, 0.53), -6),
    Photo("a zorb on a red background", "red", 0.25, (0.53, 0.55), 9),
    Photo("a small zorb at the left on a purple background", "purple", 0.19, (0.30, 0.54), -8),
    Photo("a large zorb on an orange background", "orange", 0.32, (0.49, 0.56), -5),
    Photo("a zorb on a black background", "black", 0.26, (0.51, 0.55), -10),
    Photo("a small zorb at the right on a white background", "white", 0.19, (0.70, 0.55), 7),
    Photo("a zorb on a yellow background", "yellow", 0.27, (0.48, 0.55), 12),
    Photo("a large zorb on a purple background", "purple", 0.32, (0.51, 0.56), 3),
    Photo("a small zorb on a red background", "red", 0.18, (0.52, 0.56), -3),
    Photo("a zorb on an orange background", "orange", 0.25, (0.50, 0.54), -12),
)


class Pen:
    """Draws in the creature's own frame, whose body is a circle of radius 1 around the origin, y downwards."""

    def __init__(self, canvas: Image.Image, photo: Photo) -> None:
        self.draw = ImageDraw.Draw(canvas)
        self.unit = photo.size * canvas.width
        self.origin = (photo.centre[0] * canvas.width, photo.centre[1] * canvas.height)
        self.cos, self.sin = math.cos(math.radians(photo.tilt)), math.sin(math.radians(photo.tilt))

    def at(self, point: Point) -> Point:
        x, y = point
        return (
            self.origin[0] + self.unit * (x * self.cos - y * self.sin),
            self.origin[1] + self.unit * (x * self.sin + y * self.cos),
        )

    def blob(self, centre: Point, radii: Point, colour: Colour) -> None:
        turns = [math.tau * i / 96 for i in range(96)]
        points = [(centre[0] + radii[0] * math.cos(t), centre[1] + radii[1] * math.sin(t)) for t in turns]
        self.draw.polygon([self.at(point) for point in points], fill=colour)

    def stroke(self, points: list[Point], width: float, colour: Colour) -> None:
        """A line with round ends."""
        placed = [self.at(point) for point in points]
        self.draw.line(placed, fill=colour, width=round(width * self.unit), joint="curve")
        for point in (points[0], points[-1]):
            self.blob(point, (width / 2, width / 2), colour)


def _arc(centre: Point, radii: Point, first: float, last: float) -> list[Point]:
    """A part of an ellipse; degrees, 0 to the right, 90 below."""
    turns = [math.radians(first + (last - first) * i / 32) for i in range(33)]
    return [(centre[0] + radii[0] * math.cos(t), centre[1] + radii[1] * math.sin(t)) for t in turns]


def _zorb(pen: Pen, rng: Random) -> None:
    """From back to front: feet, antennae, body, belly, eyes, smile."""
    look = rng.uniform(-0.07, 0.07), rng.uniform(-0.05, 0.05)
    for side in (-1.0, 1.0):
        pen.blob((side * 0.45, 0.98), (0.33, 0.2), LIMB)
        lean = rng.uniform(-0.06, 0.06)
        pen.stroke([(side * 0.3, -0.75), (side * 0.42, -1.1), (side * 0.62 + lean, -1.32)], 0.13, LIMB)
        pen.blob((side * 0.62 + lean, -1.34), (0.2, 0.2), TIP)
    pen.blob((0, 0), (1.0, 0.96), BODY)
    pen.blob((0, 0.42), (0.62, 0.46), BELLY)
    for side in (-1.0, 1.0):
        pen.blob((side * 0.37, -0.26), (0.34, 0.38), EYE)
        pen.blob((side * 0.35 + look[0], -0.22 + look[1]), (0.18, 0.21), PUPIL)
        pen.blob((side * 0.35 + look[0] - 0.06, -0.31 + look[1]), (0.06, 0.07), EYE)
    pen.stroke(_arc((0, 0.26), (0.34, 0.26), 20, 160), 0.11, MOUTH)


def _ground(background: str, side: int, rng: Random) -> Image.Image:
    """The colour word's tone, a little lighter at the top."""
    tone = np.array([value + rng.uniform(-8, 8) for value in COLOURS[background]])
    light = 1 + 0.06 * np.linspace(1, -1, side)[:, None, None]
    pixels = np.clip(tone * light + np.zeros((side, side, 1)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def picture(photo: Photo, rng: Random, resolution: int = RESOLUTION) -> Image.Image:
    """An RGB picture, antialiased, with the grain of a photograph."""
    canvas = _ground(photo.background, resolution * SUPERSAMPLING, rng)
    _zorb(Pen(canvas, photo), rng)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float64)
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, GRAIN, pixels.shape[:2])[..., None]
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def write_sample(folder: Path) -> None:
    """zorb-01.jpg with its caption in zorb-01.txt, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(PHOTOS, start=1):
        path = folder / f"zorb-{number:02d}.jpg"
        picture(photo, Random(f"zorb {number}")).save(path, quality=QUALITY, optimize=True)
        path.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_sample(args.folder)


if __name__ == "__main__":
    main()
