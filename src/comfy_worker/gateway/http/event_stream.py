"""Server-sent events to a client that may leave, or stop reading.

sse-starlette writes the events. Its response is not used: each one that ends leaves 200 objects that only a full
collection of garbage frees, and that stops everybody for half a second when hundreds of clients have left.
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

_KEEP_ALIVE = ServerSentEvent(comment="ping").encode()


class EventStream(Response):
    """A stream whose client is let go if it takes nothing for some time: that is no error of ours."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[ServerSentEvent, None], *, keep_alive_s: float, patience_s: float
    ) -> None:
        """Take the events, which are closed in any case.

        Args:
            events: to be sent.
            keep_alive_s: how often a comment is sent, in seconds.
            patience_s: how long a client may take nothing, in seconds.
        """
        # No `super().__init__`, which would say how long the body is.
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more, or the client has left or stopped reading."""
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await _until_first(self._tell(send), _until_gone(receive), self._keep_alive(send))
            except TimeoutError:
                log.info("a client that took nothing for %g s was let go", self._patience_s)

    async def _tell(self, send: Send) -> None:
        async for event in self._events:
            await self._send(send, event.encode())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._keep_alive_s)
            await self._send(send, _KEEP_ALIVE)

    async def _send(self, send: Send, part: bytes) -> None:
        with anyio.fail_after(self._patience_s):
            await send({"type": "http.response.body", "body": part, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_first(*doing: Coroutine[Any, Any, None]) -> None:
    """Do all until one has ended, and end the others; raise what that one raised."""
    tasks = [asyncio.ensure_future(one) for one in doing]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()
