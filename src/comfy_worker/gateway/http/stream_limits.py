"""Limits of open streams: server-sent events, WebSockets, and RunPod's `/stream`."""

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
    """A key has reached its limit of open streams."""


class StreamLimits:
    """Counts the open streams of each key, in this process."""

    def __init__(self, max_per_key: int) -> None:
        self._max_per_key = max_per_key
        self._open: Counter[str] = Counter()

    def open(self, key: str) -> AbstractContextManager[None]:
        """Count a stream; return a context manager that ends the count.

        Raises:
            TooManyStreams: the key has reached its limit.
        """
        if self._open[key] >= self._max_per_key:
            raise TooManyStreams(
                f"More than {self._max_per_key} streams are open with this key",
                hint="Close one, or poll the status",
            )
        self._open[key] += 1
        return self._counted(key)

    @contextmanager
    def _counted(self, key: str) -> Iterator[None]:
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]


@asynccontextmanager
async def limit_opening(send: Send) -> AsyncIterator[Send]:
    """Wait until few other streams are opening; return `send`, whose first message ends the opening of this one."""
    open_limit = scheduler_of(asyncio.get_running_loop()).open_limit
    await open_limit.acquire()
    is_held = True

    def release() -> None:
        nonlocal is_held
        if is_held:
            is_held = False
            open_limit.release()

    async def send_and_release(message: Message) -> None:
        release()
        await send(message)

    try:
        yield send_and_release
    finally:
        release()


def responds_at_once(scope: Scope) -> bool:
    """Return whether a stream's response begins before the first update; that of RunPod's `/stream` does not."""
    return is_stream(scope) and "/stream/" not in scope["path"]


def is_stream(scope: Scope) -> bool:
    """Return whether the response to a request is a stream."""
    return scope["type"] == "websocket" or _STREAMS.fullmatch(scope["path"]) is not None
