"""Whose key a job was submitted with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and its index; jobs from before have no owner."""
    op.add_column("jobs", sa.Column("owner", sa.String(64), nullable=False, server_default=""))
    op.create_index("jobs_owner", "jobs", ["owner", "created_at"])


def downgrade() -> None:
    """Drop both."""
    op.drop_index("jobs_owner", "jobs")
    op.drop_column("jobs", "owner")
