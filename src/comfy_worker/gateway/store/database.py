"""Opens the database, SQLite or PostgreSQL, and turns its outages into `DatabaseUnavailable`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import DatabaseUnavailable

log = logging.getLogger(__name__)

WRITES = {"takes_write_lock": True}
"""Execution options of connections that write: SQLite's lock is acquired at the start of a transaction."""

_SQLITE_TIMEOUT_S = 10.0
"""How long a statement waits for SQLite's lock, unless the URL says (`?timeout=`)."""
_POOL_TIMEOUT_S = 10.0
_IDLE_IN_TRANSACTION_S = 15
"""PostgreSQL drops a connection that is idle in a transaction for so many seconds: a process that is paused would keep
its rows locked for all others."""
_NETWORK = {
    # A server that has vanished is noticed in seconds; the system's defaults are hours.
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    # Set when connecting, without a transaction.
    "options": f"-c idle_in_transaction_session_timeout={_IDLE_IN_TRANSACTION_S}s",
}
_LOG_INTERVAL_S = 10.0
START_TIMEOUT_S = 20.0
"""How long a process that starts waits for its database."""
_RETRY_S = 0.1

Result = TypeVar("Result")


def connect(url: str, pool_size: int = 10, max_connections: int = 30) -> Engine:
    """Return the SQLAlchemy engine for a database URL; `postgresql://` gets the driver that is installed.

    Args:
        url: of the database.
        pool_size: how many connections to PostgreSQL stay open.
        max_connections: how many there are at most.

    Raises:
        InvalidInput: it is not a URL.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The original message contains the URL with its password.
        raise InvalidInput(
            "DATABASE_URL cannot be read: it must be like postgresql://user:password@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed, pool_size, max_connections)


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        _make_private(Path(url.database))
    timeout = {} if "timeout" in url.query else {"timeout": _SQLITE_TIMEOUT_S}
    # Parameters are hidden because they may be secrets, and the texts of errors are logged.
    engine = create_engine(url, connect_args=timeout, hide_parameters=True)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_in_sqlite)
    return engine


def _make_private(file: Path) -> None:
    """Let only their owner read a database's files; SQLite gives the others the permissions of the first."""
    with suppress(OSError):  # opening the database reports a missing folder
        file.touch(mode=0o600)
    for one in (file, *(file.with_name(f"{file.name}-{part}") for part in ("wal", "shm"))):
        # Files that belong to somebody else have to be protected by them.
        with suppress(FileNotFoundError, PermissionError):
            one.chmod(0o600)


def _postgresql(url: URL, pool_size: int, max_connections: int) -> Engine:
    arguments = {name: value for name, value in _NETWORK.items() if name not in url.query}
    return create_engine(
        url,
        connect_args=arguments,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=max_connections - pool_size,
        pool_timeout=_POOL_TIMEOUT_S,
    )


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # Otherwise Python's sqlite3 begins transactions by itself.
    connection.isolation_level = None
    cursor = connection.cursor()
    # With less than FULL, a power failure could lose a job that was accepted.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_in_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("takes_write_lock")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class WriteLock:
    """Lets one thread of this process at a time write to an SQLite database.

    SQLite's own lock is not fair: a thread that polls for it may wait for ten seconds while others write.
    """

    def __init__(self, engine: Engine) -> None:
        """Take the SQLAlchemy engine; with PostgreSQL, this locks nothing."""
        self._lock = threading.Lock() if engine.dialect.name == "sqlite" else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Acquire the lock and hold it.

        Raises:
            sqlalchemy.exc.TimeoutError: others hold it for too long.
        """
        if self._lock is None:
            yield
            return
        if not self._lock.acquire(timeout=_SQLITE_TIMEOUT_S):
            raise NoConnectionFree
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def raises_database_unavailable() -> Iterator[None]:
    """Turn errors of an unavailable database in this block into `DatabaseUnavailable`, without their statements.

    Raises:
        DatabaseUnavailable: it does not answer, is locked for too long, or is full.
    """
    try:
        yield
    except (DBAPIError, NoConnectionFree) as error:
        if not _is_unavailable(error):
            raise
        _outage_log.write(_reason(error))
        raise DatabaseUnavailable(
            "The gateway's database cannot be used at the moment", hint="Try again in a while"
        ) from None


def wait_for_database(action: Callable[[], Result], seconds: float = START_TIMEOUT_S) -> Result:
    """Return the result of an action on the database, which may still be starting like this process.

    Raises:
        DatabaseUnavailable: it does not answer for so many seconds.
    """
    retrying = Retrying(
        retry=retry_if_exception_type(DatabaseUnavailable),
        stop=stop_after_delay(seconds),
        wait=wait_fixed(_RETRY_S),
        reraise=True,
    )
    return retrying(action)


def _is_unavailable(error: DBAPIError | NoConnectionFree) -> bool:
    if isinstance(error, (NoConnectionFree, OperationalError, InterfaceError)):
        return True
    return error.connection_invalidated


def _reason(error: DBAPIError | NoConnectionFree) -> str:
    """Return the part of an error that may be logged: its kind, without addresses, names and statements."""
    if not isinstance(error, DBAPIError):
        return "no connection is free"
    kind = type(error.orig).__name__
    detail = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", None)
    return f"{kind}, {detail}" if detail else kind


class _OutageLog:
    """Logs why the database cannot be used, but not for every statement."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[str, float] | None = None

    def write(self, reason: str) -> None:
        """Log the reason, unless it was just logged."""
        now = time.monotonic()
        with self._lock:
            if self._last is not None and self._last[0] == reason and now - self._last[1] < _LOG_INTERVAL_S:
                return
            self._last = (reason, now)
        log.warning("the database cannot be used: %s", reason)


_outage_log = _OutageLog()
