"""A connection to a Redis that may be away: one command waits for it, later ones fail at once until it is back."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TIMEOUT_S = 1.0
"""How long one command may take; after that, Redis counts as away."""
_PROBE_S = 0.25
"""Between two checks whether it is back."""
_PROBE_KEY = "comfy:probe"
_PROBE_KEPT_S = 60


class RedisAway(Exception):
    """Redis does not answer, or refuses writes."""


def connect(url: str, timeout_s: float = TIMEOUT_S) -> Redis:
    """Return a client that connects with its first command, and tries each command once.

    Raises:
        ValueError: it is not the URL of a Redis.
    """
    return Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
    )


class RedisConnection:
    """Commands to a Redis, from any thread. While it is away they fail at once, and a thread checks for its return."""

    def __init__(self, url: str, on_return: Callable[[Redis], None], consequence: str) -> None:
        """Connect at the first command.

        Args:
            url: of the Redis.
            on_return: called before other commands use it again; it may raise `RedisError`.
            consequence: what its absence means, for the log.
        """
        self._client = connect(url)
        self._on_return = on_return
        self._consequence = consequence
        self._lock = threading.Lock()
        self._is_away = False
        self._closing = threading.Event()

    def call(self, command: Callable[[Redis], Result]) -> Result:
        """Return what a command returns.

        Raises:
            RedisAway: it cannot be used.
        """
        if self._is_away:
            raise RedisAway
        try:
            return command(self._client)
        except RedisError as error:
            self._note_away(error)
            raise RedisAway from None
        finally:
            self._close_idle_connections()

    def close(self) -> None:
        """Stop checking for its return, and close all connections; each further command opens its own."""
        self._closing.set()
        self._close_idle_connections()

    def _close_idle_connections(self) -> None:
        """Close the connections that no thread uses, if this is closed."""
        if self._closing.is_set():
            self._client.connection_pool.disconnect(inuse_connections=False)

    def _note_away(self, error: RedisError) -> None:
        with self._lock:
            if self._is_away or self._closing.is_set():
                return
            self._is_away = True
        # Without its text, which may contain the address and the data.
        log.warning("Redis cannot be used (%s): %s", type(error).__name__, self._consequence)
        threading.Thread(target=self._wait_for_return, name="redis-away", daemon=True).start()

    def _wait_for_return(self) -> None:
        try:
            self._probe_until_back()
        finally:
            self._close_idle_connections()

    def _probe_until_back(self) -> None:
        while not self._closing.wait(_PROBE_S):
            try:
                # A write: a Redis that is full or a replica is of no use.
                self._client.set(_PROBE_KEY, 1, ex=_PROBE_KEPT_S)
                self._on_return(self._client)
            except RedisError:
                continue
            self._is_away = False
            log.info("Redis can be used again")
            with contextlib.suppress(RedisAway):
                # Again, for what has become pending meanwhile.
                self.call(self._on_return)
            return
