"""Brings a database up to the tables of this version, with Alembic."""

from __future__ import annotations

import threading
from pathlib import Path

from sqlalchemy import Engine, inspect, text

_MIGRATIONS = Path(__file__).parent / "migrations"
_alone = threading.Lock()
"""Alembic keeps state in variables of its modules."""


def bring_up_to_date(engine: Engine, version: str | None = None) -> None:
    """Run every migration up to a version, or the newest, that the database has not seen.

    If several processes start at once, one of them does it.
    """
    version = version or newest_version()
    if _version_of(engine) == version:
        return
    # Imported late: it takes a tenth of a gateway's start, and is seldom needed.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with _alone, engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)


def newest_version() -> str:
    """Return the version of the last migration, by the names of their files."""
    return max(file.name.partition("_")[0] for file in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


def _version_of(engine: Engine) -> str | None:
    """Return the database's version; None for a new database."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return version
