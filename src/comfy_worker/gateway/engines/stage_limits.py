"""How many jobs may be in the same stage at a time, and which is next."""

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
    """A job that waits for a slot; the smallest is next."""

    order: Order
    number: int
    owner: str


class PrioritySemaphore:
    """A semaphore whose free slots go to the waiting job with the smallest order."""

    def __init__(self, slots: int, *, extra_for_each_owner: bool = False) -> None:
        """Take the number of slots; `extra_for_each_owner` admits one more job of each owner that has no slot."""
        self._free = slots
        self._extra_for_each_owner = extra_for_each_owner
        self._holding: Counter[str] = Counter()
        self._waiting: list[_Ticket] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def slot(self, order: Order, owner: str, stop: Stop) -> Iterator[None]:
        """Wait for a slot and hold it.

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
        if not self._extra_for_each_owner or self._holding[ticket.owner]:
            return False
        return ticket == min(other for other in self._waiting if other.owner == ticket.owner)

    def _count(self, owner: str, more: int) -> None:
        self._free -= more
        self._holding[owner] += more

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class JobStageLimits(StageLimits):
    """The limits of one job: those of its engine for staging and delivery, that of its ComfyUI for generation."""

    def __init__(
        self,
        staging: PrioritySemaphore,
        generating: PrioritySemaphore,
        delivering: PrioritySemaphore,
        order: Order,
        owner: str,
        stop: Stop,
    ) -> None:
        self._staging, self._generating, self._delivering = staging, generating, delivering
        self._ticket = (order, owner, stop)

    def staging(self) -> AbstractContextManager[None]:
        """Wait until the job may upload its inputs."""
        return self._staging.slot(*self._ticket)

    def generating(self) -> AbstractContextManager[None]:
        """Wait until the job may enter ComfyUI's queue."""
        return self._generating.slot(*self._ticket)

    def delivering(self) -> AbstractContextManager[None]:
        """Wait until the job may deliver its outputs."""
        return self._delivering.slot(*self._ticket)
