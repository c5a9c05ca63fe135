"""Seeded variants of a picture: a function of (seed, picture, index); how one looks depends on the variant alone."""

import json
from dataclasses import asdict, dataclass
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raysd.config.data import AugmentSpec
from raysd.seeding import seed_of

DIGITS = 6
"""Decimals of a variant's numbers: the same text on every machine."""


@dataclass(frozen=True)
class Variant:
    """One way to look at a picture; as it stands, the plain one: the largest centred square."""

    x: float = 0.5
    y: float = 0.5
    """Where the crop lies in the room that it has, 0 left or top to 1 right or bottom."""
    keep: float = 1.0
    """Side of the square crop over the picture's shorter side."""
    flip: bool = False
    rotation: float = 0.0
    """Degrees, counter-clockwise."""
    scale: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def to_json(self) -> str:
        """Canonical text of all that decides the pixels besides picture and resolution: part of the cache's key."""
        return json.dumps(asdict(self), sort_keys=True)

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the square crop in the pixels of an upright picture."""
        side = min(width, height) * self.keep
        left, top = (width - side) * self.x, (height - side) * self.y
        return left, top, left + side, top + side


def variant(spec: AugmentSpec, example_id: str, index: int, seed: int) -> Variant:
    """The variant `index` of an example: 0 is the plain one, every second one is mirrored where `spec.flip` says so."""
    if index == 0:
        return Variant()
    rng = Random(seed_of(seed, "variant", example_id, index))
    x, y, keep, turn, scale, brightness, contrast, saturation = (rng.random() for _ in range(8))
    return Variant(
        x=round(x, DIGITS),
        y=round(y, DIGITS),
        keep=round(1 - spec.crop * keep, DIGITS),
        flip=spec.flip and index % 2 == 1,
        rotation=_around(0, turn, spec.rotation),
        scale=_around(1, scale, spec.scale),
        brightness=_around(1, brightness, spec.colour),
        contrast=_around(1, contrast, spec.colour),
        saturation=_around(1, saturation, spec.colour),
    )


def apply(picture: Image.Image, variant: Variant, resolution: int) -> Tensor:
    """The variant of an upright RGB picture as the VAE takes it: fp32 [3, resolution, resolution] in [-1, 1].

    One antialiased resampling (Lanczos) takes crop and size together; a picture that is too small is scaled up by it.
    What a rotation or a reduction uncovers is a reflection of the picture.
    """
    box = variant.box(*picture.size)
    square = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1).contiguous() / 255
    if variant.rotation or variant.scale != 1:
        pixels = _turned(pixels, variant.rotation, variant.scale)
    if variant.flip:
        pixels = pixels.flip(-1)
    return _coloured(pixels, variant) * 2 - 1


def _around(middle: float, random: float, reach: float) -> float:
    """Uniform in middle ± reach for a random number in [0, 1)."""
    return round(middle + reach * (2 * random - 1), DIGITS)


def _turned(pixels: Tensor, degrees: float, scale: float) -> Tensor:
    """Rotation and scale about the centre in one bilinear resampling. [3, R, R] in and out."""
    from kornia.geometry.transform import get_rotation_matrix2d, warp_affine

    side = pixels.shape[-1]
    centre = torch.full((1, 2), (side - 1) / 2)
    matrix = get_rotation_matrix2d(centre, torch.full((1,), float(degrees)), torch.full((1, 2), scale))
    return warp_affine(pixels[None], matrix, (side, side), padding_mode="reflection", align_corners=True)[0]


def _coloured(pixels: Tensor, variant: Variant) -> Tensor:
    """Brightness, contrast and saturation as factors, in [0, 1]."""
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_saturation_with_gray_subtraction,
    )

    if variant.brightness != 1:
        pixels = adjust_brightness_accumulative(pixels, variant.brightness)
    if variant.contrast != 1:
        pixels = adjust_contrast_with_mean_subtraction(pixels, variant.contrast)
    if variant.saturation != 1:
        pixels = adjust_saturation_with_gray_subtraction(pixels, variant.saturation)
    return pixels.clamp(0, 1)
