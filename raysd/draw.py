"""Pictures from a located model, through its family's diffusers pipeline."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from raysd.references import Located


@dataclass(frozen=True)
class Request:
    """What to draw. Picture n of `count` has seed `seed` + n, so that each can be drawn again alone."""

    prompt: str
    negative: str | None = None
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    count: int = 1

    def of(self, number: int) -> "Request":
        """The request that draws picture `number` alone."""
        return replace(self, seed=self.seed + number, count=1)


def draw(
    located: Located, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
) -> list[Image.Image]:
    """The pictures of all requests, in order. `progress(done, total)` is called at each denoising step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = located.family.pipeline(located.folder, located.lora).to(device)
    total = sum(request.steps for request in requests)
    images: list[Image.Image] = []
    done = 0
    for request in requests:

        def step(pipe: Any, n: int, t: Any, kwargs: dict[str, Any], before: int = done) -> dict[str, Any]:
            if progress is not None:
                progress(before + n + 1, total)
            return kwargs

        images += pipeline(
            [request.prompt] * request.count,
            negative_prompt=None if request.negative is None else [request.negative] * request.count,
            generator=[torch.Generator().manual_seed(request.seed + n) for n in range(request.count)],
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            callback_on_step_end=step,
        ).images
        done += request.steps
    return images


def grid(images: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Pictures of one size side by side, `columns` a row, enlarged `scale` times."""
    width, height = images[0].size[0] * scale, images[0].size[1] * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, image in enumerate(images):
        enlarged = image.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else image
        sheet.paste(enlarged, ((place % columns) * width, (place // columns) * height))
    return sheet


def save_png(image: Image.Image, path: Path, located: Located, request: Request) -> None:
    """Save with what is needed to draw it again in the file's metadata: reference, version digest and request."""
    info = PngInfo()
    info.add_text("raysd", json.dumps({"model": located.ref, "digest": _digest(located), **asdict(request)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=info)


def _digest(located: Located) -> str | None:
    return located.version.digest if located.version else None
