"""How often a model draws what its prompt says, by the bundled judge."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from raysd.assets import asset
from raysd.assets.make.renderer import COLOURS, SHAPES, Scene, full_caption, scenes

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PROMPTS = [f"a {colour} {shape}" for colour, shape in PAIRS]  # the judge answers with one of these; in order of PAIRS
SEED = 4
STEPS, GUIDANCE, BATCH = 25, 3.5, 32
SHEET_ROWS, ENLARGED = 8, 2


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    """[N, 3, side, side], already normalised -> [N, D] of length 1."""
    return normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def text_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """-> [N, D] of length 1."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)


class Judge:
    """A CLIP folder that embeds pictures and texts, and says which coloured shape a picture shows."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        # Read by hand: transformers' own image processors need torchvision.
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.side = int(settings["size"]["shortest_edge"])
        self.mean, self.std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> [N, 3, side, side], normalised."""
        small = [picture.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC) for picture in pictures]
        values = torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).permute(0, 3, 1, 2)
        return (values / 255 - self.mean) / self.std

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """-> [N, D] of length 1."""
        batches = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
        return torch.cat([image_embeddings(self.model, self.pixels(batch)) for batch in batches])

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """-> [N, D] of length 1."""
        return text_embeddings(self.model, self.tokenizer, texts)

    def classify(self, pictures: Sequence[Image.Image]) -> list[tuple[str, str]]:
        """The (colour, shape) whose prompt is nearest to each picture."""
        nearest = (self.images(pictures) @ self.texts(PROMPTS).T).argmax(dim=1)
        return [PAIRS[place] for place in nearest.tolist()]


def shares(found: Sequence[tuple[str, str]], wanted: Sequence[Scene]) -> dict[str, float]:
    """The shares, 0 to 1, with both right, the colour right, the shape right."""
    right = np.array([(colour == scene.colour, shape == scene.shape) for (colour, shape), scene in zip(found, wanted, strict=True)])
    return {
        "both": float(right.all(axis=1).mean()),
        "colour": float(right[:, 0].mean()),
        "shape": float(right[:, 1].mean()),
    }


def draw(folder: Path, captions: Sequence[str]) -> list[Image.Image]:
    """One picture for each caption, the same ones every time."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
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
    parser.add_argument("--judge", type=Path, help="a CLIP folder (default: the bundled one)")
    parser.add_argument("--sheet", type=Path, help="where to write the first 64 pictures")
    args = parser.parse_args()
    wanted = scenes(SEED, args.count, held_out=True)
    pictures = draw(args.model, [full_caption(scene) for scene in wanted])
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures).save(args.sheet, optimize=True)
    right = shares(Judge(args.judge or asset("tiny-clip")).classify(pictures), wanted)
    print(f"shape and colour right on {right['both']:.1%} of {args.count}", end=" ")
    print(f"(colour {right['colour']:.1%}, shape {right['shape']:.1%})")


if __name__ == "__main__":
    main()
