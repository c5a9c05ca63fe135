"""The mark: not seen, read again after PNG and JPEG, of one version and no other."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from raysd.errors import RequestError
from raysd.serve import watermark
from tests.pictures import photo

DIGESTS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(8)]


def saved(image: Image.Image, kind: str, **options: object) -> Image.Image:
    body = io.BytesIO()
    image.save(body, kind, **options)
    return Image.open(io.BytesIO(body.getvalue())).convert("RGB")


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    apart = np.asarray(one.convert("RGB"), float) - np.asarray(other, float)
    return float(10 * np.log10(255**2 / (apart**2).mean()))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = {
    "photo": photo(1, 512).resize((512, 512)),
    "small": photo(2, 64).resize((64, 64)),
    "odd": photo(3, 120).resize((93, 70)),
    "noise": noise(64, 64),
    "white": Image.new("RGB", (64, 64), "white"),
    "black": Image.new("RGB", (64, 64), "black"),
    "red": Image.new("RGB", (64, 64), "red"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("digest", DIGESTS[:4])
def test_it_is_read_after_saving_and_not_seen(name: str, digest: str) -> None:
    image = PICTURES[name]
    marked = watermark.mark(image, digest)
    assert (marked.size, marked.mode) == (image.size, "RGB")
    # Flat black, white and full colours have no room on one side, and are changed more.
    assert psnr(image, marked) > (40 if name in ("white", "black", "red") else 47)
    # A pixel moves by its four coefficients' amplitudes at most (5), and once more where room was to be made.
    assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(marked, int)).max() <= 11
    for again in (saved(marked, "PNG"), saved(marked, "JPEG", quality=90), saved(marked, "JPEG", quality=95)):
        assert (watermark.read(again) == watermark.message(digest)).all()
        assert watermark.drawn_by(again, digest)


def test_a_large_picture_bears_more() -> None:
    marked = watermark.mark(PICTURES["photo"], DIGESTS[0])
    for worse in (saved(marked, "JPEG", quality=75), saved(marked, "WEBP", quality=80)):
        assert watermark.drawn_by(worse, DIGESTS[0])


@pytest.mark.parametrize("name", PICTURES)
def test_no_mark_and_anothers_mark_are_not_taken_for_it(name: str) -> None:
    marked = watermark.mark(PICTURES[name], DIGESTS[0])
    assert [watermark.drawn_by(marked, digest) for digest in DIGESTS] == [True] + [False] * 7
    assert not any(watermark.drawn_by(PICTURES[name], digest) for digest in DIGESTS)


def test_by_chance_bits_are_right_as_often_as_coins_fall() -> None:
    """So that `AGREE` means what its docstring says: unmarked pictures have no bits of their own in common."""
    right = []
    for seed in range(40):
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        right += [(watermark.read(image) == watermark.message(digest)).sum() for digest in DIGESTS]
    assert abs(np.mean(right) - 16) < 1
    assert max(right) < watermark.AGREE


def test_the_message_is_the_digests_beginning() -> None:
    assert "".join(map(str, watermark.message("80000001" + "f" * 56))) == "1" + "0" * 30 + "1"


def test_the_mark_is_laid_out_the_same_in_each_release() -> None:
    """Pictures that are marked already must be read by what comes after."""
    bits, signs = watermark._plan(8, 8)
    layout = (bits.astype(np.int8) * signs.astype(np.int8)).tobytes() + signs.astype(np.int8).tobytes()
    assert hashlib.sha256(layout).hexdigest() == "16a71cf2a492c4541058ba3c44e648af7c43c732116a4c8406550be7a6043cdb"
    assert {int(count) for count in np.bincount(bits.ravel(), minlength=32)} == {8}


def test_a_picture_that_is_too_small_names_its_width() -> None:
    with pytest.raises(RequestError, match="width 40"):
        watermark.mark(Image.new("RGB", (40, 40)), DIGESTS[0])
