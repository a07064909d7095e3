"""Server-sent events to a client that may leave, or stop reading.

sse-starlette encodes the events. Its response is not used: each one that ends leaves 200 objects that only a full
garbage collection frees, and that stops the event loop for half a second when hundreds of clients have left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import anyio
from sse_starlette import ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 30
"""A client that reads nothing for this long is disconnected; it can come back."""
_KEEP_ALIVE_S = 15
_KEEP_ALIVE = ServerSentEvent(comment="ping").encode()


class EventStream(Response):
    """A stream of events, with keep-alive comments every 15 s."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[ServerSentEvent, None]) -> None:
        """Take the events; the generator is closed in any case."""
        # Without `super().__init__`, which would add a Content-Length.
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more, or the client has left or stopped reading."""
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await _until_first(self._send_events(send), _until_disconnect(receive), self._keep_alive(send))
            except TimeoutError:
                log.info("disconnected a client that read nothing for %g s", SEND_TIMEOUT_S)

    async def _send_events(self, send: Send) -> None:
        async for event in self._events:
            await self._send(send, event.encode())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE_S)
            await self._send(send, _KEEP_ALIVE)

    async def _send(self, send: Send, part: bytes) -> None:
        with anyio.fail_after(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": part, "more_body": True})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_first(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all until one has ended, and cancel the others; raise what that one raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()
