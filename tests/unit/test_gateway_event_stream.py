"""Event streams that end leave little behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

from sse_starlette import ServerSentEvent

from comfy_worker.gateway.http.event_stream import EventStream

STREAMS = 50
MOST_EACH = 50
"""Objects in cycles behind a stream; sse-starlette's own response leaves more than a hundred."""


async def one_event_and_no_more() -> AsyncGenerator[ServerSentEvent, None]:
    yield ServerSentEvent("{}")
    await asyncio.Event().wait()


async def open_and_leave() -> list[bytes]:
    """Play a client that leaves when it has an event; return what it was sent."""
    has_event, parts = asyncio.Event(), []

    async def receive() -> dict[str, Any]:
        await has_event.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            parts.append(message["body"])
            has_event.set()

    stream = EventStream(one_event_and_no_more())
    await stream({"type": "http", "method": "GET"}, receive, send)
    return parts


def test_an_abandoned_stream_leaves_little_garbage() -> None:
    async def play() -> int:
        assert await open_and_leave() == [b"data: {}\r\n\r\n"]
        gc.collect()
        gc.disable()
        try:
            for _ in range(STREAMS):
                await open_and_leave()
            return gc.collect()
        finally:
            gc.enable()

    assert asyncio.run(play()) < STREAMS * MOST_EACH
