"""Messages to webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "webhook_messages",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("prediction_id", sa.String(26), nullable=False),
        sa.Column("event", sa.String(10), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("due", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_messages"),
        sa.ForeignKeyConstraint(
            ["prediction_id"], ["predictions.id"], name="fk_webhook_messages_prediction_id_predictions"
        ),
    )
    op.create_index("ix_webhook_messages_due", "webhook_messages", ["due"])


def downgrade() -> None:
    op.drop_table("webhook_messages")
