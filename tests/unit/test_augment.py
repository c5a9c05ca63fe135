"""Variants: seeded by (seed, picture, index) alone, in their ranges, and true to the picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from raysd.config.data import AugmentSpec
from raysd.data.augment import Variant, apply, variant
from tests.pictures import photo

RICH = AugmentSpec(variants=8, crop=0.3, rotation=20, scale=0.2, colour=0.3)


def as_picture(tensor):
    return ((tensor.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_index_0_is_plain_and_the_largest_centred_square():
    assert variant(RICH, "abc", 0, 7) == Variant()
    assert Variant().box(200, 100) == (50, 0, 150, 100)
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste(photo(1, 100), (50, 0))
    assert np.array_equal(as_picture(apply(wide, Variant(), 100)), np.asarray(photo(1, 100)))


def test_a_variant_depends_on_seed_picture_and_index_alone():
    several = {
        variant(RICH, example, index, seed).to_json() for example in "ab" for index in (1, 2, 3) for seed in (0, 1)
    }
    assert len(several) == 12
    assert variant(RICH, "a", 2, 0) == variant(RICH.model_copy(update={"variants": 3}), "a", 2, 0)
    assert json.loads(variant(RICH, "a", 1, 0).to_json())["keep"] == variant(RICH, "a", 1, 0).keep


def test_the_numbers_of_a_variant_are_fixed():
    """They are part of the cache's key: a change here makes every cache worthless, and needs a reason."""
    assert variant(RICH, "0" * 64, 1, 0).to_json() == GOLDEN


GOLDEN = (
    '{"brightness": 0.966827, "contrast": 1.020953, "flip": true, "keep": 0.740798, '
    '"rotation": -17.979071, "saturation": 0.785133, "scale": 0.943514, "x": 0.208544, "y": 0.813542}'
)


def test_variants_fill_their_ranges_and_mirror_every_second():
    drawn = [variant(RICH, f"p{n}", 1 + n % 2, 0) for n in range(400)]
    for name, low, high in (
        ("keep", 0.7, 1.0),
        ("rotation", -20, 20),
        ("scale", 0.8, 1.2),
        ("brightness", 0.7, 1.3),
        ("x", 0, 1),
    ):
        values = [getattr(v, name) for v in drawn]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert [v.flip for v in drawn[:4]] == [True, False, True, False]
    assert not any(variant(RICH.model_copy(update={"flip": False}), "a", n, 0).flip for n in range(8))


def test_what_a_spec_switches_off_stays_off():
    plain = AugmentSpec(variants=4, crop=0, flip=False)
    assert replace(variant(plain, "a", 3, 0), x=0.5, y=0.5) == Variant()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (300, 200), (33, 500), (20, 20)])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_shape_type_and_range(width, height, index):
    pixels = apply(photo(3, width, height), variant(RICH, "a", index, 0), 64)
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, 64, 64), torch.float32, True)
    assert -1 <= pixels.min() < pixels.max() <= 1


def test_values_run_from_minus_1_to_1():
    assert apply(Image.new("RGB", (9, 9), "black"), Variant(), 32).unique().tolist() == [-1]
    assert apply(Image.new("RGB", (9, 9), "white"), Variant(), 32).unique().tolist() == [1]


def test_flip_mirrors_left_and_right():
    plain, mirrored = (apply(photo(1), Variant(flip=flip), 64) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(-1))


def test_the_crop_is_the_box_that_the_variant_says():
    corner = Variant(x=0, y=1, keep=0.5)
    assert corner.box(128, 96) == (0, 48, 48, 96)
    assert np.array_equal(as_picture(apply(photo(1, 128, 96), corner, 48)), np.asarray(photo(1, 128, 96))[48:, :48])


@pytest.mark.parametrize("turn", [Variant(rotation=45), Variant(rotation=-17.5), Variant(scale=0.5)])
def test_rotation_and_reduction_show_no_black_corners(turn):
    white = apply(Image.new("RGB", (64, 64), "white"), turn, 64)
    assert white.min() > 0.999
    bright = Image.fromarray(np.asarray(photo(1, 64)) // 2 + 100)
    assert apply(bright, turn, 64).min() > 99 / 127.5 - 1 - 0.01


def test_rotation_turns_counter_clockwise_about_the_centre():
    turned = apply(photo(2, 65), Variant(rotation=90), 65)
    expected = apply(photo(2, 65).transpose(Image.Transpose.ROTATE_90), Variant(), 65)
    assert torch.allclose(turned, expected, atol=2e-3)


def test_scale_enlarges_about_the_centre():
    dot = Image.new("RGB", (101, 101), "black")
    dot.paste("white", (40, 40, 61, 61))
    plain, larger = (apply(dot, Variant(scale=scale), 101) for scale in (1.0, 2.0))
    assert (larger > 0).sum() / (plain > 0).sum() == pytest.approx(4, rel=0.1)
    assert larger[0, 50, 50] > 0.99


def test_colours_change_by_their_factors():
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    assert as_picture(apply(grey, Variant(brightness=1.3), 32))[0, 0].tolist() == [130] * 3
    red = Image.new("RGB", (32, 32), (200, 100, 100))
    less = as_picture(apply(red, Variant(saturation=0.5), 32))[0, 0].astype(int)
    assert 40 <= less[0] - less[1] <= 60
    photo_plain, photo_flat = (apply(photo(1), Variant(contrast=c), 64) for c in (1.0, 0.5))
    assert photo_flat.std() / photo_plain.std() == pytest.approx(0.5, rel=0.1)
    assert photo_flat.mean() == pytest.approx(photo_plain.mean().item(), abs=0.03)


def test_resizing_is_antialiased():
    """Stripes one pixel wide average to grey when made smaller; nearest or plain bilinear gives stripes of its own."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (512, 256)))
    assert apply(stripes.convert("RGB"), Variant(), 64).abs().max() < 0.1
