"""Predictions that were deleted, and requests that draw nothing but count against a key's limit."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("predictions", sa.Column("deleted", sa.Double()))
    op.create_index("ix_predictions_shadow_of", "predictions", ["shadow_of"])
    op.create_index("ix_feedback_owner_created", "feedback", ["owner", "created"])
    op.create_table(
        "key_requests",
        sa.Column("id", sa.String(26), nullable=False),
        sa.Column("key", sa.String(26), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_key_requests"),
    )
    op.create_index("ix_key_requests_key_created", "key_requests", ["key", "created"])


def downgrade() -> None:
    op.drop_table("key_requests")
    op.drop_index("ix_feedback_owner_created", "feedback")
    op.drop_index("ix_predictions_shadow_of", "predictions")
    op.drop_column("predictions", "deleted")
