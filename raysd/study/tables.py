"""The tables of blind studies. Times are epoch seconds."""

from typing import Literal

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from raysd.database import Base

Side = Literal["first", "second"]
Choice = Literal["first", "second", "tie"]


class Study(Base):
    """Two versions and how they drew. `key` is secret: from it follow the order and the sides that a reviewer sees."""

    __tablename__ = "studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created: Mapped[float] = mapped_column(Double)
    key: Mapped[str] = mapped_column(String(32))
    first_ref: Mapped[str] = mapped_column(Text)
    first_digest: Mapped[str] = mapped_column(String(64))
    second_ref: Mapped[str] = mapped_column(Text)
    second_digest: Mapped[str] = mapped_column(String(64))
    steps: Mapped[int]
    guidance: Mapped[float] = mapped_column(Double)


class Pair(Base):
    """One prompt and seed, drawn by both. `token` names the pair and the pictures' names are theirs, to reviewers."""

    __tablename__ = "study_pairs"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    number: Mapped[int]
    prompt: Mapped[str] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(BigInteger)
    token: Mapped[str] = mapped_column(String(32))
    first_picture: Mapped[str] = mapped_column(String(32))
    second_picture: Mapped[str] = mapped_column(String(32))


class Vote(Base):
    """What one reviewer said of one pair, by version and not by side; `shown_left` is the version that was on the left."""

    __tablename__ = "study_votes"
    __table_args__ = (
        UniqueConstraint("pair_id", "reviewer"),
        CheckConstraint("choice IN ('first', 'second', 'tie')", name="choice"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("study_pairs.id", ondelete="CASCADE"))
    reviewer: Mapped[str] = mapped_column(String(60))
    choice: Mapped[Choice] = mapped_column(String(6))
    shown_left: Mapped[Side] = mapped_column(String(6))
    voted: Mapped[float] = mapped_column(Double)
