"""How far each client has read the updates of its jobs through `/stream`: the few thousand latest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar, cast

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from redis import Redis

_MAX_CURSORS = 4096
_EXPIRES_S = 86_400

Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Cursor:
    """What a client has received of a job.

    Attributes:
        after: the number of the last event; -1 for none.
        has_output: whether it has received the output.
    """

    after: int = -1
    has_output: bool = False


class Cursors(Protocol):
    """The cursors of all clients."""

    async def get(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and an existing job."""

    async def store(self, client: str, job_id: str, cursor: Cursor) -> None:
        """Store what a client has received."""

    async def delete(self, client: str, job_id: str) -> None:
        """Delete the cursor of a client and a job that is gone."""


class LocalCursors:
    """The cursors in memory; if there are too many, the least recently used is deleted."""

    def __init__(self, max_cursors: int = _MAX_CURSORS) -> None:
        self._max_cursors = max_cursors
        self._cursors: OrderedDict[tuple[str, str], Cursor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cursors)

    async def get(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and an existing job."""
        cursor = self._cursors.get((client, job_id), Cursor())
        if (client, job_id) in self._cursors:
            self._cursors.move_to_end((client, job_id))
        return cursor

    async def store(self, client: str, job_id: str, cursor: Cursor) -> None:
        """Store what a client has received."""
        self._cursors[client, job_id] = cursor
        self._cursors.move_to_end((client, job_id))
        if len(self._cursors) > self._max_cursors:
            self._cursors.popitem(last=False)

    async def delete(self, client: str, job_id: str) -> None:
        """Delete the cursor of a client and a job that is gone."""
        self._cursors.pop((client, job_id), None)


class RedisCursors:
    """The cursors in Redis, for several processes; while it is away, each process keeps its own."""

    def __init__(self, url: str) -> None:
        # Loaded late: only several gateways need Redis's client.
        from comfy_worker.gateway.events.redis_connection import RedisAway, RedisConnection

        self._away = RedisAway
        self._link = RedisConnection(url, lambda _client: None, "clients of /stream may receive updates twice")
        self._own = LocalCursors()

    async def get(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and an existing job."""
        own = await self._own.get(client, job_id)
        try:
            stored = await self._do(lambda redis: cast("bytes | None", redis.get(_key(client, job_id))))
        except self._away:
            return own
        if stored is None:
            return own
        after, _, has_output = stored.partition(b":")
        return max(own, Cursor(int(after), has_output == b"1"), key=lambda cursor: (cursor.after, cursor.has_output))

    async def store(self, client: str, job_id: str, cursor: Cursor) -> None:
        """Store what a client has received."""
        value = f"{cursor.after}:{int(cursor.has_output)}"
        try:
            await self._do(lambda redis: redis.set(_key(client, job_id), value, ex=_EXPIRES_S))
        except self._away:
            await self._own.store(client, job_id, cursor)

    async def delete(self, client: str, job_id: str) -> None:
        """Delete the cursor of a client and a job that is gone; if Redis is away, it expires."""
        await self._own.delete(client, job_id)
        try:
            await self._do(lambda redis: redis.delete(_key(client, job_id)))
        except self._away:
            return

    async def _do(self, command: Callable[[Redis], Reply]) -> Reply:
        return await run_in_threadpool(self._link.call, command)


def _key(client: str, job_id: str) -> str:
    return f"comfy:cursors:{client}:{job_id}"


async def _get_cursors(request: Request) -> Cursors:
    cursors: Cursors = request.app.state.stream_cursors
    return cursors


StreamCursors = Annotated[Cursors, Depends(_get_cursors)]


def make_cursors(settings: GatewaySettings) -> Cursors:
    """Return the cursors for the settings: in memory, or in Redis for several processes."""
    return RedisCursors(settings.broker_url.get_secret_value()) if settings.api_cache == "redis" else LocalCursors()
