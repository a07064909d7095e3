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


class TakesTurns(Protocol):
    """Who is to be told when its turn has come."""

    def begin_turn(self) -> None:
        """Wake up, to do one step."""


class FairTurns:
    """The queue of those who have a step to do; its methods are to be called in its loop.

    Attributes:
        openings: held while a stream is opened.
        questions: held while the store is asked for what a stream has missed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the loop."""
        self._call_soon = loop.call_soon
        # In the order in which they asked.
        self._asking: dict[TakesTurns, None] = {}
        self._is_running = False
        # Threads that ask the store take the interpreter from the loop, the more of them the longer.
        self.openings = asyncio.Semaphore(_AT_A_TIME)
        self.questions = asyncio.Semaphore(_AT_A_TIME)

    def ask(self, stream: TakesTurns) -> None:
        """Give a stream a turn soon; asked twice before it comes, it is one turn."""
        self._asking[stream] = None
        if not self._is_running:
            self._is_running = True
            self._call_soon(self._run)

    def _run(self) -> None:
        for stream in list(islice(self._asking, _AT_ONCE)):
            del self._asking[stream]
            stream.begin_turn()
        self._is_running = bool(self._asking)
        if self._is_running:
            # What those who were woken do comes before the next ones.
            self._call_soon(self._run)


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, FairTurns] = WeakKeyDictionary()


def turns_of(loop: asyncio.AbstractEventLoop) -> FairTurns:
    """Return the one queue of a loop; to be called in it."""
    return _of_loops.setdefault(loop, FairTurns(loop))
