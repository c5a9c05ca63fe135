"""How often a model draws what its prompt says, by the bundled judge."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from raysd.assets import asset
from raysd.assets.judge import Judge
from raysd.assets.make.renderer import COLOURS, SHAPES, Scene, full_caption, scenes

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PROMPTS = [f"a {colour} {shape}" for colour, shape in PAIRS]  # the judge answers with one of these; in order of PAIRS
SEED = 4
STEPS, GUIDANCE, BATCH = 25, 3.5, 32
SHEET_ROWS, ENLARGED = 8, 2


def classify(judge: Judge, pictures: Sequence[Image.Image]) -> list[tuple[str, str]]:
    """The (colour, shape) whose prompt is nearest to each picture."""
    nearest = (judge.images(pictures) @ judge.texts(PROMPTS).T).argmax(dim=1)
    return [PAIRS[place] for place in nearest.tolist()]


def shares(found: Sequence[tuple[str, str]], wanted: Sequence[Scene]) -> dict[str, float]:
    """The shares, 0 to 1, with both right, the colour right, the shape right."""
    both = zip(found, wanted, strict=True)
    right = np.array([(colour == scene.colour, shape == scene.shape) for (colour, shape), scene in both])
    return {
        "both": float(right.all(axis=1).mean()),
        "colour": float(right[:, 0].mean()),
        "shape": float(right[:, 1].mean()),
    }


def draw(folder: Path, captions: Sequence[str]) -> list[Image.Image]:
    """One picture for each caption, the same ones every time."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        # A generator for each picture: what it looks like does not depend on its neighbours.
        noise = [torch.Generator().manual_seed(SEED * 100_000 + start + place) for place in range(len(batch))]
        pictures += pipeline(batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise).images
        print(f"drew {len(pictures)} of {len(captions)}", flush=True)
    return pictures


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """The first 64, 8 in a row, enlarged."""
    width, height = (side * ENLARGED for side in pictures[0].size)
    canvas = Image.new("RGB", (SHEET_ROWS * width, SHEET_ROWS * height), "white")
    for place, picture in enumerate(pictures[: SHEET_ROWS**2]):
        row, column = divmod(place, SHEET_ROWS)
        canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (column * width, row * height))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw held-out captions and have the judge look at the pictures.")
    parser.add_argument("model", type=Path, help="a Stable Diffusion folder")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--judge", type=Path, help="a tiny-clip folder (default: the bundled one)")
    parser.add_argument("--sheet", type=Path, help="where to write the first 64 pictures")
    args = parser.parse_args()
    wanted = scenes(SEED, args.count, held_out=True)
    pictures = draw(args.model, [full_caption(scene) for scene in wanted])
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures).save(args.sheet, optimize=True)
    right = shares(classify(Judge(args.judge or asset("tiny-clip")), pictures), wanted)
    print(f"shape and colour right on {right['both']:.1%} of {args.count}", end=" ")
    print(f"(colour {right['colour']:.1%}, shape {right['shape']:.1%})")


if __name__ == "__main__":
    main()
