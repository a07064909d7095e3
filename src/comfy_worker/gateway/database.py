"""The database itself: SQLite set up to survive a kill, and one gateway at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url

from comfy_worker.errors import InvalidInput

WRITES = {"takes_write_lock": True}
"""Execution options of connections that write: SQLite's lock is taken at once, not when it may be too late."""

_BUSY_TIMEOUT_S = 30.0
_OWNER_LOCK = 0x636F6D67
"""Any number that nobody else locks in PostgreSQL."""
_TAKE_OVER_S = 20.0
"""How long a gateway that starts waits for one that ends."""
_LOOK_S = 0.1


def connect(url: str) -> Engine:
    """Return the engine for a database URL; a bare `postgresql://` gets the driver that is installed."""
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": _BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_in_sqlite)
        return engine
    return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # Python's own module would begin transactions when it sees fit.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_in_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("takes_write_lock")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def owned(engine: Engine, take_over_s: float = _TAKE_OVER_S) -> Iterator[None]:
    """Be the only gateway of a database within this block: two would run every job twice.

    Raises:
        InvalidInput: another gateway uses it and does not end.
    """
    with _locked_file(engine, take_over_s) if engine.dialect.name == "sqlite" else _locked(engine, take_over_s):
        yield


def _in_use() -> InvalidInput:
    return InvalidInput("Another gateway uses this database", hint="Give each its own DATA_DIR or DATABASE_URL")


@contextmanager
def _locked_file(engine: Engine, take_over_s: float) -> Iterator[None]:
    try:
        with FileLock(f"{engine.url.database}.lock", timeout=take_over_s):
            yield
    except Timeout:
        raise _in_use() from None


@contextmanager
def _locked(engine: Engine, take_over_s: float) -> Iterator[None]:
    deadline = time.monotonic() + take_over_s
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.execute(text(f"SELECT pg_try_advisory_lock({_OWNER_LOCK})")).scalar_one():
            if time.monotonic() >= deadline:
                raise _in_use()
            time.sleep(_LOOK_S)
        try:
            yield
        finally:
            # Closed instead of given back: the lock lasts as long as the connection.
            connection.invalidate()
