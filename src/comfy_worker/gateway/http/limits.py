"""Limits of requests: how many with one key, and how large.

With API_CACHE=redis all processes count together. While Redis is away, requests are not counted and all are accepted;
they still need a key.
"""

from __future__ import annotations

import logging
import math
import re
import time
from typing import TYPE_CHECKING, Any

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from comfy_worker.gateway.errors import RateLimited
from comfy_worker.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

log = logging.getLogger(__name__)

_REDIS_TIMEOUT_S = 0.5
_RETRY_REDIS_S = 1.0
"""How long Redis is not used after it did not answer."""
_ENDPOINT = re.compile(r"^/v2/[^/]+(?=/)")
_ACTIONS = [
    (re.compile(pattern), action)
    for pattern, action in (
        (r"^/generate/sync/?$", "runsync"),
        (r"^/generate(/stream)?/?$", "run"),
        (r"^/api/workflow/(submit|batch)/?$", "run"),
        (r"^/api/video/generate/?$", "run"),
        (r"^/api/workflow/cancel/", "cancel"),
        (r"^/api/workflow/batch/[^/]+/cancel/?$", "cancel"),
        (r"^/task/?$", "run"),
        (r"^/api/v1/comfyui/workflows/[^/]+/execute/?$", "run"),
        # RunPod's webhook, whose body contains a whole result.
        (r"^/runpod/webhook/", "runsync"),
    )
]
"""The paths of the other APIs, and RunPod's action whose limits apply to them."""
MB = 1_000_000
RUN_LIMIT = 10 * MB
RUNSYNC_LIMIT = 20 * MB
_OTHER_LIMIT = MB


def action_of(path: str) -> str:
    """Return RunPod's name of what a path does (`run`, `runsync`, `cancel`), or else its first segment."""
    for pattern, action in _ACTIONS:
        if pattern.match(path):
            return action
    return _ENDPOINT.sub("", path).strip("/").partition("/")[0]


def body_limit(path: str) -> int:
    """Return the largest size of a request to a path, in bytes."""
    return {"run": RUN_LIMIT, "runsync": RUNSYNC_LIMIT}.get(action_of(path), _OTHER_LIMIT)


class TooManyRequests(RateLimited):
    """A key has reached its rate limit.

    Attributes:
        retry_after_s: seconds until the next request is accepted.
    """

    def __init__(self, limit: RateLimitItem, retry_after_s: int) -> None:
        super().__init__(f"More than {limit} with this key", hint=f"Try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RateLimits:
    """Counts the requests of each key, in this process or, for all processes, in Redis."""

    def __init__(self, settings: GatewaySettings) -> None:
        given = {
            "run": settings.rate_limit_run,
            "runsync": settings.rate_limit_runsync,
            "cancel": settings.rate_limit_cancel,
        }
        self._limits = {action: parse(limit) if limit else None for action, limit in given.items()}
        self._other = parse(settings.rate_limit_status) if settings.rate_limit_status else None
        self._pool: ConnectionPool | None = None
        storage: Storage = MemoryStorage()
        if settings.api_cache == "redis":
            storage, self._pool = _in_redis(settings.broker_url.get_secret_value())
        self._counter = SlidingWindowCounterRateLimiter(storage)
        self._away_until = 0.0
        self._is_away = False

    async def count(self, client: str, path: str) -> None:
        """Count a request.

        Raises:
            TooManyRequests: the key has reached its limit.
        """
        action = action_of(path)
        limit = self._limits.get(action, self._other)
        # Unknown paths share one counter, or a client could fill the memory with names.
        name = action if action in (*self._limits, "status") else "other"
        if limit is None or time.monotonic() < self._away_until:
            return
        try:
            reset_at = await self._hit(limit, client, name)
        except StorageError as error:
            self._note_away(error)
            return
        if self._is_away:
            self._is_away = False
            log.info("Redis is back: requests are counted again")
        if reset_at is not None:
            raise TooManyRequests(limit, max(1, math.ceil(reset_at - time.time())))

    async def _hit(self, limit: RateLimitItem, *names: str) -> float | None:
        """Count a request; return None if it is accepted, or else the time when the next one is."""
        if await self._counter.hit(limit, *names):
            return None
        return (await self._counter.get_window_stats(limit, *names)).reset_time

    def _note_away(self, error: StorageError) -> None:
        self._away_until = time.monotonic() + _RETRY_REDIS_S
        if not self._is_away:
            self._is_away = True
            kind = type(error.storage_error).__name__
            log.warning("Redis does not answer (%s): requests are not counted until it is back", kind)

    async def close(self) -> None:
        """Close the connections, in the event loop that used them."""
        if self._pool is not None:
            await self._pool.disconnect()


def _in_redis(url: str) -> tuple[Storage, ConnectionPool]:
    # Imported late: only several gateways need Redis's client.
    from redis.asyncio import ConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    pool = ConnectionPool.from_url(
        url,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    options: Any = {"connection_pool": pool}
    return RedisStorage("async+redis://", True, "redispy", "comfy:limits", **options), pool
