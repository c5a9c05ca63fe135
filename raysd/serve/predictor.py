"""One base model ready to draw: texts to conditioning, pictures to latents and back, and a batch's denoising step.

Shapes: B requests, C latent channels, h x w latent size, L tokens, D width of the text encoder. No Ray, no threads.
"""

import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from raysd import diffusion
from raysd.errors import RequestError
from raysd.models import Family
from raysd.serve.drawing import LARGEST_SIDE, Drawing
from raysd.serve.samplers import KNOWN, Timetable, timetable
from raysd.serve.torch_backend import Backend

TEXTS = 512
"""Prompts whose embeddings are kept."""


class Sample:
    """One picture on its way: what its next step is computed from."""

    def __init__(self, table: Timetable, text: Tensor, negative: Tensor | None, drawing: Drawing):
        self.table, self.text, self.negative, self.guidance = table, text, negative, drawing.guidance
        self.generator = torch.Generator().manual_seed(drawing.seed)
        self.step = 0
        self.latents = torch.empty(0)  # [C, h, w]
        self.past = torch.empty(0)  # [3, C, h, w]: l, D_1, D_2 of `samplers`
        self.clean = torch.empty(0)  # [C, h, w], what the last step took the picture to be
        self.kept: tuple[Tensor, Tensor, Tensor] | None = None  # inpainting: mask, clean latents, their noise

    @property
    def done(self) -> bool:
        return self.step == len(self.table.rows)

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch that a step takes: two with guidance."""
        return 1 if self.negative is None else 2


class Predictor:
    """A base and the adapters on it. Calls come from one thread at a time."""

    def __init__(self, family: Family, folder: Path, backend: Backend):
        self.family, self.folder, self.backend = family, folder, backend
        self.geometry = family.geometry(folder)
        self._config, self._guidance_width = family.scheduler_config(folder), family.guidance_width(folder)
        self._tokenizer = family.tokenizer(folder)
        self._scale, self._shift = family.latent_scale(folder)
        self.device = backend.device
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def steps(self, drawing: Drawing) -> int:
        """How many denoising steps a picture takes. Raises RequestError as `check` does."""
        return len(self._table(drawing).rows)

    def check(self, drawing: Drawing, image: bytes | None = None) -> tuple[int, int, int]:
        """The shape of the latents (C, h, w): of the size that was asked for, else like the picture's that it starts from.

        Raises RequestError for a size or sampler that the model has not, and for a model whose guidance is an input.
        """
        self._table(drawing)
        width, height = drawing.width, drawing.height
        if image is not None and width is None and height is None:
            width, height = self.geometry.like(*Image.open(io.BytesIO(image)).size, LARGEST_SIDE)
        return self.geometry.latents(width, height)

    def begin(self, drawing: Drawing, image: bytes | None = None, mask: bytes | None = None) -> Sample:
        """The first picture of a drawing before its first step. Random numbers are drawn as diffusers' pipelines draw them."""
        shape = self.check(drawing, image)
        guided = drawing.guidance > 1
        texts = self._embed([drawing.prompt, drawing.negative] if guided else [drawing.prompt])
        table = self._table(drawing)
        sample = Sample(table, texts[0], texts[1] if guided else None, drawing)
        clean = self._latents_of(image, shape, sample.generator) if image is not None else None
        noise = torch.randn(shape, generator=sample.generator)
        of_clean, of_noise = table.levels[0]
        # At full strength inpainting starts from noise alone, as drawing from nothing does.
        fresh = clean is None or (mask is not None and drawing.strength == 1)
        sample.latents = noise * table.start if clean is None or fresh else of_clean * clean + of_noise * noise
        sample.latents = sample.latents.to(self.device)
        if mask is not None and clean is not None:
            torch.randn(shape, generator=sample.generator)  # diffusers' for what is left of the picture, which it drops
            anew = _mask(mask, shape, self.geometry.factor)
            sample.kept = (anew.to(self.device), clean.to(self.device), noise.to(self.device))
        sample.past = torch.zeros(3, *shape, device=self.device)
        return sample

    def advance(self, samples: Sequence[Sample], adapter: str | None) -> None:
        """One denoising step of each, in one batch: all of one latent shape and one adapter."""
        rows = [sample.table.rows[sample.step] for sample in samples]
        x = torch.stack([sample.latents for sample in samples])
        column = self._column
        scaled = x * column([row.scale for row in rows])
        output = self._guided(samples, scaled, [row.timestep for row in rows], adapter)
        clean = x * column([row.x_of_x for row in rows]) + output * column([row.x_of_m for row in rows])
        past = torch.stack([sample.past for sample in samples])  # [B, 3, C, h, w]
        noise = torch.stack([self._noise(sample, row.next[-1]) for sample, row in zip(samples, rows, strict=True)])
        known = torch.stack([x, past[:, 0], clean, past[:, 1], past[:, 2], noise], dim=1)  # [B, 6, C, h, w]
        following = self._combined([row.next for row in rows], known)
        kept = self._combined([row.kept for row in rows], known[:, : KNOWN - 1])
        for number, sample in enumerate(samples):
            sample.step += 1
            sample.clean = clean[number]
            sample.past = torch.stack([kept[number], clean[number], past[number, 1]])
            sample.latents = self._blended(sample, following[number])

    def pictures(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """[C, h, w] each, of one shape -> pictures. Raises FloatingPointError where there are numbers that are none."""
        stacked = torch.stack(list(latents))
        if not torch.isfinite(stacked).all():
            raise FloatingPointError("the model's latents are not finite")
        pixels = self.backend.decode(stacked)
        if not torch.isfinite(pixels).all():
            raise FloatingPointError("the decoder's pixels are not finite")
        bytes_ = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(picture) for picture in bytes_.numpy()]

    def _table(self, drawing: Drawing) -> Timetable:
        if self._guidance_width is not None:  # no backend's denoiser has this input
            raise RequestError(
                "model: its denoiser takes guidance as an input (time_cond_proj_dim), which is not served"
            )
        strength = drawing.strength if drawing.image is not None else 1.0
        return timetable(drawing.sampler, self._config, drawing.steps, strength)

    def _guided(self, samples: Sequence[Sample], scaled: Tensor, times: list[float], adapter: str | None) -> Tensor:
        """The denoiser's output with classifier-free guidance (Ho & Salimans 2022, eq. 6). [B, C, h, w]"""
        guided = [number for number, sample in enumerate(samples) if sample.negative is not None]
        negatives = [sample.negative for sample in samples if sample.negative is not None]
        text = torch.stack([*[sample.text for sample in samples], *negatives])
        order = [*range(len(samples)), *guided]
        output = self.backend.denoise(scaled[order], torch.tensor(times)[order], text, adapter).to(self.device)
        prediction, plain = output[: len(samples)].clone(), output[len(samples) :]
        if guided:
            scale = self._column([samples[number].guidance for number in guided])
            prediction[guided] = plain + scale * (prediction[guided] - plain)
        return prediction

    def _noise(self, sample: Sample, scale: float) -> Tensor:
        if not sample.table.noisy or (scale == 0 and sample.step == len(sample.table.rows) - 1):
            return torch.zeros_like(sample.latents)
        return torch.randn(sample.latents.shape, generator=sample.generator).to(self.device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).reshape(-1, 1, 1, 1)

    def _combined(self, factors: Sequence[Sequence[float]], known: Tensor) -> Tensor:
        """Each request's linear combination: [B][K], [B, K, C, h, w] -> [B, C, h, w]"""
        return torch.einsum("bk,bkchw->bchw", torch.tensor(factors, device=self.device), known)

    def _blended(self, sample: Sample, latents: Tensor) -> Tensor:
        """Inpainting: outside the mask, the given picture at the noise level of the next step."""
        if sample.kept is None:
            return latents
        mask, clean, noise = sample.kept
        of_clean, of_noise = sample.table.levels[sample.step] if not sample.done else (1.0, 0.0)
        return mask * latents + (1 - mask) * (of_clean * clean + of_noise * noise)

    def _embed(self, prompts: Sequence[str]) -> list[Tensor]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            embedded = self.backend.encode_text(self.family.tokens(self._tokenizer, missing)).cpu()
            self._texts.update(zip(missing, embedded, strict=True))
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        found = [self._texts[prompt] for prompt in prompts]
        while len(self._texts) > TEXTS:
            self._texts.popitem(last=False)
        return found

    def _latents_of(self, image: bytes, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Scaled latents of a picture, drawn from their posterior. [C, h, w]"""
        factor = self.geometry.factor
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        size = (shape[2] * factor, shape[1] * factor)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)
        moments = self.backend.encode((pixels.permute(2, 0, 1).float() / 127.5 - 1).unsqueeze(0)).cpu()
        eps = torch.randn((1, *shape), generator=generator)
        return diffusion.sample_posterior(moments, eps, self._scale, self._shift)[0]


def _mask(mask: bytes, shape: tuple[int, int, int], factor: int) -> Tensor:
    """1 where the picture is drawn anew. [1, h, w]

    As diffusers' inpainting has it: black and white in pixels, of which each latent takes the one at its upper left.
    """
    grey, size = Image.open(io.BytesIO(mask)).convert("L"), (shape[2] * factor, shape[1] * factor)
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(1, 1, size[1], size[0])
    return F.interpolate((values >= 128).float(), size=shape[1:])[0]
