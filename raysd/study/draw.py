"""The pictures of a study: drawn a few at a time, so that a study that was stopped goes on where it was."""

import io
from collections.abc import Callable, Sequence

from PIL import Image

from raysd.draw import Request, draw
from raysd.errors import RequestError
from raysd.references import Located
from raysd.storage import Storage
from raysd.study.studies import drawn, pictures
from raysd.study.tables import Pair, Study

AT_ONCE = 16
"""Pictures between two loads of the model: what is lost at most when drawing is stopped."""

Work = tuple[Located, str, Request]
"""By which model, under which name, what."""


def draw_study(
    study: Study,
    pairs: Sequence[Pair],
    first: Located,
    second: Located,
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Draw what is missing and say how many pictures that was. `progress(done, total)` counts denoising steps.

    Raises RequestError where the two versions draw in different sizes: reviewers would know them apart.
    """
    album = pictures(storage, study.name)
    there = drawn(storage, study)
    work = [item for item in _work(study, pairs, first, second) if item[1] not in there]
    size = _size(album, next(iter(there))) if there else None
    total, done = study.steps * len(work), 0
    for part in _parts(work):
        located = part[0][0]

        def step(within: int, _total: int, before: int = done) -> None:
            if progress is not None:
                progress(before + within, total)

        for (_, name, _), image in zip(part, draw(located, [item[2] for item in part], step), strict=True):
            size = size or image.size
            if image.size != size:
                raise RequestError(
                    f"{located.ref}: draws {_by(image.size)}, the other version {_by(size)}: reviewers would know them apart"
                )
            album.write(f"{name}.png", plain_png(image))
        done += study.steps * len(part)
    return len(work)


def plain_png(image: Image.Image) -> bytes:
    """PNG of the pixels alone, RGB: no text, profile or date that could tell who drew it."""
    bare = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    body = io.BytesIO()
    bare.save(body, "PNG")
    return body.getvalue()


def _work(study: Study, pairs: Sequence[Pair], first: Located, second: Located) -> list[Work]:
    """Each side's first picture comes first: if their sizes differ, that is found before the rest is drawn."""
    requests = [Request(pair.prompt, seed=pair.seed, steps=study.steps, guidance=study.guidance) for pair in pairs]
    one = [(first, pair.first_picture, request) for pair, request in zip(pairs, requests, strict=True)]
    two = [(second, pair.second_picture, request) for pair, request in zip(pairs, requests, strict=True)]
    return [*one[:1], *two[:1], *two[1:], *one[1:]]


def _parts(work: Sequence[Work]) -> list[list[Work]]:
    """Consecutive pictures of one model, at most AT_ONCE."""
    parts: list[list[Work]] = []
    for item in work:
        if parts and parts[-1][0][0] is item[0] and len(parts[-1]) < AT_ONCE:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def _size(album: Storage, name: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(album.read(f"{name}.png"))) as picture:
        return picture.size


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
