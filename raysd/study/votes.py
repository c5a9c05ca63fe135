"""Who sees which pair when and on which side, and what they say of it."""

import hashlib
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from raysd.database import Database, take_turns, upsert
from raysd.errors import RequestError
from raysd.study.tables import Choice, Pair, Side, Study, Vote

Answer = Literal["left", "right", "tie"]
LONGEST_NAME = 60


@dataclass(frozen=True)
class Shown:
    """A pair as one reviewer sees it. `left` is the version shown on the left."""

    pair: Pair
    left: Side

    @property
    def left_picture(self) -> str:
        return self.pair.first_picture if self.left == "first" else self.pair.second_picture

    @property
    def right_picture(self) -> str:
        return self.pair.second_picture if self.left == "first" else self.pair.first_picture

    def meant(self, answer: Answer) -> Choice:
        """The version that an answer by side speaks for."""
        if answer == "tie":
            return "tie"
        right: Side = "second" if self.left == "first" else "first"
        return self.left if answer == "left" else right


@dataclass(frozen=True)
class Turn:
    """What a reviewer has to look at: the pairs left (the first is to be judged), how many are done, and of how many."""

    left: tuple[Shown, ...]
    done: int
    of: int


def order(study: Study, pairs: Sequence[Pair], reviewer: str) -> list[Shown]:
    """All pairs in the reviewer's own order. Each version is on the left in half of them (one more if they are odd).

    It follows from the study's key and the reviewer's name alone: a reload, a restart or another machine changes nothing.
    """
    person = reviewer.casefold()

    def drawn_lot(what: str, number: int) -> bytes:
        return hashlib.sha256(f"{study.key}\0{what}\0{number}\0{person}".encode()).digest()

    odd = drawn_lot("odd", 0)[0] % 2
    dealt = sorted(pairs, key=lambda pair: drawn_lot("side", pair.number))
    left: dict[int, Side] = {pair.id: "first" if (place + odd) % 2 else "second" for place, pair in enumerate(dealt)}
    return [Shown(pair, left[pair.id]) for pair in sorted(pairs, key=lambda pair: drawn_lot("order", pair.number))]


class Ballot:
    """The votes of one study. May be shared by threads, and by processes that use the same database."""

    def __init__(self, database: Database, study: Study, pairs: Sequence[Pair]):
        self.database, self.study, self.pairs = database, study, list(pairs)

    def turn(self, reviewer: str) -> Turn:
        """Where the reviewer is."""
        voted = self._voted(reviewer)
        left = [shown for shown in order(self.study, self.pairs, reviewer) if shown.pair.id not in voted]
        return Turn(tuple(left), len(self.pairs) - len(left), len(self.pairs))

    def vote(self, reviewer: str, token: str, answer: Answer) -> None:
        """Keep an answer; one given before to the same pair is replaced. Raises RequestError for a pair not of this study."""
        shown = next((shown for shown in order(self.study, self.pairs, reviewer) if shown.pair.token == token), None)
        if shown is None:
            raise RequestError("no such pair in this study: reload the page")
        values = {
            "pair_id": shown.pair.id,
            "choice": shown.meant(answer),
            "shown_left": shown.left,
            "voted": time.time(),
        }
        with self.database.writing() as session:
            take_turns(session, f"study {self.study.id}")  # two spellings of a name that come together are one reviewer
            upsert(session, Vote, {**values, "reviewer": self._as_written(session, reviewer)}, ("pair_id", "reviewer"))

    def undo(self, reviewer: str) -> None:
        """Take back the answer to the last pair before the one to be judged; nothing where there is none."""
        voted = self._voted(reviewer)
        seen = [shown.pair.id for shown in order(self.study, self.pairs, reviewer) if shown.pair.id in voted]
        if seen:
            with self.database.writing() as session:
                session.execute(delete(Vote).where(Vote.reviewer == reviewer, Vote.pair_id == seen[-1]))

    def known_as(self, name: str) -> str:
        """The reviewer's name as it is kept: as it was written first, whatever its case now.

        Raises RequestError for a name that is empty, too long or holds control characters.
        """
        plain = " ".join(unicodedata.normalize("NFC", name).split())
        if not plain or len(plain) > LONGEST_NAME or not plain.isprintable():
            raise RequestError(f"a name has 1 to {LONGEST_NAME} printable characters")
        with self.database.reading() as session:
            return self._as_written(session, plain)

    def _as_written(self, session: Session, name: str) -> str:
        """The spelling of a name under which there are votes, else the name."""
        query = select(Vote.reviewer).join(Pair).where(Pair.study_id == self.study.id)
        names = session.scalars(query.distinct()).all()
        return next((known for known in sorted(names) if known.casefold() == name.casefold()), name)

    def _voted(self, reviewer: str) -> set[int]:
        with self.database.reading() as session:
            query = select(Vote.pair_id).join(Pair).where(Pair.study_id == self.study.id)
            return set(session.scalars(query.where(Vote.reviewer == reviewer)).all())
