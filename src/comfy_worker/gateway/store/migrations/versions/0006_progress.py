"""How far a running job is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("jobs", sa.Column("progress", sa.JSON))
    op.add_column("jobs", sa.Column("progress_number", sa.BigInteger))


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("jobs", "progress_number")
    op.drop_column("jobs", "progress")
