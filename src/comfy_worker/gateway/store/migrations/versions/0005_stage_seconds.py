"""How long jobs were in each stage."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table; jobs that ended before do not count."""
    op.create_table(
        "stage_seconds",
        sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("stage", sa.String(16), primary_key=True),
        sa.Column("up_to", sa.Float, primary_key=True),
        sa.Column("jobs", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Remove the table."""
    op.drop_table("stage_seconds")
