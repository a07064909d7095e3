"""How many jobs may do the same thing at the same time, and who is next."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from comfy_worker.stop import Stop
from comfy_worker.turns import Turns

Order = tuple[int, int]
"""What jobs are sorted by that wait for the same thing: the smallest is next."""


class Gate:
    """Lets so many in at a time; of those who wait, the one of the smallest order is next."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[Order, int]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def inside(self, order: Order, stop: Stop) -> Iterator[None]:
        """Wait for a place and hold it.

        Raises:
            Cancelled: `stop` was set while this waited.
        """
        ticket = (order, next(self._numbers))
        with stop.waking(self._wake), self._changed:
            heapq.heappush(self._waiting, ticket)
            try:
                self._changed.wait_for(lambda: stop.is_set() or (self._free > 0 and self._waiting[0] == ticket))
                stop.check()
                self._free -= 1
            finally:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class JobTurns(Turns):
    """One job's turns at the gates of its engine and its backend."""

    def __init__(self, staging: Gate, generating: Gate, delivering: Gate, order: Order, stop: Stop) -> None:
        self._gates = (staging, generating, delivering)
        self._order = order
        self._stop = stop

    def staging(self) -> AbstractContextManager[None]:
        """Wait for the job's turn to upload its inputs."""
        return self._gates[0].inside(self._order, self._stop)

    def generating(self) -> AbstractContextManager[None]:
        """Wait for the job's turn in ComfyUI's queue."""
        return self._gates[1].inside(self._order, self._stop)

    def delivering(self) -> AbstractContextManager[None]:
        """Wait for the job's turn to hand its outputs over."""
        return self._gates[2].inside(self._order, self._stop)
