"""How often a job was put back into the queue."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; of jobs from before nobody counted."""
    op.add_column("jobs", sa.Column("retries", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Remove the column."""
    op.drop_column("jobs", "retries")
