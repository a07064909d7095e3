"""The database itself: SQLite set up to survive a kill and a power cut, and one word for a database that is away."""

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

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import DatabaseUnavailable

log = logging.getLogger(__name__)

WRITES = {"takes_write_lock": True}
"""Execution options of connections that write: SQLite's lock is taken at once, not when it may be too late."""

_SQLITE_PATIENCE_S = 10.0
"""How long a statement waits for SQLite's lock, if the URL does not say (`?timeout=`)."""
_POOL_PATIENCE_S = 10.0
_STANDS_STILL_S = 15
"""After so many seconds in the middle of a transaction PostgreSQL drops a process that does nothing: one that stands
still, as a machine does that is paused, would keep its rows locked for everybody else."""
_NETWORK = {
    # A server that is gone without a word is noticed in seconds, not in the hours of a system's defaults.
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    # Set as the connection is made: no transaction of its own that could break off.
    "options": f"-c idle_in_transaction_session_timeout={_STANDS_STILL_S}s",
}
_SAID_EVERY_S = 10.0
START_PATIENCE_S = 20.0
"""How long a process that starts waits for its database."""
_AGAIN_S = 0.1

Answer = TypeVar("Answer")


def connect(url: str, kept: int = 10, most: int = 30) -> Engine:
    """Return the engine for a database URL; a bare `postgresql://` gets the driver that is installed.

    Args:
        url: of the database.
        kept: connections to PostgreSQL that stay open once they were needed.
        most: connections to it at a time; who needs one more waits.

    Raises:
        InvalidInput: it is no URL.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # What they say has the URL in it, with its password.
        raise InvalidInput(
            "DATABASE_URL cannot be read: it must be like postgresql://user:password@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    # What a statement was given may be a secret, and an error's text is written to logs.
    return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed, kept, most)


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        _keep_private(Path(url.database))
    patience = {} if "timeout" in url.query else {"timeout": _SQLITE_PATIENCE_S}
    engine = create_engine(url, connect_args=patience, hide_parameters=True)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_in_sqlite)
    return engine


def _keep_private(file: Path) -> None:
    """Let nobody but their owner read a database's files; SQLite gives those beside it the permissions of the first."""
    with suppress(OSError):  # a folder that is not there is told of when the database is opened
        file.touch(mode=0o600)
    for one in (file, *(file.with_name(f"{file.name}-{part}") for part in ("wal", "shm"))):
        # One that belongs to somebody else is for them to protect.
        with suppress(FileNotFoundError, PermissionError):
            one.chmod(0o600)


def _postgresql(url: URL, kept: int, most: int) -> Engine:
    given = {name: value for name, value in _NETWORK.items() if name not in url.query}
    return create_engine(
        url,
        connect_args=given,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=kept,
        max_overflow=most - kept,
        pool_timeout=_POOL_PATIENCE_S,
    )


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # Python's own module would begin transactions when it sees fit.
    connection.isolation_level = None
    cursor = connection.cursor()
    # With less than FULL, a power cut could take a job back that was accepted.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_in_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("takes_write_lock")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class WriteQueue:
    """Lets one thread of this process at a time write to an SQLite database.

    A thread that waits for SQLite's own lock asks for it again and again, and has no place in a line: while others
    write, it may wait for ten seconds.
    """

    def __init__(self, engine: Engine) -> None:
        """Take the database's engine; PostgreSQL's writers do not wait for each other."""
        self._lock = threading.Lock() if engine.dialect.name == "sqlite" else None

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Wait until no other thread is within such a block.

        Raises:
            sqlalchemy.exc.TimeoutError: others are there for too long.
        """
        if self._lock is None:
            yield
            return
        if not self._lock.acquire(timeout=_SQLITE_PATIENCE_S):
            raise NoConnectionFree
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def raises_database_unavailable() -> Iterator[None]:
    """Within this block a database that cannot be used is an error of ours; nothing of its statement is told.

    Raises:
        DatabaseUnavailable: it is not there, is locked for too long, or has no room.
    """
    try:
        yield
    except (DBAPIError, NoConnectionFree) as error:
        if not _is_unavailable(error):
            raise
        _outage.say(_why(error))
        raise DatabaseUnavailable(
            "The gateway's database cannot be used at the moment", hint="Try again in a while"
        ) from None


def wait_for_database(action: Callable[[], Answer], seconds: float = START_PATIENCE_S) -> Answer:
    """Return what a process that starts asks of the database, once that answers: it may be starting too.

    Raises:
        DatabaseUnavailable: it does not for so long.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except DatabaseUnavailable:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_AGAIN_S)


def _is_unavailable(error: DBAPIError | NoConnectionFree) -> bool:
    if isinstance(error, (NoConnectionFree, OperationalError, InterfaceError)):
        return True
    return error.connection_invalidated


def _why(error: DBAPIError | NoConnectionFree) -> str:
    """Return what a log may have of an error: its kind, without addresses, names and statements."""
    if not isinstance(error, DBAPIError):
        return "no connection is free"
    kind = type(error.orig).__name__
    detail = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", None)
    return f"{kind}, {detail}" if detail else kind


class _Outage:
    """Says why the database cannot be used: not for every statement, of which there are many a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: tuple[str, float] | None = None

    def say(self, why: str) -> None:
        """Write it to the log, unless that was just done."""
        now = time.monotonic()
        with self._lock:
            if self._said is not None and self._said[0] == why and now - self._said[1] < _SAID_EVERY_S:
                return
            self._said = (why, now)
        log.warning("the database cannot be used: %s", why)


_outage = _Outage()
