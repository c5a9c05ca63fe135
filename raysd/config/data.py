"""What pictures to train on, and what is done to them before they are latents."""

from typing import Annotated, Literal

from pydantic import Field

from raysd.config.base import Spec

Fraction = Annotated[float, Field(ge=0, lt=1)]


class AugmentSpec(Spec):
    """Seeded variants of each picture. The ranges are symmetric round "no change"."""

    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many variants of each picture are encoded; the first is the plain one."""
    crop: Fraction = 0.1
    """Largest share of the side that a random crop takes away."""
    flip: bool = True
    """Mirror every second variant. Turn it off for subjects with a left and a right (text, logos)."""
    rotation: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Largest rotation in degrees."""
    scale: Fraction = 0.0
    """Largest relative change of size."""
    colour: Fraction = 0.0
    """Largest relative change of brightness, contrast and saturation."""


class DataSpec(Spec):
    """Where the pictures come from, how they are checked, split and encoded."""

    source: str
    """A folder, a zip, an http(s) URL of a zip, or an fsspec URL (s3://…); `sample` is the bundled set."""
    prompt: str | None = None
    """One caption for all pictures; with {caption} in it, a template round each picture's own."""
    resolution: Annotated[int, Field(ge=32, le=2048, multiple_of=8)] = 512
    """Side of the training pictures in pixels."""
    validation: Fraction = 0.1
    """Share of the pictures kept apart for the validation loss (from 5 different pictures on, 1 at least)."""
    balance: Literal["none", "caption", "folder"] = "none"
    """Sample each caption, or each folder, equally often."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to exact copies, and to near ones with the same caption, beyond the best; the split keeps them together."""
    blurry: Literal["drop", "keep"] = "keep"
    """What happens to blurred and blank pictures; they are named in the report either way."""
    outliers: Literal["drop", "keep"] = "keep"
    """What happens to noisy pictures and those unlike all others; they are named in the report either way."""
    unreadable: Fraction = 0.1
    """Largest share of unreadable pictures that is accepted; they are left out and named."""
    force: bool = False
    """Accept fewer than 5 pictures."""
    augment: AugmentSpec = AugmentSpec()
