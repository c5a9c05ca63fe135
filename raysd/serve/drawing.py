"""What a request asks to be drawn: all that a picture depends on but the version. Its bounds are those of every way in."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raysd.config.base import Spec

Sampler = Literal["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "flow_euler", "lcm"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MOST_STEPS = 200
MOST_PICTURES = 10
LARGEST_SIDE = 2048
LONGEST_PROMPT = 4000
"""Characters. What the text encoder's tokenizer has no room for is cut off, as diffusers does."""


class Drawing(Spec):
    """Pictures to draw. Picture n of `count` has seed `seed` + n, so that each can be drawn again alone."""

    prompt: str = Field(max_length=LONGEST_PROMPT)
    """What to draw."""
    negative: str = Field(default="", max_length=LONGEST_PROMPT)
    """What not to draw."""
    seed: int = Field(default=0, ge=0, lt=2**48)
    """Of the first picture's noise."""
    steps: int = Field(default=25, ge=1, le=MOST_STEPS)
    """Denoising steps."""
    guidance: float = Field(default=7.5, ge=0, le=50, allow_inf_nan=False)
    """Classifier-free guidance scale; at 1 or below the negative prompt has no part."""
    sampler: Sampler = "ddim"
    """How the steps are taken."""
    width: int | None = Field(default=None, ge=8, le=LARGEST_SIDE, multiple_of=8)
    """Pixels; null: the model's own size, or the shape of `image`; with `image` give both sides or none."""
    height: int | None = Field(default=None, ge=8, le=LARGEST_SIDE, multiple_of=8)
    """Pixels; null: the model's own size, or the shape of `image`; with `image` give both sides or none."""
    count: int = Field(default=1, ge=1, le=MOST_PICTURES)
    """Pictures."""
    image: Digest | None = None
    """An upload to start from (img2img), by its sha256."""
    mask: Digest | None = None
    """An upload whose white is drawn anew and whose black is kept (inpainting); needs `image`."""
    strength: float = Field(default=0.8, gt=0, le=1, allow_inf_nan=False)
    """How much of `image` is drawn anew: the share of the steps that are taken."""
    partial_images: int = Field(default=0, ge=0, le=3)
    """Previews of each picture that are streamed before it is done."""

    @model_validator(mode="after")
    def _mask_needs_image(self) -> "Drawing":
        if self.mask is not None and self.image is None:
            raise ValueError("mask: needs image, the picture that it belongs to")
        return self

    def of(self, number: int) -> "Drawing":
        """The drawing of picture `number` alone."""
        return self.model_copy(update={"seed": self.seed + number, "count": 1})
