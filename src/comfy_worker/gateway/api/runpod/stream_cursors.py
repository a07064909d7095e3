"""How far clients of `/stream` have heard of their jobs: for as long as the job is there, and one of few thousands."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from redis import Redis

_MOST = 4096
_KEPT_S = 86_400

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Cursor:
    """What a client was told of a job.

    Attributes:
        after: the number of the last event; -1 for none.
        has_output: whether the output was among it.
    """

    after: int = -1
    has_output: bool = False


class Cursors(Protocol):
    """The cursors of all clients."""

    async def of(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and a job that is there."""

    async def keep(self, client: str, job_id: str, cursor: Cursor) -> None:
        """Keep what a client was told."""

    async def forget(self, client: str, job_id: str) -> None:
        """Forget what a client was told of a job that is gone."""


class LocalCursors:
    """The cursors in memory: the one that was used longest ago goes first if there are too many."""

    def __init__(self, most: int = _MOST) -> None:
        """Take how many are kept."""
        self._most = most
        self._cursors: OrderedDict[tuple[str, str], Cursor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cursors)

    async def of(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and a job that is there."""
        cursor = self._cursors.get((client, job_id), Cursor())
        if (client, job_id) in self._cursors:
            self._cursors.move_to_end((client, job_id))
        return cursor

    async def keep(self, client: str, job_id: str, cursor: Cursor) -> None:
        """Keep what a client was told."""
        self._cursors[client, job_id] = cursor
        self._cursors.move_to_end((client, job_id))
        if len(self._cursors) > self._most:
            self._cursors.popitem(last=False)

    async def forget(self, client: str, job_id: str) -> None:
        """Forget what a client was told of a job that is gone."""
        self._cursors.pop((client, job_id), None)


class RedisCursors:
    """The cursors in a Redis, for several processes; while it is away, each process remembers its own."""

    def __init__(self, url: str) -> None:
        """Take the URL of the Redis."""
        # Loaded late: only several gateways need Redis's client.
        from comfy_worker.gateway.events.redis_connection import RedisAway, RedisConnection

        self._away = RedisAway
        self._link = RedisConnection(url, lambda _client: None, "clients of /stream may be told things twice")
        self._own = LocalCursors()

    async def of(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and a job that is there."""
        own = await self._own.of(client, job_id)
        try:
            kept = await self._do(lambda redis: cast("bytes | None", redis.get(_key(client, job_id))))
        except self._away:
            return own
        if kept is None:
            return own
        after, _, has_output = kept.partition(b":")
        return max(own, Cursor(int(after), has_output == b"1"), key=lambda cursor: (cursor.after, cursor.has_output))

    async def keep(self, client: str, job_id: str, cursor: Cursor) -> None:
        """Keep what a client was told."""
        value = f"{cursor.after}:{int(cursor.has_output)}"
        try:
            await self._do(lambda redis: redis.set(_key(client, job_id), value, ex=_KEPT_S))
        except self._away:
            await self._own.keep(client, job_id, cursor)

    async def forget(self, client: str, job_id: str) -> None:
        """Forget what a client was told of a job that is gone; one that cannot be reached expires by itself."""
        await self._own.forget(client, job_id)
        try:
            await self._do(lambda redis: redis.delete(_key(client, job_id)))
        except self._away:
            return

    async def _do(self, command: Callable[[Redis], Answer]) -> Answer:
        return await run_in_threadpool(self._link.call, command)


def _key(client: str, job_id: str) -> str:
    return f"comfy:cursors:{client}:{job_id}"


def make_cursors(settings: GatewaySettings) -> Cursors:
    """Return the cursors for the settings: in memory, or in Redis for several processes."""
    return RedisCursors(settings.broker_url.get_secret_value()) if settings.api_cache == "redis" else LocalCursors()
