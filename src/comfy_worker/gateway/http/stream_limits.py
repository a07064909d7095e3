"""How many live streams a key may have open: server-sent events, WebSockets, and RunPod's `/stream`."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager

from starlette.types import Message, Scope, Send

from comfy_worker.gateway.errors import RateLimited
from comfy_worker.gateway.events.fair_scheduling import scheduler_of

_STREAMS = re.compile(r"(/v2/[^/]+)?/(events|stream)/.+|/generate/stream/?")


class TooManyStreams(RateLimited):
    """A key has as many streams open as it may."""


class StreamLimits:
    """Counts the streams of each key, in this process."""

    def __init__(self, most: int) -> None:
        """Take how many a key may have."""
        self._most = most
        self._open: Counter[str] = Counter()

    def take(self, key: str) -> AbstractContextManager[None]:
        """Count one more; return a context at whose end it is counted no more.

        Raises:
            TooManyStreams: the key has as many as it may.
        """
        if self._open[key] >= self._most:
            raise TooManyStreams(
                f"More than {self._most} streams are open with this key",
                hint="Close one, or ask for the status from time to time",
            )
        self._open[key] += 1
        return self._held(key)

    @contextmanager
    def _held(self, key: str) -> Iterator[None]:
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]


@asynccontextmanager
async def opening(send: Send) -> AsyncIterator[Send]:
    """Open a stream within the block, when few others are; return `send`, whose first message lets the next one in."""
    openings = scheduler_of(asyncio.get_running_loop()).open_limit
    await openings.acquire()
    is_held = True

    def let_go() -> None:
        nonlocal is_held
        if is_held:
            is_held = False
            openings.release()

    async def send_and_let_go(message: Message) -> None:
        let_go()
        await send(message)

    try:
        yield send_and_let_go
    finally:
        let_go()


def begins_at_once(scope: Scope) -> bool:
    """Return whether a stream's answer begins before there is something to tell; RunPod's `/stream` waits for that."""
    return is_stream(scope) and "/stream/" not in scope["path"]


def is_stream(scope: Scope) -> bool:
    """Return whether a request is answered as long as there is something to tell."""
    return scope["type"] == "websocket" or _STREAMS.fullmatch(scope["path"]) is not None
