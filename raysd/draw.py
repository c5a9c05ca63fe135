"""Pictures from a located model, through its family's diffusers pipeline."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
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


BATCH = 4
"""Pictures that are drawn at once: few enough for any machine that holds the model."""
MAX_SEED = 2**63 - 1


def draw(
    located: Located, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
) -> list[Image.Image]:
    """The pictures of all requests, in order. `progress(done, total)` is called at each denoising step of a batch."""
    pipeline = open_pipeline(located)
    batches = [
        [request.of(n) for n in range(first, min(first + BATCH, request.count))]
        for request in requests
        for first in range(0, request.count, BATCH)
    ]
    total = sum(batch[0].steps for batch in batches)
    images: list[Image.Image] = []
    done = 0
    for batch in batches:

        def step(pipe: Any, n: int, t: Any, kwargs: dict[str, Any], before: int = done) -> dict[str, Any]:
            if progress is not None:
                progress(before + n + 1, total)
            return kwargs

        images += draw_batch(pipeline, batch, step)
        done += batch[0].steps
    return images


def open_pipeline(located: Located) -> Any:
    """The family's diffusers pipeline on this machine's device."""
    from diffusers import ModelMixin

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = located.family.pipeline(located.folder, located.lora).to(device)
    for network in pipeline.components.values():
        if isinstance(network, ModelMixin):  # with convolutions, which run a fifth to a third faster so
            network.to(memory_format=torch.channels_last)
    return pipeline


def draw_batch(pipeline: Any, requests: Sequence[Request], step: Callable[..., Any] | None = None) -> list[Image.Image]:
    """One picture for each request, all in one batch. They may differ in prompt, negative prompt and seed alone.

    `step` is diffusers' callback at the end of each denoising step. Raises ValueError for requests that differ in more.
    """
    settings = {(request.steps, request.guidance, request.count) for request in requests}
    if len(settings) != 1 or requests[0].count != 1:
        raise ValueError("the requests of a batch share steps and guidance, and draw one picture each")
    images: list[Image.Image] = pipeline(
        [request.prompt for request in requests],
        negative_prompt=[request.negative or "" for request in requests],
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        num_inference_steps=requests[0].steps,
        guidance_scale=requests[0].guidance,
        callback_on_step_end=step,
    ).images
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(image, located, request))


def png(image: Image.Image, located: Located, request: Request) -> bytes:
    """The bytes of `save_png`'s file."""
    info = metadata({"model": located.ref, "digest": _digest(located), **asdict(request)})
    body = io.BytesIO()
    image.save(body, "PNG", pnginfo=info)
    return body.getvalue()


def metadata(values: Mapping[str, Any]) -> PngInfo:
    """What a PNG file of ours says of itself, as JSON under the word raysd."""
    info = PngInfo()
    info.add_text("raysd", json.dumps(values))
    return info


def _digest(located: Located) -> str | None:
    return located.version.digest if located.version else None
