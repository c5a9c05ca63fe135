"""What is measured of a trial's pictures, where the objective asks for it: once, when its training is over."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raysd.config import SearchSpec, TrainingSpec
from raysd.config.search import SCORES
from raysd.data.picture import read_picture
from raysd.draw import Request, draw_batch, open_pipeline
from raysd.evaluate import scores
from raysd.evaluate.features import Extractor, Matcher, extractor, matcher
from raysd.evaluate.prompts import Prompt, read_prompts, unique
from raysd.evaluate.reference import MOST, extract, plain_crop
from raysd.models import is_adapter
from raysd.references import Located, locate
from raysd.seeding import seed_of
from raysd.storage import Storage
from raysd.train import runs
from raysd.train.frozen import FrozenData, base_of
from raysd.train.publish import chosen_checkpoint, write_files


def wanted(spec: SearchSpec) -> tuple[str, ...]:
    """The metrics of the objective that need pictures."""
    return tuple(metric for metric in spec.objective if metric in SCORES)


def prompts_of(spec: SearchSpec, frozen: FrozenData) -> tuple[Prompt, ...]:
    """The file's, else the data's captions, held-out ones first. Raises NotFound, RequestError."""
    if spec.evaluation.prompts:
        return read_prompts(Path(spec.evaluation.prompts).expanduser())
    return unique([Prompt(item.caption) for item in (*frozen.validation, *frozen.train)])


def reference(spec: SearchSpec, frozen: FrozenData, side: int) -> NDArray[np.float32] | None:
    """Features of the data's pictures for KID, [N, D]; the driver computes them once, the trials share them."""
    if "kid" not in wanted(spec):
        return None
    by, _ = judges(spec)
    items = (*frozen.validation, *frozen.train)[:MOST]
    pictures = (plain_crop(read_picture(item.path), side) for item in items)
    found: NDArray[np.float32] = extract(pictures, len(items), by, lambda done, of: None).vectors.numpy()
    return found


def score_run(
    spec: SearchSpec,
    training: TrainingSpec,
    root: str,
    name: str,
    prompts: Sequence[Prompt],
    real: NDArray[np.float32] | None,
) -> dict[str, float]:
    """The metrics of the objective that need pictures, of the weights that run `name` would publish. In any process."""
    storage = Storage(root)
    run = runs.storage_of(storage, name)
    base = locate(base_of(training, FrozenData.load(run)), storage)
    by, compare = judges(spec)
    requests = _requests(spec, prompts)
    with tempfile.TemporaryDirectory(prefix="raysd-") as scratch:
        pictures = _draw(_written(Path(scratch), run, training, base), requests, spec.evaluation.batch)
    found: dict[str, float] = {}
    if real is not None:
        found["kid"] = scores.kid(torch.from_numpy(real), by.pictures(pictures).vectors)[0]
    if "clip_score" in wanted(spec):
        texts = compare.texts([request.prompt for request in requests])
        found["clip_score"] = float(scores.clip_scores(compare.pictures(pictures).vectors, texts).mean())
    return found


def judges(spec: SearchSpec) -> tuple[Extractor, Matcher]:
    """What looks at the pictures. Raises NotFound, RequestError."""
    compare = matcher(spec.evaluation.clip)
    return extractor(spec.evaluation.inception, compare), compare


def _requests(spec: SearchSpec, prompts: Sequence[Prompt]) -> list[Request]:
    """The same prompts and seeds for every trial."""
    asked = spec.evaluation
    chosen = [prompts[number % len(prompts)] for number in range(asked.count)]
    seeds = [seed_of(asked.seed, "trial", number) for number in range(asked.count)]
    rows = zip(chosen, seeds, strict=True)
    return [Request(prompt.text, prompt.negative, seed, asked.steps, asked.guidance) for prompt, seed in rows]


def _written(out: Path, run: Storage, training: TrainingSpec, base: Located) -> Located:
    """The run's weights as a model on this machine."""
    write_files(run, chosen_checkpoint(run, training), training, base, out)
    adapters = [path for path in out.iterdir() if is_adapter(path.name)]
    return Located("trial", base.folder, adapters[0]) if adapters else Located("trial", out)


def _draw(model: Located, requests: Sequence[Request], batch: int) -> list[Image.Image]:
    pipeline = open_pipeline(model)
    starts = range(0, len(requests), batch)
    return [image for first in starts for image in draw_batch(pipeline, requests[first : first + batch])]
