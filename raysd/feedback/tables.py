"""The tables of generations and feedback. Times are epoch seconds."""

from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from raysd.database import Base

Thumb = Literal["up", "down"]
Choice = Literal["left", "right", "tie"]


class GenerationRow(Base):
    """One drawn picture, and the only place where its prompt is kept. `prompt` and `negative` are null where withheld.

    `path` is null once the picture is gone. A deleted one is a tombstone: no prompt, parameters, user or picture.
    `comparison` joins the two of a blind comparison; `blind` holds until somebody has chosen. `shadow_of` is the
    generation that a client saw, of which this is a second drawing by another version.
    """

    __tablename__ = "generations"
    __table_args__ = (
        UniqueConstraint("prediction_id", "number"),
        Index("ix_generations_model_created", "model", "created"),
        Index("ix_generations_kept_until", "kept_until"),
        Index("ix_generations_shadow_of", "shadow_of"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    prediction_id: Mapped[str] = mapped_column(String(26))
    number: Mapped[int]
    prompt: Mapped[str | None] = mapped_column(Text)
    negative: Mapped[str | None] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(BigInteger)
    parameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    model: Mapped[str] = mapped_column(Text)
    ref: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64))
    path: Mapped[str | None] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    width: Mapped[int]
    height: Mapped[int]
    owner: Mapped[str | None] = mapped_column(Text)
    user: Mapped[str | None] = mapped_column(Text)
    comparison: Mapped[str | None] = mapped_column(Text)
    blind: Mapped[bool]
    shadow_of: Mapped[str | None] = mapped_column(String(40))
    created: Mapped[float] = mapped_column(Double)
    kept_until: Mapped[float | None] = mapped_column(Double)
    deleted: Mapped[float | None] = mapped_column(Double)


class FeedbackRow(Base):
    """What one user said at one time: of a generation (thumb, stars, tags, text, report), or a choice between two.

    `blind` says whether the user could not know who drew which. Rows are never changed, but for texts on deletion.
    """

    __tablename__ = "feedback"
    __table_args__ = (
        CheckConstraint("thumb IN ('up', 'down')", name="thumb"),
        CheckConstraint("stars BETWEEN 1 AND 5", name="stars"),
        CheckConstraint("choice IN ('left', 'right', 'tie')", name="choice"),
        CheckConstraint("(generation_id IS NULL) = (choice IS NOT NULL)", name="subject"),
        Index("ix_feedback_generation_id", "generation_id"),
        Index("ix_feedback_user_created", "user", "created"),
        Index("ix_feedback_owner_created", "owner", "created"),
        Index("ix_feedback_created", "created"),
    )

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    generation_id: Mapped[str | None] = mapped_column(ForeignKey("generations.id"))
    thumb: Mapped[Thumb | None] = mapped_column(String(4))
    stars: Mapped[int | None]
    tags: Mapped[list[str]] = mapped_column(JSON)
    text: Mapped[str | None] = mapped_column(Text)
    report: Mapped[str | None] = mapped_column(Text)
    left_id: Mapped[str | None] = mapped_column(ForeignKey("generations.id"))
    right_id: Mapped[str | None] = mapped_column(ForeignKey("generations.id"))
    choice: Mapped[Choice | None] = mapped_column(String(5))
    blind: Mapped[bool]
    owner: Mapped[str | None] = mapped_column(Text)
    user: Mapped[str] = mapped_column(Text)
    seal_name: Mapped[str | None] = mapped_column(String(64), unique=True)
    seal_body: Mapped[str | None] = mapped_column(String(64))
    created: Mapped[float] = mapped_column(Double)
