"""Requests a job from RunPod, and ends that request without losing a job.

RunPod holds a request until there is a job. If the connection is simply closed, RunPod may have sent a job a moment
before. It then counts the job as taken, and nobody runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import aiohttp
from aiohttp.connector import Connection
from runpod.http_client import get_auth_header

from comfy_worker.serverless.progress import Session

Fetch: TypeAlias = Callable[[Session, int], Awaitable[list[dict[str, Any]] | None]]
"""The SDK's `get_job`: requests up to a number of jobs over a session."""

_CONNECT_TIMEOUT_S = 30.0
_MAX_POLL_S = 90.0
"""How long RunPod may hold a request before it is ended and sent again."""
_HANG_UP_S = 2.0
"""How long to wait for a job that RunPod sent before it noticed the end of the request."""


class JobPoller:
    """Requests jobs, one request at a time, over a connection of its own; an asynchronous context manager."""

    def __init__(self, fetch: Fetch) -> None:
        """Prepare to poll; call it in the event loop's thread."""
        self._fetch = fetch
        self._connector = _PollConnector()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=self._connector, headers=get_auth_header(), timeout=timeout)

    async def __aenter__(self) -> JobPoller:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._session.close()

    async def poll(self, stopping: asyncio.Event) -> list[dict[str, Any]]:
        """Return the jobs that RunPod sends; none if there is none for a long time or until `stopping` is set.

        Raises:
            Exception: the request failed before it was ended.
        """
        self._connector.start_poll()
        poll = asyncio.ensure_future(self._fetch(self._session, 1))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([poll, stopped], timeout=_MAX_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if poll.done():
            return poll.result() or []
        return await self._hang_up(poll)

    async def _hang_up(self, poll: asyncio.Future[list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
        """End a request and return the jobs that RunPod had sent already."""
        if self._connector.hang_up():
            await asyncio.wait([poll], timeout=_HANG_UP_S)
        poll.cancel()
        await asyncio.wait([poll])
        return [] if poll.cancelled() or poll.exception() else poll.result() or []


class _PollConnector(aiohttp.TCPConnector):
    """Connects for one poll at a time and can close our half of the connection."""

    def __init__(self) -> None:
        super().__init__(limit=0)
        self._transport: asyncio.Transport | None = None
        self._hung_up = False

    def start_poll(self) -> None:
        """Allow connections again."""
        self._transport, self._hung_up = None, False

    async def connect(self, *arguments: Any, **named: Any) -> Connection:
        """Connect for aiohttp, but not after `hang_up`, when aiohttp would repeat the request."""
        connection = await super().connect(*arguments, **named)
        if self._hung_up:
            connection.close()
            raise aiohttp.ClientConnectionError("the poll was ended")
        self._transport = connection.transport
        return connection

    def hang_up(self) -> bool:
        """Close our half of the connection. RunPod notices, and a response already sent still arrives.

        Returns whether there was a connection.
        """
        self._hung_up = True
        if self._transport is None:
            return False
        with contextlib.suppress(OSError):  # RunPod has already closed it
            self._transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
        return True
