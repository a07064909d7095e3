"""Schedules many streams fairly in an event loop: other requests wait for only a few of them."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Protocol
from weakref import WeakKeyDictionary

_AT_ONCE = 10
"""How many streams are served before the loop handles other requests."""
_AT_A_TIME = 2
"""How many streams read from the store at a time; the other threads are left for other requests."""


class Schedulable(Protocol):
    """A stream that can do one step."""

    def run_next(self) -> None:
        """Do one step."""


class FairScheduler:
    """The queue of the streams that have a step to do; its methods are called in its loop.

    Attributes:
        open_limit: held while a stream is opened.
        store_limit: held while a stream reads from the store.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the loop."""
        self._call_soon = loop.call_soon
        # A dict, because it keeps the order and has no duplicates.
        self._scheduled: dict[Schedulable, None] = {}
        self._is_running = False
        # Threads that read from the store take the interpreter from the loop.
        self.open_limit = asyncio.Semaphore(_AT_A_TIME)
        self.store_limit = asyncio.Semaphore(_AT_A_TIME)

    def schedule(self, stream: Schedulable) -> None:
        """Have a stream do one step soon; scheduled twice before that, it does one step."""
        self._scheduled[stream] = None
        if not self._is_running:
            self._is_running = True
            self._call_soon(self._run)

    def _run(self) -> None:
        for stream in list(islice(self._scheduled, _AT_ONCE)):
            del self._scheduled[stream]
            stream.run_next()
        self._is_running = bool(self._scheduled)
        if self._is_running:
            # Callbacks of these streams come before the next streams.
            self._call_soon(self._run)


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, FairScheduler] = WeakKeyDictionary()


def scheduler_of(loop: asyncio.AbstractEventLoop) -> FairScheduler:
    """Return the scheduler of an event loop; call it in that loop."""
    return _of_loops.setdefault(loop, FairScheduler(loop))
