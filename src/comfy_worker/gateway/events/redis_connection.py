"""A Redis that may be away: nobody waits for it longer than once, and who needs it is told when it is back."""

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

Answer = TypeVar("Answer")

PATIENCE_S = 1.0
"""How long one command may take; after that the Redis is away."""
_PROBE_S = 0.25
"""Between two looks whether it is back."""
_PROBE_KEY = "comfy:probe"
_PROBE_KEPT_S = 60


class RedisAway(Exception):
    """The Redis does not answer, or refuses to be written to."""


def connect(url: str, timeout_s: float = PATIENCE_S) -> Redis:
    """Return a client that connects when it is used first, and tries each command once.

    Raises:
        ValueError: it is no URL of a Redis.
    """
    return Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
    )


class RedisConnection:
    """Commands to a Redis, from any thread. While it is away they fail at once, and a thread looks when it is back."""

    def __init__(self, url: str, when_back: Callable[[Redis], None], what: str) -> None:
        """Take the parts.

        Args:
            url: of the Redis.
            when_back: does what was put off, before anybody else uses the Redis again; it may raise `RedisError`.
            what: the Redis is missed for, for the log.
        """
        self._client = connect(url)
        self._when_back = when_back
        self._what = what
        self._lock = threading.Lock()
        self._is_away = False
        self._closing = threading.Event()

    @property
    def is_away(self) -> bool:
        """Whether it did not answer lately."""
        return self._is_away

    def call(self, command: Callable[[Redis], Answer]) -> Answer:
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
            self._let_connections_go()

    def close(self) -> None:
        """Look for it no more if it is away, and keep no connection: each further command has one of its own."""
        self._closing.set()
        self._let_connections_go()

    def _let_connections_go(self) -> None:
        """Close what nobody uses at the moment, if this is closed."""
        if self._closing.is_set():
            self._client.connection_pool.disconnect(inuse_connections=False)

    def _note_away(self, error: RedisError) -> None:
        with self._lock:
            if self._is_away or self._closing.is_set():
                return
            self._is_away = True
        # Its text may have the address, and what was sent.
        log.warning("Redis cannot be used (%s): %s", type(error).__name__, self._what)
        threading.Thread(target=self._look_for_it, name="redis-away", daemon=True).start()

    def _look_for_it(self) -> None:
        try:
            self._look_until_back()
        finally:
            self._let_connections_go()

    def _look_until_back(self) -> None:
        while not self._closing.wait(_PROBE_S):
            try:
                # Written, not only asked: one that is full or a replica is of no use.
                self._client.set(_PROBE_KEY, 1, ex=_PROBE_KEPT_S)
                self._when_back(self._client)
            except RedisError:
                continue
            self._is_away = False
            log.info("Redis can be used again")
            with contextlib.suppress(RedisAway):
                # What was put off while the rest was done.
                self.call(self._when_back)
            return
