"""Sends the latest of many values, at a limited rate."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

Value: TypeAlias = dict[str, Any]


class ThrottledSender:
    """Sends the latest value, one at a time, and nothing after `stop`. Its methods run in one event loop.

    A value is skipped if a newer one arrives before it is sent.
    """

    def __init__(
        self, send: Callable[[Value], Awaitable[bool]], interval_s: float, *, first_delay_s: float = 0.0
    ) -> None:
        """Create a sender; `send` returns False if the latest value is to be sent again after the interval."""
        self._send = send
        self._interval_s = interval_s
        self._first_delay_s = first_delay_s
        self._latest: Value = {}
        self._has_unsent = asyncio.Event()
        self._stopping = asyncio.Event()

    def update(self, value: Value) -> None:
        """Set the latest value."""
        if value != self._latest:
            self._latest = value
            self._has_unsent.set()

    def stop(self) -> None:
        """Make `run` return after the send in progress."""
        self._stopping.set()
        self._has_unsent.set()

    async def run(self) -> None:
        """Send values until `stop`."""
        delay_s = self._first_delay_s
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            await self._has_unsent.wait()
            if self._stopping.is_set():
                return
            self._has_unsent.clear()
            if not await self._send(self._latest):
                self._has_unsent.set()
            delay_s = self._interval_s
