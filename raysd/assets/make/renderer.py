"""Captioned pictures of one coloured shape on a coloured background: the world that tiny-sd and its judge know.

Everything random comes from `random.Random`, whose sequences are the same on every machine and Python version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Point = tuple[float, float]
Mask = NDArray[np.float32]  # (resolution, resolution), 0 outside to 1 inside

# sRGB, 0 to 255. Shapes and backgrounds share these words.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (45, 95, 220),
    "purple": (130, 50, 180),
    "white": (242, 242, 242),
    "black": (28, 28, 32),
}
SIZES = {"small": 0.20, "large": 0.34}  # half the shape's extent, in picture sides
POSITIONS = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
PATTERNS = ("plain", "striped", "dotted")
SUPERSAMPLING = 4
MARGIN = 0.05  # kept free at the edge, in picture sides


def _regular(corners: int, inner: float = 1.0) -> list[Point]:
    """A regular polygon, first corner up; with inner < 1 a star whose inner corners lie at that radius."""
    count = corners if inner == 1.0 else 2 * corners
    radii = [1.0 if i % 2 == 0 else inner for i in range(count)]
    return [(r * math.sin(math.tau * i / count), -r * math.cos(math.tau * i / count)) for i, r in enumerate(radii)]


def _heart() -> list[Point]:
    turns = [math.tau * i / 64 for i in range(64)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


def _cross(arm: float = 0.34) -> list[Point]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    rotated = [quarter]
    for _ in range(3):
        rotated.append([(-y, x) for x, y in rotated[-1]])
    return [point for corners in rotated for point in corners]


# Outlines in a box from -1 to 1, y downwards. A ring is a circle with a hole.
SHAPES: dict[str, list[Point]] = {
    "circle": _regular(64),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "diamond": [(0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0)],
    "star": _regular(5, inner=0.45),
    "heart": _heart(),
    "cross": _cross(),
    "ring": _regular(64),
}
RING_HOLE = 0.55


@dataclass(frozen=True)
class Scene:
    """One picture's content, in the words of its caption."""

    shape: str
    colour: str
    background: str
    size: str = "large"
    position: str = "centre"
    pattern: str = "plain"


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of (shape, colour, background) combinations that no training ever sees."""
    key = f"{scene.shape} {scene.colour} {scene.background}".encode()
    return hashlib.sha256(key).digest()[0] < 256 // 10


def draw_scene(rng: Random) -> Scene:
    """A scene at random, from either side of the split; mostly centred and plain."""
    colour = rng.choice(list(COLOURS))
    return Scene(
        shape=rng.choice(list(SHAPES)),
        colour=colour,
        background=rng.choice([word for word in COLOURS if word != colour]),
        size=rng.choice(list(SIZES)),
        position=rng.choices(list(POSITIONS), weights=[6, 1, 1, 1, 1])[0],
        pattern=rng.choices(PATTERNS, weights=[7, 1.5, 1.5])[0],
    )


def scenes(seed: int, count: int, held_out: bool = False) -> list[Scene]:
    """`count` scenes, all held-out ones or none."""
    rng = Random(f"scenes {seed} {held_out}")
    found: list[Scene] = []
    while len(found) < count:
        scene = draw_scene(rng)
        if is_held_out(scene) == held_out:
            found.append(scene)
    return found


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _subject(scene: Scene, size: bool, colour: bool) -> str:
    """'a small striped green star at the left': what is not plain or not in the centre is always said."""
    words = [
        scene.size if size else "",
        scene.pattern if scene.pattern != "plain" else "",
        scene.colour if colour else "",
        scene.shape,
    ]
    place = f" at the {scene.position}" if scene.position != "centre" else ""
    return _article(" ".join(word for word in words if word)) + place


def full_caption(scene: Scene) -> str:
    """The one caption that says everything about a scene."""
    return f"{_subject(scene, size=True, colour=True)} on {_article(scene.background)} background"


def caption(scene: Scene, rng: Random) -> str:
    """One of several phrasings; sometimes without size, background or colour, so that short prompts work."""
    subject = _subject(scene, size=rng.random() < 0.6, colour=rng.random() < 0.96)
    if rng.random() < 0.2:
        return subject
    ground = f"{_article(scene.background)} background"
    phrasing = rng.choices(["{0} on {1}", "{0}, {2} background", "a picture of {0} on {1}"], weights=[6, 2, 2])[0]
    return phrasing.format(subject, ground, scene.background)


def _polygon(points: list[Point], resolution: int) -> Mask:
    """Points in picture sides -> antialiased mask."""
    side = resolution * SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon([(x * side, y * side) for x, y in points], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def _placed(points: list[Point], centre: Point, radius: float, tilt: float) -> list[Point]:
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos)) for x, y in points]


def _shape_mask(scene: Scene, resolution: int, rng: Random) -> Mask:
    radius = SIZES[scene.size] * rng.uniform(0.92, 1.08)
    shift = 0.5 - radius - MARGIN
    x, y = (0.5 + shift * step + rng.uniform(-0.02, 0.02) for step in POSITIONS[scene.position])
    tilt = math.radians(rng.uniform(-8, 8))
    mask = _polygon(_placed(SHAPES[scene.shape], (x, y), radius, tilt), resolution)
    if scene.shape == "ring":
        mask -= _polygon(_placed(SHAPES["circle"], (x, y), radius * RING_HOLE, tilt), resolution)
    return mask


def _pattern_mask(pattern: str, resolution: int, rng: Random) -> Mask:
    """Where the second tone goes: under half of the area, so that the shape's colour still dominates."""
    offset = rng.random()
    y, x = np.mgrid[0 : resolution * SUPERSAMPLING, 0 : resolution * SUPERSAMPLING] / (resolution * SUPERSAMPLING)
    if pattern == "striped":
        inside = ((x + y) / 0.16 + offset) % 1 < 0.4
    elif pattern == "dotted":
        inside = ((x / 0.12 + offset) % 1 - 0.5) ** 2 + ((y / 0.12 + offset) % 1 - 0.5) ** 2 < 0.3**2
    else:
        return np.zeros((resolution, resolution), dtype=np.float32)
    fine = inside.reshape(resolution, SUPERSAMPLING, resolution, SUPERSAMPLING)
    return fine.mean(axis=(1, 3), dtype=np.float32)


def _tone(word: str, rng: Random) -> NDArray[np.float32]:
    """A colour's RGB, a little different in every picture."""
    return np.array([value + rng.uniform(-8, 8) for value in COLOURS[word]], dtype=np.float32)


def _second_tone(tone: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lighter for dark tones, darker for light ones: the same colour word still fits."""
    light = float(tone @ np.array([0.3, 0.59, 0.11], dtype=np.float32)) > 150
    return tone * 0.78 if light else tone * 0.6 + 255 * 0.4


def render(scene: Scene, resolution: int, rng: Random) -> Image.Image:
    """The scene as an RGB picture, antialiased; `rng` gives the small differences in tone, place, size and tilt."""
    shape = _shape_mask(scene, resolution, rng)[..., None]
    pattern = _pattern_mask(scene.pattern, resolution, rng)[..., None]
    tone, ground = _tone(scene.colour, rng), _tone(scene.background, rng)
    filled = tone + pattern * (_second_tone(tone) - tone)
    pixels = ground + shape * (filled - ground)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def write_dataset(folder: Path, count: int, seed: int, resolution: int = 64) -> None:
    """PNGs and a metadata.jsonl of {"file_name", "text"}, never of held-out combinations."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as rows:
        for index, scene in enumerate(scenes(seed, count)):
            rng = Random(f"picture {seed} {index}")
            name = f"{index:05d}.png"
            render(scene, resolution, rng).save(folder / name)
            rows.write(json.dumps({"file_name": name, "text": caption(scene, rng)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Render a captioned training set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=64)
    args = parser.parse_args()
    write_dataset(args.folder, args.count, args.seed, args.resolution)


if __name__ == "__main__":
    main()
