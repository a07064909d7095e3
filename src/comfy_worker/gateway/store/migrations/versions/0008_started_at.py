"""A job's start is when ComfyUI runs it; there is no second column for that any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let jobs that were only being staged wait again, and drop the column."""
    # RunPod's own jobs never had the second time.
    op.execute(
        "UPDATE jobs SET state = 'IN_QUEUE', started_at = NULL "
        "WHERE state = 'IN_PROGRESS' AND began_at IS NULL AND backend NOT LIKE 'runpod:%'"
    )
    op.execute("UPDATE jobs SET started_at = began_at WHERE state = 'IN_PROGRESS' AND began_at IS NOT NULL")
    op.drop_column("jobs", "began_at")


def downgrade() -> None:
    """Add the column."""
    op.add_column("jobs", sa.Column("began_at", sa.Float))
    op.execute("UPDATE jobs SET began_at = started_at WHERE state = 'IN_PROGRESS'")
