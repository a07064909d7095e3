"""One gateway at a time: two at the same database would run every job twice, where the gateway itself runs them.

Where others run them several gateways may use a database, and take turns at what one of them has to do.
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

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store.database import START_PATIENCE_S, raises_database_unavailable

log = logging.getLogger(__name__)

_OWNER_LOCK = 0x636F6D67
"""Any number that nobody else locks in PostgreSQL."""
_TURN_LOCK = 0x636F6D69
"""Another one."""
_TAKE_OVER_S = START_PATIENCE_S
"""How long a gateway that starts waits for one that ends."""
_LOOK_S = 0.1
_GUARD_S = 1.0
"""Between two looks whether the lock is still ours."""
_LEAVING_S = 3.0
"""How long our own lost connection may still hold the lock; who holds it longer is somebody else."""

_TAKE = text(f"SELECT pg_try_advisory_lock({_OWNER_LOCK})")
_TAKE_YOUR_TIME = text("SET LOCAL idle_in_transaction_session_timeout = 0")
_TAKE_TURN = text(f"SELECT pg_try_advisory_xact_lock({_TURN_LOCK})")
_SESSION = text("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
_END_SESSION = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND backend_start = :backend_start"
)


@contextmanager
def gateway_lock(
    engine: Engine, take_over_s: float = _TAKE_OVER_S, when_lost: Callable[[], None] | None = None
) -> Iterator[None]:
    """Be the only gateway of a database within this block.

    PostgreSQL's lock goes with its connection; it is taken again when that was lost.

    Args:
        engine: of the database.
        take_over_s: how long to wait for a gateway that ends, or for a database that starts.
        when_lost: called, in a thread of its own, if another gateway was quicker to take the lock again.

    Raises:
        InvalidInput: another gateway uses it and does not end.
        DatabaseUnavailable: it does not answer.
    """
    if engine.dialect.name == "sqlite":
        with _locked_file(engine, take_over_s):
            yield
    else:
        with _locked(engine, take_over_s, when_lost or _nothing):
            yield


@contextmanager
def leader_lock(engine: Engine) -> Iterator[bool]:
    """Yield whether this gateway has the lock that all gateways of a database share; it holds it within this block.

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
    # PostgreSQL lets it go with the transaction, and so with a connection that is lost.
    with ExitStack() as stack:
        with raises_database_unavailable():
            connection = stack.enter_context(engine.connect())
            # What is done meanwhile is done by other connections. This transaction locks no rows.
            connection.execute(_TAKE_YOUR_TIME)
            is_ours = bool(connection.execute(_TAKE_TURN).scalar_one())
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
def _locked(engine: Engine, take_over_s: float, when_lost: Callable[[], None]) -> Iterator[None]:
    lock = _Lock(engine)
    _take_within(lock, take_over_s)
    guard = _Guard(lock, when_lost)
    guard.start()
    try:
        yield
    finally:
        guard.stop()
        lock.let_go()


def _take_within(lock: _Lock, seconds: float) -> None:
    """Take the lock, waiting for whoever holds it and for the database itself."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if lock.take():
                return
            refusal: InvalidInput | DatabaseUnavailable = _in_use()
        except DatabaseUnavailable as error:
            refusal = error
        if time.monotonic() >= deadline:
            raise refusal
        time.sleep(_LOOK_S)


class _Lock:
    """PostgreSQL's lock, held by a connection of its own for as long as that lives; one thread at a time uses it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None
        self._session: dict[str, Any] | None = None

    def take(self) -> bool:
        """Return whether it is ours now.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        with raises_database_unavailable():
            connection = self._engine.connect()
            try:
                self._end_lost_session(connection)
                is_ours = bool(connection.execute(_TAKE).scalar_one())
                if is_ours:
                    self._session = dict(connection.execute(_SESSION).mappings().one())
                    self._connection = connection
            finally:
                if self._connection is not connection:
                    _close(connection)
        return is_ours

    def _end_lost_session(self, connection: Connection) -> None:
        """End our own session of before, which a server that did not notice its loss would keep for hours."""
        if self._session is not None:
            connection.execute(_END_SESSION, self._session)

    def is_held(self) -> bool:
        """Return whether the connection that holds it still lives."""
        if self._connection is None:
            return False
        try:
            with raises_database_unavailable():
                self._connection.execute(text("SELECT 1"))
        except DatabaseUnavailable:
            # Used once more, it would connect anew and hold nothing.
            self.let_go()
            return False
        return True

    def let_go(self) -> None:
        """Give it up."""
        if self._connection is not None:
            _close(self._connection)
            self._connection = None


def _close(connection: Connection) -> None:
    # Closed instead of given back: the lock lasts as long as the connection.
    connection.invalidate()
    connection.close()


class _Guard:
    """Looks after a lock that was taken, and takes it again when its connection was lost."""

    def __init__(self, lock: _Lock, when_lost: Callable[[], None]) -> None:
        self._lock = lock
        self._when_lost = when_lost
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
        while not self._ending.wait(_GUARD_S):
            if self._lock.is_held():
                continue
            log.warning("the connection that holds the lock on the database was lost")
            if not self._take_again():
                self._when_lost()
                return
            if not self._ending.is_set():
                log.info("the lock on the database is ours again")

    def _take_again(self) -> bool:
        """Take the lock again; return False if somebody else has it."""
        refused_at: float | None = None
        while not self._ending.wait(_LOOK_S):
            try:
                if self._lock.take():
                    return True
            except DatabaseUnavailable:
                refused_at = None
                continue
            refused_at = time.monotonic() if refused_at is None else refused_at
            if time.monotonic() - refused_at >= _LEAVING_S:
                return False
        return True


def _nothing() -> None:
    """Be told of a lost lock without doing anything about it."""
