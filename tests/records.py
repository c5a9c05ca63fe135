"""A queue and its records without a model: pictures are made, not drawn."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from PIL import Image
from sqlalchemy import delete
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from raysd.database import Base, Database
from raysd.errors import StorageError
from raysd.serve.drawing import Drawing
from raysd.serve.predictions import Ask, Claim, NewPrediction, Picture
from raysd.serve.queue import Queue
from raysd.storage import Storage, digest


class Clock:
    """A time that tests move."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self, _session: Session | None = None) -> float:
        return self.now


class Forgetful(Database):
    """Loses the answer to the next commit after `lose` is set, as a server that restarts does."""

    lose = False

    @contextmanager
    def writing(self) -> Iterator[Session]:
        with super().writing() as session:
            yield session
        if self.lose:
            self.lose = False
            raise away()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forgetful]:
    """A database of each kind for all tests of a file: making one takes longer than most of them."""
    folder = tmp_path_factory.mktemp("database")
    local = request.param == "sqlite"
    database = Forgetful(
        f"sqlite:///{folder}/raysd.db" if local else request.getfixturevalue("postgres").url(), Storage(str(folder))
    )
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def database(migrated: Forgetful) -> Forgetful:
    """A database of each kind, empty."""
    with migrated.writing() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    return migrated


def away() -> StorageError:
    """What the database door raises when PostgreSQL closes the connection."""
    error = StorageError("database: server closed the connection")
    error.__cause__ = OperationalError("", {}, psycopg.OperationalError("server closed the connection"))
    return error


def new(prompt: str = "a cat", *, negative: str = "", seed: int = 1, count: int = 1, **changes: Any) -> NewPrediction:
    drawing = Drawing(prompt=prompt, negative=negative, seed=seed, count=count, steps=4)
    drawn_by = {"ref": "cats@3", "digest": "3" * 64, "shadow_of": None}
    drawn_by |= {name: changes.pop(name) for name in drawn_by if name in changes}
    return NewPrediction(Ask(**{"api": "predictions", "model": "cats", "drawing": drawing, **changes}), **drawn_by)


def png(shade: int) -> bytes:
    """A picture with something in it, different for each shade."""
    image = Image.linear_gradient("L").resize((64, 64)).rotate(7 * shade % 360).convert("RGB")
    image.paste((shade % 256, 60, 200 - shade % 200), (8, 8, 8 + shade % 40, 40))
    body = io.BytesIO()
    image.save(body, "PNG")
    return body.getvalue()


def pictures(storage: Storage, claim: Claim, shade: int = 0) -> list[Picture]:
    """The pictures of a claim, written to the storage."""
    found = []
    for number in range(claim.prediction.drawing["count"]):
        body, path = png(shade + number), f"generated/1970-01-12/{claim.id}-{number}.png"
        storage.write(path, body)
        found.append(Picture(number, path, digest(body), claim.prediction.drawing["seed"] + number, 64, 64))
    return found


def drawn(queue: Queue, storage: Storage, request: NewPrediction, shade: int = 0) -> list[str]:
    """Submit, claim and finish; the ids of the generations."""
    prediction, _ = queue.submit(request)
    (claim,) = queue.claim("worker", request.ask.model, id=prediction.id)
    assert queue.finish(claim, pictures(storage, claim, shade), {"predict_time": 0.5})
    return [f"{prediction.id}-{number}" for number in range(request.ask.drawing.count)]
