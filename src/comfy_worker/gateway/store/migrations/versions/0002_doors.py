"""Which door a job came through, and what that door has to remember of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; jobs from before came through RunPod's door."""
    op.add_column("jobs", sa.Column("door", sa.String(32), nullable=False, server_default="runpod"))
    op.add_column("jobs", sa.Column("details", sa.JSON, nullable=False, server_default="{}"))


def downgrade() -> None:
    """Remove the columns."""
    op.drop_column("jobs", "details")
    op.drop_column("jobs", "door")
