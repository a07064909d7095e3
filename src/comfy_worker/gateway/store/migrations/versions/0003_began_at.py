"""When ComfyUI began a job, so that its time-out counts on over a restart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("jobs", sa.Column("began_at", sa.Float))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("jobs", "began_at")
