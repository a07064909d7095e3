"""Asking RunPod for a job, and ending that without losing one.

RunPod holds the question until there is a job. A question that is simply cut off may have been answered a moment
before: RunPod then believes that the job is taken, and nobody ever runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeAlias

import aiohttp
from aiohttp.connector import Connection
from runpod.http_client import get_auth_header

from comfy_worker.serverless.progress import Session

Fetch: TypeAlias = Callable[[Session, int], Awaitable[list[dict[str, Any]] | None]]
"""The SDK's `get_job`: asks over a session for at most so many jobs."""

_CONNECT_TIMEOUT_S = 30.0
_LONGEST_POLL_S = 90.0
_HANG_UP_S = 2.0
"""How long RunPod may take to see that nobody waits any more, or an answer to arrive that was on its way."""


class JobPolls:
    """Asks for jobs, one question at a time, over a connection of its own; an asynchronous context manager."""

    def __init__(self, fetch: Fetch, *, longest_s: float = _LONGEST_POLL_S, hang_up_s: float = _HANG_UP_S) -> None:
        """Make ready to ask; in the event loop's thread.

        Args:
            fetch: asks.
            longest_s: how long a question may be held before it is ended and asked anew.
            hang_up_s: how long RunPod has to see that a question was ended.
        """
        self._fetch = fetch
        self._longest_s = longest_s
        self._hang_up_s = hang_up_s
        self._connector = _PollConnector()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=self._connector, headers=get_auth_header(), timeout=timeout)

    async def __aenter__(self) -> JobPolls:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, ending: asyncio.Event) -> list[dict[str, Any]]:
        """Return the jobs that RunPod hands out; none if there is none for a long time, or until `ending` is set.

        Raises:
            Exception: what the SDK or the connection raised, unless we hung up.
        """
        self._connector.begin()
        poll = asyncio.ensure_future(self._fetch(self._session, 1))
        ended = asyncio.create_task(ending.wait())
        await asyncio.wait([poll, ended], timeout=self._longest_s, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if poll.done():
            return poll.result() or []
        return await self._hang_up(poll)

    async def _hang_up(self, poll: asyncio.Future[list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
        """End a question; return the jobs that were on their way already."""
        if self._connector.hang_up():
            await asyncio.wait([poll], timeout=self._hang_up_s)
        poll.cancel()
        await asyncio.wait([poll])
        return [] if poll.cancelled() or poll.exception() else poll.result() or []


class _PollConnector(aiohttp.TCPConnector):
    """Connects for one poll at a time, and can hang up on it."""

    def __init__(self) -> None:
        super().__init__(limit=0)
        self._transport: asyncio.Transport | None = None
        self._hung_up = False

    def begin(self) -> None:
        """Expect another poll."""
        self._transport, self._hung_up = None, False

    async def connect(self, *arguments: Any, **named: Any) -> Connection:
        """Connect, as aiohttp asks for it; not after `hang_up`, when it wants to repeat the poll that was cut off."""
        connection = await super().connect(*arguments, **named)
        if self._hung_up:
            connection.close()
            raise aiohttp.ClientConnectionError("the poll was ended")
        self._transport = connection.transport
        return connection

    def hang_up(self) -> bool:
        """Close our half of the connection: RunPod sees that nobody waits, and an answer on its way still arrives.

        Returns whether anything can be on its way.
        """
        self._hung_up = True
        if self._transport is None:
            return False
        with contextlib.suppress(OSError):  # RunPod was faster
            self._transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
        return True
