"""What the workers of a run need to know of its data: cache keys and captions. Written once, read by every worker.

It freezes the data of a run: a resume trains on the same pictures whatever happened to the folder since.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysd.config.training import TrainingSpec
from raysd.data.augment import variant
from raysd.data.dataset import Dataset, Example
from raysd.references import Located, identity
from raysd.storage import Storage
from raysd.train.batches import Item
from raysd.words import counted, named

FILE = "plan.json"


@dataclass(frozen=True)
class FrozenData:
    """The data of a run. `latents` and `text` name the cache spaces under the storage's root."""

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    weights: tuple[float, ...] | None
    empty: str  # key of the empty caption
    latents: str
    text: str
    data_digest: str
    base_digest: str
    base: str = ""
    """What `spec.base` meant when the data were frozen, as a version's number: an alias may have moved since."""

    def save(self, run: Storage) -> None:
        run.write(FILE, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, run: Storage) -> "FrozenData":
        body = json.loads(run.read(FILE))
        for name in ("train", "validation"):
            body[name] = tuple(_item(row) for row in body[name])
        body["weights"] = None if body["weights"] is None else tuple(body["weights"])
        return cls(**body)


def freeze(dataset: Dataset, located: Located, spec: TrainingSpec) -> FrozenData:
    """Keys hold all that an encoding depends on and nothing else: never the learning rate."""
    folder, family = located.folder, located.family
    balanced = spec.data.balance != "none"
    return FrozenData(
        train=tuple(_item_of(example, spec, spec.data.augment.variants) for example in dataset.train),
        validation=tuple(_item_of(example, spec, 1) for example in dataset.validation),
        weights=tuple(example.weight for example in dataset.train) if balanced else None,
        empty=text_key(""),
        latents=f"cache/latents/{identity(folder, family.autoencoder_part)[:16]}-fp32",
        text=f"cache/text/{identity(folder, *family.text_parts)[:16]}-fp32",
        data_digest=dataset.digest,
        base_digest=identity(folder),
        base=located.ref,
    )


def cut_captions(dataset: Dataset, located: Located) -> str | None:
    """A warning where captions are longer than the text encoder reads: it never sees the rest of them."""
    family, folder = located.family, located.folder
    most, _ = family.text_shape(folder)
    examples = sorted((*dataset.train, *dataset.validation), key=lambda example: example.name)
    # A token is a byte at least, and two are the ends: for short captions no tokenizer is imported.
    doubtful = list({e.caption for e in examples if len(e.caption.lower().encode()) > most - 2})
    if not doubtful:
        return None
    tokens = family.tokenizer(folder)(doubtful, truncation=False, verbose=False).input_ids
    long = {caption for caption, ids in zip(doubtful, tokens, strict=True) if len(ids) > most}
    cut = [example.name for example in examples if example.caption in long]
    what = f"cut to the {most} tokens that the text encoder reads"
    return f"{counted(len(cut), 'caption')} {what}: {named(cut)}" if cut else None


def base_of(spec: TrainingSpec, frozen: FrozenData | None) -> str:
    """The reference of a run's base: what it meant when its data were frozen, but that files may lie elsewhere by now."""
    return frozen.base if frozen is not None and frozen.base and not Path(frozen.base).is_absolute() else spec.base


def total_steps(spec: TrainingSpec, pictures: int) -> int:
    """Optimiser steps of the run: given, or enough to pass `epochs` times over the pictures."""
    if spec.optim.steps is not None:
        return spec.optim.steps
    assert spec.optim.epochs is not None
    return max(1, -int(-spec.optim.epochs * pictures // spec.optim.batch_size))


def captions(frozen: FrozenData) -> dict[str, str]:
    """{key: caption} of every caption that the run needs, the empty one included."""
    return {frozen.empty: "", **{item.text: item.caption for item in (*frozen.train, *frozen.validation)}}


def latent_key(example: Example, spec: TrainingSpec, index: int) -> str:
    """Content of the picture, what is done to it, and the resolution. The autoencoder is in the space's name."""
    chosen = variant(spec.data.augment, example.id, index, spec.seed)
    return _digest(example.id, chosen.to_json(), str(spec.data.resolution))


def text_key(caption: str) -> str:
    return _digest(caption)


def _item_of(example: Example, spec: TrainingSpec, variants: int) -> Item:
    keys = tuple(latent_key(example, spec, index) for index in range(variants))
    return Item(keys, example.caption, text_key(example.caption), example.path, example.id)


def _item(row: dict[str, Any]) -> Item:
    return Item(**{**row, "latents": tuple(row["latents"])})


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
