"""The data that a model is compared with: split as for its training, seen as its training saw it."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from PIL import Image

from raysd.config import DataSpec, load
from raysd.data.augment import Variant, apply
from raysd.data.dataset import Example
from raysd.data.picture import read_picture
from raysd.evaluate.features import Extractor, Features
from raysd.evaluate.losses import Pictures
from raysd.references import Located

MOST = 10_000
"""Reference pictures of one evaluation. Examples come in the order of their hash: the first ones are a random sample."""
CHUNK = 256
"""Pictures in memory at once."""

Progress = Callable[[int, int], None]


def data_spec(source: str, located: Located) -> DataSpec:
    """How to read `source` for a model: as its version was trained, else at the model's own resolution.

    A version's split depends on the content of the pictures and the share held out: the same pictures are held out here.
    """
    if located.version is not None and "data" in located.version.record.get("spec", {}):
        return load(DataSpec, {**located.version.record["spec"]["data"], "source": source})
    return load(DataSpec, {"source": source, "resolution": located.family.geometry(located.folder).size})


def features_of(examples: Sequence[Example], side: int, extractor: Extractor, progress: Progress) -> Features:
    """Features of the examples' plain crops. Raises DataError for one that cannot be read."""
    pictures = (plain_crop(read_picture(example.path), side) for example in examples)
    return extract(pictures, len(examples), extractor, progress)


def extract(pictures: Iterator[Image.Image], total: int, extractor: Extractor, progress: Progress) -> Features:
    """Features of a stream of pictures, of which few are in memory at once."""
    parts: list[Features] = []
    done = 0
    while chunk := list(islice(pictures, CHUNK)):
        parts.append(extractor.pictures(chunk))
        done += len(chunk)
        progress(done, total)
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(torch.cat([part.vectors for part in parts]), torch.cat(logits) if logits else None)


def loss_pictures(examples: Sequence[Example], side: int, most: int) -> Pictures:
    """The first `most` examples as the trainer's plain variant."""
    return [(apply(read_picture(example.path), Variant(), side), example.caption) for example in examples[:most]]


def plain_crop(picture: Image.Image, side: int) -> Image.Image:
    """The largest centred square, as the plain variant."""
    return picture.resize((side, side), Image.Resampling.LANCZOS, box=Variant().box(*picture.size))
