"""A study whose pictures were made and not drawn: the first version's are red, the second's blue."""

from pathlib import Path

from PIL import Image

from raysd.database import Database
from raysd.storage import Storage
from raysd.study.draw import plain_png
from raysd.study.studies import Plan, create, pictures
from raysd.study.tables import Pair, Study

RED, BLUE = (200, 30, 30), (30, 30, 200)


def plan(count: int = 8, prompts: tuple[str, ...] = ("a cat", "a dog"), **changes: object) -> Plan:
    values: dict[str, object] = {"first_ref": "tabby@3", "first_digest": "1" * 64, "second_ref": "tabby@4"}
    values |= {"second_digest": "2" * 64, "prompts": prompts, "count": count, "steps": 2, "guidance": 3.0}
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def opened(root: Path) -> tuple[Storage, Database]:
    storage = Storage(str(root))
    database = Database(f"sqlite:///{root}/raysd.db", storage)
    database.migrate()
    return storage, database


def made(root: Path, wanted: Plan, name: str = "one") -> tuple[Study, list[Pair]]:
    storage, database = opened(root)
    study, pairs = create(database, wanted, name)
    for pair in pairs:
        for picture, colour in ((pair.first_picture, RED), (pair.second_picture, BLUE)):
            shade = tuple(value + pair.number for value in colour)
            pictures(storage, name).write(f"{picture}.png", plain_png(Image.new("RGB", (64, 64), shade)))
    return study, pairs
