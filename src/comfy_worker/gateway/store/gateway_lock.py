"""Locks between gateways of the same database.

With ENGINE=local only one gateway may use a database, because two would run every job twice. With the other engines
several gateways share one, and a leader does what only one of them has to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, text
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store.database import START_TIMEOUT_S, raises_database_unavailable

log = logging.getLogger(__name__)

_GATEWAY_LOCK = 0x636F6D67
"""A number that nothing else locks in PostgreSQL."""
_LEADER_LOCK = 0x636F6D69
"""Another one."""
_TAKE_OVER_S = START_TIMEOUT_S
"""How long a gateway that starts waits for one that ends."""
_RETRY_S = 0.1
_CHECK_S = 1.0
"""Between two checks whether the lock is still held."""
_OWN_SESSION_S = 3.0
"""How long our own lost connection may still hold the lock; after that, another gateway holds it."""

_TRY_LOCK = text(f"SELECT pg_try_advisory_lock({_GATEWAY_LOCK})")
_NO_IDLE_TIMEOUT = text("SET LOCAL idle_in_transaction_session_timeout = 0")
_TRY_LEADER_LOCK = text(f"SELECT pg_try_advisory_xact_lock({_LEADER_LOCK})")
_SESSION = text("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
_END_SESSION = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND backend_start = :backend_start"
)


@contextmanager
def gateway_lock(
    engine: Engine, take_over_s: float = _TAKE_OVER_S, on_lost: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the lock of the only gateway of a database.

    PostgreSQL's lock belongs to a connection; when that is lost, the lock is acquired again.

    Args:
        engine: of the database.
        take_over_s: how long to wait for a gateway that ends, or for a database that starts.
        on_lost: called, in a thread of its own, if another gateway acquired the lock first.

    Raises:
        InvalidInput: another gateway uses it and does not end.
        DatabaseUnavailable: it does not answer.
    """
    if engine.dialect.name == "sqlite":
        with _locked_file(engine, take_over_s):
            yield
    else:
        with _locked(engine, take_over_s, on_lost or _nothing):
            yield


@contextmanager
def leader_lock(engine: Engine) -> Iterator[bool]:
    """Try to hold the lock of the leader of the gateways of a database; yield whether this gateway holds it.

    Raises:
        DatabaseUnavailable: it does not answer.
    """
    if engine.dialect.name == "sqlite":
        lock = FileLock(f"{engine.url.database}.leader_lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
        return
    # PostgreSQL releases it at the end of the transaction, also if the connection is lost.
    with ExitStack() as stack:
        with raises_database_unavailable():
            connection = stack.enter_context(engine.connect())
            # The leader works with other connections; this transaction locks no rows.
            connection.execute(_NO_IDLE_TIMEOUT)
            is_ours = bool(connection.execute(_TRY_LEADER_LOCK).scalar_one())
        yield is_ours


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
def _locked(engine: Engine, take_over_s: float, on_lost: Callable[[], None]) -> Iterator[None]:
    lock = _Lock(engine)
    _acquire(lock, take_over_s)
    monitor = _LockMonitor(lock, on_lost)
    monitor.start()
    try:
        yield
    finally:
        monitor.stop()
        lock.release()


def _acquire(lock: _Lock, seconds: float) -> None:
    """Acquire the lock; wait for the gateway that holds it, and for the database."""
    for attempt in Retrying(
        retry=retry_if_exception_type((InvalidInput, DatabaseUnavailable)),
        stop=stop_after_delay(seconds),
        wait=wait_fixed(_RETRY_S),
        reraise=True,
    ):
        with attempt:
            if not lock.acquire():
                raise _in_use()


class _Lock:
    """PostgreSQL's lock, held by a connection of its own; one thread at a time uses it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None
        self._session: dict[str, Any] | None = None

    def acquire(self) -> bool:
        """Try to acquire it; return whether it is held now.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        with raises_database_unavailable():
            connection = self._engine.connect()
            try:
                self._end_lost_session(connection)
                is_ours = bool(connection.execute(_TRY_LOCK).scalar_one())
                if is_ours:
                    self._session = dict(connection.execute(_SESSION).mappings().one())
                    self._connection = connection
            finally:
                if self._connection is not connection:
                    _close(connection)
        return is_ours

    def _end_lost_session(self, connection: Connection) -> None:
        """End our own lost session, which a server that has not noticed the loss would keep for hours."""
        if self._session is not None:
            connection.execute(_END_SESSION, self._session)

    def is_held(self) -> bool:
        """Return whether the connection that holds it still works."""
        if self._connection is None:
            return False
        try:
            with raises_database_unavailable():
                self._connection.execute(text("SELECT 1"))
        except DatabaseUnavailable:
            # Another use would reconnect, without the lock.
            self.release()
            return False
        return True

    def release(self) -> None:
        """Release it."""
        if self._connection is not None:
            _close(self._connection)
            self._connection = None


def _close(connection: Connection) -> None:
    # Invalidated, not returned to the pool: the lock lasts as long as the connection.
    connection.invalidate()
    connection.close()


class _LockMonitor:
    """Checks a lock that is held, and acquires it again when its connection is lost."""

    def __init__(self, lock: _Lock, on_lost: Callable[[], None]) -> None:
        self._lock = lock
        self._on_lost = on_lost
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._ending.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ending.wait(_CHECK_S):
            if self._lock.is_held():
                continue
            log.warning("the connection that holds the lock on the database was lost")
            if not self._acquire_again():
                self._on_lost()
                return
            if not self._ending.is_set():
                log.info("the lock on the database is held again")

    def _acquire_again(self) -> bool:
        """Acquire the lock again; return False if another gateway holds it."""
        refused_at: float | None = None
        while not self._ending.wait(_RETRY_S):
            try:
                if self._lock.acquire():
                    return True
            except DatabaseUnavailable:
                refused_at = None
                continue
            refused_at = time.monotonic() if refused_at is None else refused_at
            if time.monotonic() - refused_at >= _OWN_SESSION_S:
                return False
        return True


def _nothing() -> None:
    """Ignore that the lock is lost."""
