"""Evaluate a model, alone or beside another: draw, measure, compare, keep."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysd import revision
from raysd.config import EvaluationSpec, load
from raysd.data.dataset import Dataset, prepare
from raysd.data.source import public, without_secrets
from raysd.errors import RequestError
from raysd.evaluate.features import Extractor, Matcher, extractor, matcher
from raysd.evaluate.judging import By, Drawn, Reference, Score, difference, judge
from raysd.evaluate.losses import Errors, Meter, loss_terms, losses
from raysd.evaluate.pictures import Album, draw_album, model_digest
from raysd.evaluate.prompts import BUNDLED, Prompt, read_prompts, unique
from raysd.evaluate.records import Evaluation, Judged, Neighbour
from raysd.evaluate.reference import MOST, data_spec, extract, features_of, loss_pictures
from raysd.evaluate.scores import clip_scores, nearest
from raysd.references import Located, locate
from raysd.registry.records import timestamp
from raysd.storage import Storage

Watch = Callable[[dict[str, Any]], None]
"""Told what happens: {"kind": "phase" | "notice" | "data" | "count", …}, as `raysd.train.follow`'s."""
MOST_NEAREST = 16


def evaluate(ref: str, against: str | None, spec: EvaluationSpec, storage: Storage, watch: Watch) -> Evaluation:
    """Evaluate model `ref`, beside `against` if given, and keep the result. What was drawn before is not drawn again.

    Raises NotFound, RequestError or DataError for a wrong request before anything is drawn; RaysdError if workers die.
    """
    located = [locate(name, storage) for name in (ref, against) if name is not None]
    if len({model_digest(model) for model in located}) < len(located):
        raise RequestError(f"--against {against}: the same model as {ref}")
    given = read_prompts(Path(spec.prompts).expanduser()) if spec.prompts else None
    compare = matcher(spec.clip)
    by_features = extractor(spec.inception, compare)
    dataset = _dataset(spec, storage, watch)
    work = _Work(spec, storage, watch, given or _prompts(dataset), compare, by_features, dataset)
    evaluation = work.run(located)
    storage.write(f"{evaluation.model.album}/{evaluation.key}.json", json.dumps(evaluation.to_json()).encode())
    return evaluation


def spec_of(ref: str, source: str | None, given: Mapping[str, Any], storage: Storage) -> EvaluationSpec:
    """A spec from what a user gave: None is the default. The data is read as suits the model. Raises RequestError."""
    values = {name: value for name, value in given.items() if value is not None}
    if source is not None:
        values["data"] = data_spec(source, locate(ref, storage)).model_dump(mode="json")
    return load(EvaluationSpec, values)


class _Work:
    """One evaluation while it is made."""

    def __init__(
        self,
        spec: EvaluationSpec,
        storage: Storage,
        watch: Watch,
        prompts: tuple[Prompt, ...],
        compare: Matcher,
        by_features: Extractor,
        dataset: Dataset | None,
    ):
        self.spec, self.storage, self.watch, self.dataset = spec, storage, watch, dataset
        self.prompts, self.compare, self.extractor = prompts, compare, by_features
        self.by = By(by_features.name, compare.name, compare.scale)

    def run(self, located: Sequence[Located]) -> Evaluation:
        self.alike = len({loss_terms(model) for model in located}) == 1
        self.other_split = [model.ref for model in located if self._learnt_otherwise(model)]
        self.texts = self.compare.texts([prompt.text for prompt in self.prompts])
        errors = [self._errors(model) for model in located]
        self.reference = self._reference()
        albums = [self._draw(model) for model in located]
        drawn = [self._drawn(album) for album in albums]
        judged = [self._judged(*row) for row in zip(located, albums, drawn, errors, strict=True)]
        return Evaluation(
            key=self._key(located),
            created=timestamp(),
            code=revision.code(),
            spec=_public(self.spec),
            features=self.by.features,
            matcher=self.by.matcher,
            prompts=self.prompts,
            data=self._data(),
            model=judged[0],
            against=judged[1] if len(judged) > 1 else None,
            differences=self._differences(drawn, errors),
            warnings=self._warnings(),
        )

    def _errors(self, model: Located) -> tuple[Errors, Errors | None] | None:
        """Of the held-out and of as many training pictures."""
        if self.dataset is None or not self.dataset.validation:
            return None
        assert self.spec.data is not None
        side, most = self.spec.data.resolution, self.spec.losses
        meter = Meter(model)
        found: list[Errors] = []
        for split, examples in (("held-out", self.dataset.validation), ("training", self.dataset.train)):
            pictures = loss_pictures(examples, side, most)
            count = self._counter(f"loss of {model.ref} on {split} pictures")
            found.append(meter.errors(pictures, self.spec.timesteps, progress=count))
        return found[0], found[1]

    def _learnt_otherwise(self, model: Located) -> bool:
        """Whether it was trained on pictures, and not as they are split here: it may have seen the held-out ones."""
        known = model.version.record.get("data_digest") if model.version else None
        return self.dataset is not None and known not in (None, self.dataset.digest)

    def _reference(self) -> Reference | None:
        if self.dataset is None or self.spec.data is None:
            return None
        examples = _examples(self.dataset)
        count = self._counter("features of the data")
        features = features_of(examples, self.spec.data.resolution, self.extractor, count)
        return Reference(features.vectors, min(len(self.dataset.train), len(examples)))

    def _draw(self, model: Located) -> Album:
        album = Album(model, self.prompts, self.spec, self.storage)
        draw_album(album, self.spec, self._counter(f"draw with {model.ref}"))
        return album

    def _drawn(self, album: Album) -> Drawn:
        numbers = range(self.spec.count)
        count = self._counter(f"features of {album.located.ref}'s pictures")
        features = extract(album.pictures(), len(numbers), self.extractor, count)
        same = self.compare is self.extractor
        images = features if same else extract(album.pictures(), len(numbers), self.compare, count)
        prompts = [album.prompt_of(number) for number in numbers]
        return Drawn(features.vectors, features.logits, images.vectors, self.texts[prompts], prompts)

    def _judged(
        self, model: Located, album: Album, drawn: Drawn, errors: tuple[Errors, Errors | None] | None
    ) -> Judged:
        self.watch({"kind": "phase", "text": f"scores of {model.ref}"})
        return Judged(
            ref=model.version.ref if model.version else model.ref,
            digest=model_digest(model),
            album=album.folder,
            scores=judge(drawn, self.reference, self.by, self.spec.seed),
            losses=losses(*errors, seed=self.spec.seed) if errors else None,
            nearest=self._nearest(album, drawn),
        )

    def _nearest(self, album: Album, drawn: Drawn) -> tuple[Neighbour, ...]:
        """The pictures most like a training picture, most alike first."""
        if self.dataset is None or self.reference is None or not self.reference.train:
            return ()
        places, similarity = nearest(drawn.features, self.reference.vectors[: self.reference.train])
        chosen = np.argsort(-similarity, kind="stable")[:MOST_NEAREST].tolist()
        train = self.dataset.train
        found = [(n, train[int(places[n])]) for n in chosen]
        return tuple(Neighbour(n, e.name, e.path, float(similarity[n])) for n, e in found)

    def _differences(
        self, drawn: Sequence[Drawn], errors: Sequence[tuple[Errors, Errors | None] | None]
    ) -> tuple[Score, ...]:
        if len(drawn) < 2:
            return ()
        one, two = (clip_scores(each.images, each.texts) for each in drawn)
        found = [difference("clip_score", one, two, "higher", self.by.matcher, self.spec.seed)]
        if self.alike and not self.other_split and errors[0] is not None and errors[1] is not None:
            held = [_per_picture(each[0]) for each in errors if each is not None]
            found.append(difference("validation_loss", held[0], held[1], "lower", "", self.spec.seed))
        return tuple(found)

    def _data(self) -> dict[str, Any] | None:
        if self.dataset is None or self.spec.data is None:
            return None
        return {
            "source": self.dataset.report.origin,
            "digest": self.dataset.digest,
            "train": len(self.dataset.train),
            "validation": len(self.dataset.validation),
        }

    def _warnings(self) -> tuple[str, ...]:
        found = list(self.dataset.report.warnings) if self.dataset else []
        if self.spec.clip is None:
            found.append(
                "CLIP score by the bundled judge, which knows simple shapes alone: give --clip for other pictures"
            )
        if not self.alike:
            found.append("validation losses are not compared: the models predict different things, or at another scale")
        found += [
            f"{ref} was trained on other pictures, or another split of these: its losses may be of pictures that it has seen"
            for ref in self.other_split
        ]
        if self.dataset is not None and not self.dataset.validation:
            found.append("no losses: no picture of the data is held out (data.validation)")
        if self.spec.count <= len(self.prompts):
            found.append(f"no diversity: no prompt has two pictures (give --count above {len(self.prompts)})")
        if self.dataset is None:
            found.append("no data: no losses, FID, KID, precision, recall or nearest training pictures (give --data)")
        elif len(self.dataset.train) + len(self.dataset.validation) > MOST:
            found.append(f"the reference is {MOST:,} of the data's pictures")
        if self.spec.count < len(self.prompts):
            found.append(f"{self.spec.count} pictures show the first of {len(self.prompts)} prompts: raise --count")
        return tuple(found)

    def _key(self, located: Sequence[Located]) -> str:
        parts = [
            self.spec.model_dump_json(),
            self.dataset.digest if self.dataset else "",
            *map(model_digest, located),
            json.dumps([[prompt.text, prompt.negative] for prompt in self.prompts]),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _counter(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.watch({"kind": "count", "text": what, "done": done, "of": of})


def _dataset(spec: EvaluationSpec, storage: Storage, watch: Watch) -> Dataset | None:
    if spec.data is None:
        return None
    watch({"kind": "phase", "text": f"checking {public(spec.data.source)}"})
    dataset = prepare(
        spec.data, storage, lambda d, n: watch({"kind": "count", "text": "check pictures", "done": d, "of": n})
    )
    watch({"kind": "data", "report": dataset.report})
    return dataset


def _public(spec: EvaluationSpec) -> dict[str, Any]:
    """As it is kept and shown: without passwords and signatures in URLs."""
    body = spec.model_dump(mode="json")
    if spec.data is not None:
        body["data"]["source"] = without_secrets(spec.data.source)
    return body


def _prompts(dataset: Dataset | None) -> tuple[Prompt, ...]:
    """The data's own captions, held-out ones first, or the bundled list."""
    if dataset is None:
        return read_prompts(BUNDLED)
    captions = [example.caption for example in (*dataset.validation, *dataset.train)]
    return unique([Prompt(caption) for caption in captions])


def _examples(dataset: Dataset) -> tuple[Any, ...]:
    return (*dataset.train, *dataset.validation)[:MOST]


def _per_picture(errors: Errors) -> NDArray[np.float64]:
    return errors.mean(axis=(1, 2))
