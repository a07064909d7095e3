"""How many jobs may do the same thing at the same time, and who is next."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from comfy_worker.gateway.engines.waiting_jobs import Order
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.stop import Stop


class _Ticket(NamedTuple):
    """Who waits at a gate; the smallest is next."""

    order: Order
    number: int
    owner: str


class PrioritySemaphore:
    """Lets so many in at a time; of those who wait, the one of the smallest order is next."""

    def __init__(self, places: int, *, one_of_each: bool = False) -> None:
        """Take how many; `one_of_each` lets in, beyond them, one of each owner that has none inside."""
        self._free = places
        self._one_of_each = one_of_each
        self._inside: Counter[str] = Counter()
        self._waiting: list[_Ticket] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def inside(self, order: Order, owner: str, stop: Stop) -> Iterator[None]:
        """Wait for a place and hold it.

        Raises:
            Cancelled: `stop` was set while this waited.
        """
        ticket = _Ticket(order, next(self._numbers), owner)
        with stop.calling(self._wake), self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: stop.is_set() or self._is_next(ticket))
                stop.check()
                self._count(owner, 1)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._count(owner, -1)
                self._changed.notify_all()

    def _is_next(self, ticket: _Ticket) -> bool:
        if self._free > 0:
            return ticket == min(self._waiting)
        if not self._one_of_each or self._inside[ticket.owner]:
            return False
        return ticket == min(other for other in self._waiting if other.owner == ticket.owner)

    def _count(self, owner: str, more: int) -> None:
        self._free -= more
        self._inside[owner] += more

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class JobStageLimits(StageLimits):
    """One job's turns at the gates of its engine and its backend."""

    def __init__(
        self,
        staging: PrioritySemaphore,
        generating: PrioritySemaphore,
        delivering: PrioritySemaphore,
        order: Order,
        owner: str,
        stop: Stop,
    ) -> None:
        self._gates = (staging, generating, delivering)
        self._ticket = (order, owner, stop)

    def staging(self) -> AbstractContextManager[None]:
        """Wait for the job's turn to upload its inputs."""
        return self._gates[0].inside(*self._ticket)

    def generating(self) -> AbstractContextManager[None]:
        """Wait for the job's turn in ComfyUI's queue."""
        return self._gates[1].inside(*self._ticket)

    def delivering(self) -> AbstractContextManager[None]:
        """Wait for the job's turn to hand its outputs over."""
        return self._gates[2].inside(*self._ticket)
