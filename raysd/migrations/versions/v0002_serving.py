"""Serving: predictions and API keys, generations, and feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _predictions()
    _keys()
    _generations()
    _feedback()


def downgrade() -> None:
    for table in ("feedback", "generations", "api_keys", "predictions"):
        op.drop_table(table)


def _predictions() -> None:
    op.create_table(
        "predictions",
        sa.Column("id", sa.String(26), nullable=False),
        sa.Column("api", sa.String(16), nullable=False),
        sa.Column("owner", sa.Text()),
        sa.Column("user", sa.Text()),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("drawing", sa.JSON(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("started", sa.Double()),
        sa.Column("completed", sa.Double()),
        sa.Column("deadline", sa.Double()),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text()),
        sa.Column("ticket", sa.String(26)),
        sa.Column("lease_end", sa.Double()),
        sa.Column("webhook", sa.Text()),
        sa.Column("webhook_events", sa.JSON(), nullable=False),
        sa.Column("withhold", sa.Boolean(), nullable=False),
        sa.Column("shadow_of", sa.String(26)),
        sa.Column("comparison", sa.Text()),
        sa.Column("seal_name", sa.String(64)),
        sa.Column("seal_body", sa.String(64)),
        sa.Column("request_id", sa.String(64)),
        sa.Column("traceparent", sa.String(55)),
        sa.PrimaryKeyConstraint("id", name="pk_predictions"),
        sa.UniqueConstraint("seal_name", name="uq_predictions_seal_name"),
        sa.CheckConstraint(
            "status IN ('starting', 'processing', 'succeeded', 'failed', 'canceled', 'aborted')",
            name="ck_predictions_status",
        ),
    )
    op.create_index("ix_predictions_status_model_created", "predictions", ["status", "model", "created"])
    op.create_index("ix_predictions_owner_created", "predictions", ["owner", "created"])
    op.create_index("ix_predictions_created", "predictions", ["created"])


def _keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(26), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("pictures_per_day", sa.Integer()),
        sa.Column("in_flight", sa.Integer()),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )


def _generations() -> None:
    op.create_table(
        "generations",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("prediction_id", sa.String(26), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("prompt", sa.Text()),
        sa.Column("negative", sa.Text()),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("path", sa.Text()),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text()),
        sa.Column("user", sa.Text()),
        sa.Column("comparison", sa.Text()),
        sa.Column("blind", sa.Boolean(), nullable=False),
        sa.Column("shadow_of", sa.String(40)),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("kept_until", sa.Double()),
        sa.Column("deleted", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_generations"),
        sa.UniqueConstraint("prediction_id", "number", name="uq_generations_prediction_id_number"),
    )
    op.create_index("ix_generations_model_created", "generations", ["model", "created"])
    op.create_index("ix_generations_kept_until", "generations", ["kept_until"])
    op.create_index("ix_generations_shadow_of", "generations", ["shadow_of"])


def _feedback() -> None:
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(26), nullable=False),
        sa.Column("generation_id", sa.String(40)),
        sa.Column("thumb", sa.String(4)),
        sa.Column("stars", sa.Integer()),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("text", sa.Text()),
        sa.Column("report", sa.Text()),
        sa.Column("left_id", sa.String(40)),
        sa.Column("right_id", sa.String(40)),
        sa.Column("choice", sa.String(5)),
        sa.Column("blind", sa.Boolean(), nullable=False),
        sa.Column("owner", sa.Text()),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("seal_name", sa.String(64)),
        sa.Column("seal_body", sa.String(64)),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sa.UniqueConstraint("seal_name", name="uq_feedback_seal_name"),
        *(
            sa.ForeignKeyConstraint([column], ["generations.id"], name=f"fk_feedback_{column}")
            for column in ("generation_id", "left_id", "right_id")
        ),
        sa.CheckConstraint("thumb IN ('up', 'down')", name="ck_feedback_thumb"),
        sa.CheckConstraint("stars BETWEEN 1 AND 5", name="ck_feedback_stars"),
        sa.CheckConstraint("choice IN ('left', 'right', 'tie')", name="ck_feedback_choice"),
        sa.CheckConstraint("(generation_id IS NULL) = (choice IS NOT NULL)", name="ck_feedback_subject"),
    )
    op.create_index("ix_feedback_generation_id", "feedback", ["generation_id"])
    op.create_index("ix_feedback_user_created", "feedback", ["user", "created"])
    op.create_index("ix_feedback_created", "feedback", ["created"])
