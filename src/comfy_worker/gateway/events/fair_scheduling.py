"""Lets many streams take turns in an event loop: whoever else asks something waits for a few of them at most."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Protocol
from weakref import WeakKeyDictionary

_AT_ONCE = 10
"""How many streams are served before the loop looks after everybody else."""
_AT_A_TIME = 2
"""How many streams ask the store at a time; all others have the rest of its threads."""


class Schedulable(Protocol):
    """Who is to be told when its turn has come."""

    def run_next(self) -> None:
        """Wake up, to do one step."""


class FairScheduler:
    """The queue of those who have a step to do; its methods are to be called in its loop.

    Attributes:
        openings: held while a stream is opened.
        questions: held while the store is asked for what a stream has missed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the loop."""
        self._call_soon = loop.call_soon
        # In the order in which they asked.
        self._asking: dict[Schedulable, None] = {}
        self._is_running = False
        # Threads that ask the store take the interpreter from the loop, the more of them the longer.
        self.open_limit = asyncio.Semaphore(_AT_A_TIME)
        self.store_limit = asyncio.Semaphore(_AT_A_TIME)

    def ask(self, stream: Schedulable) -> None:
        """Give a stream a turn soon; asked twice before it comes, it is one turn."""
        self._asking[stream] = None
        if not self._is_running:
            self._is_running = True
            self._call_soon(self._run)

    def _run(self) -> None:
        for stream in list(islice(self._asking, _AT_ONCE)):
            del self._asking[stream]
            stream.run_next()
        self._is_running = bool(self._asking)
        if self._is_running:
            # What those who were woken do comes before the next ones.
            self._call_soon(self._run)


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, FairScheduler] = WeakKeyDictionary()


def scheduler_of(loop: asyncio.AbstractEventLoop) -> FairScheduler:
    """Return the one queue of a loop; to be called in it."""
    return _of_loops.setdefault(loop, FairScheduler(loop))
