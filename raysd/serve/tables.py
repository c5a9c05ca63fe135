"""The tables of predictions, of API keys and of what counts against their limits. Times are epoch seconds."""

from typing import Any

from sqlalchemy import JSON, CheckConstraint, Double, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from raysd.database import Base
from raysd.serve.predictions import Api, Status


class PredictionRow(Base):
    """An accepted request. Once it has pictures, its prompt and user are in their generations alone.

    `token` grows by one a claim, and where another than its holder ends it: it fences those who lost theirs. `attempt` counts
    the claims, without those given back as none. `ticket` names the call that claimed, so that the call can be made again.
    `request_id` and `traceparent` (W3C) are those of the HTTP request, for who follows one through logs and traces. A
    `deleted` one is a tombstone: no prompt, user, pictures, nor digests of what it started from.
    """

    __tablename__ = "predictions"
    __table_args__ = (
        CheckConstraint(
            "status IN ('starting', 'processing', 'succeeded', 'failed', 'canceled', 'aborted')", name="status"
        ),
        Index("ix_predictions_status_model_created", "status", "model", "created"),
        Index("ix_predictions_owner_created", "owner", "created"),
        Index("ix_predictions_created", "created"),
        Index("ix_predictions_shadow_of", "shadow_of"),
    )

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    api: Mapped[Api] = mapped_column(String(16))
    owner: Mapped[str | None] = mapped_column(Text)
    user: Mapped[str | None] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    ref: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64))
    drawing: Mapped[dict[str, Any]] = mapped_column(JSON)
    count: Mapped[int]
    status: Mapped[Status] = mapped_column(String(10))
    error: Mapped[str | None] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    created: Mapped[float] = mapped_column(Double)
    started: Mapped[float | None] = mapped_column(Double)
    completed: Mapped[float | None] = mapped_column(Double)
    deadline: Mapped[float | None] = mapped_column(Double)
    cancel_requested: Mapped[bool]
    attempt: Mapped[int]
    token: Mapped[int]
    worker: Mapped[str | None] = mapped_column(Text)
    ticket: Mapped[str | None] = mapped_column(String(26))
    lease_end: Mapped[float | None] = mapped_column(Double)
    webhook: Mapped[str | None] = mapped_column(Text)
    webhook_events: Mapped[list[str]] = mapped_column(JSON)
    withhold: Mapped[bool]
    shadow_of: Mapped[str | None] = mapped_column(String(26))
    comparison: Mapped[str | None] = mapped_column(Text)
    seal_name: Mapped[str | None] = mapped_column(String(64), unique=True)
    seal_body: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(64))
    traceparent: Mapped[str | None] = mapped_column(String(55))
    deleted: Mapped[float | None] = mapped_column(Double)


class KeyRow(Base):
    """An API key: `digest` is the SHA-256 of what its owner holds. A limit that is null is none."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(Text)
    roles: Mapped[list[str]] = mapped_column(JSON)
    requests_per_minute: Mapped[int | None]
    pictures_per_day: Mapped[int | None]
    in_flight: Mapped[int | None]
    created: Mapped[float] = mapped_column(Double)
    revoked: Mapped[float | None] = mapped_column(Double)


class KeyRequestRow(Base):
    """A request of the last minute that is no prediction: feedback, an upload. Only of keys with a limit of requests."""

    __tablename__ = "key_requests"
    __table_args__ = (Index("ix_key_requests_key_created", "key", "created"),)

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    key: Mapped[str] = mapped_column(String(26))
    created: Mapped[float] = mapped_column(Double)
