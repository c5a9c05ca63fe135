"""Blind studies: what is compared, its pairs of pictures, and the reviewers' votes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("first_ref", sa.Text(), nullable=False),
        sa.Column("first_digest", sa.String(64), nullable=False),
        sa.Column("second_ref", sa.Text(), nullable=False),
        sa.Column("second_digest", sa.String(64), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("guidance", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_studies"),
        sa.UniqueConstraint("name", name="uq_studies_name"),
    )
    op.create_table(
        "study_pairs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("token", sa.String(32), nullable=False),
        sa.Column("first_picture", sa.String(32), nullable=False),
        sa.Column("second_picture", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_study_pairs"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_study_pairs_study_id", ondelete="CASCADE"),
        sa.UniqueConstraint("study_id", "number", name="uq_study_pairs_study_id_number"),
    )
    op.create_table(
        "study_votes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("pair_id", sa.Integer(), nullable=False),
        sa.Column("reviewer", sa.String(60), nullable=False),
        sa.Column("choice", sa.String(6), nullable=False),
        sa.Column("shown_left", sa.String(6), nullable=False),
        sa.Column("voted", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_study_votes"),
        sa.ForeignKeyConstraint(["pair_id"], ["study_pairs.id"], name="fk_study_votes_pair_id", ondelete="CASCADE"),
        sa.UniqueConstraint("pair_id", "reviewer", name="uq_study_votes_pair_id_reviewer"),
        sa.CheckConstraint("choice IN ('first', 'second', 'tie')", name="ck_study_votes_choice"),
    )


def downgrade() -> None:
    for table in ("study_votes", "study_pairs", "studies"):
        op.drop_table(table)
