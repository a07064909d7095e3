"""Brings a database up to the tables of this version, with Alembic."""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

_MIGRATIONS = Path(__file__).parent / "migrations"
_alone = threading.Lock()
"""Alembic keeps what it does in variables of its modules."""


def bring_up_to_date(engine: Engine, version: str = "head") -> None:
    """Run every migration up to a version that the database has not seen; of several who start at once, one does."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with _alone, engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)
