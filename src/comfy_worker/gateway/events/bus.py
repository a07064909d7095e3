"""The event bus: events of jobs for all who follow them.

The numbers of a job's events increase, also over restarts, so that a client can resume after the last one it received.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from comfy_worker.gateway.events.fair_scheduling import scheduler_of
from comfy_worker.types import JobState

STATUS = "status"
"""The type of changes of state; no subscription misses one."""
PROGRESS = "progress"
PREVIEW = "preview"
GAP = "gap"
"""The type of an event in place of others that may have been lost: the changes of state are in the store."""

_REMEMBERED = 64
"""How many events of a job are remembered for later subscriptions."""
_JOBS_REMEMBERED = 1000
_MAX_WAITING = 256
"""How many events may wait in a slow subscription; then the oldest that is not a change of state is dropped."""


@dataclass(frozen=True)
class Event:
    """An event of a job; its number is its time in microseconds since the epoch."""

    number: int
    job_id: str
    type: str
    data: Mapping[str, Any]

    @property
    def at(self) -> float:
        """When it happened, in seconds since the epoch."""
        return self.number / 1_000_000


def last_progress(events: Iterable[Event]) -> Event | None:
    """Return the last progress of the present attempt of a job, or of the last one if it has ended."""
    latest = None
    for event in events:
        if event.type == STATUS and not JobState(event.data["status"]).is_terminal:
            latest = None
        elif event.type == PROGRESS:
            latest = event
    return latest


class Subscription(Protocol):
    """A subscription to a job's events, from its creation until it is closed."""

    def __enter__(self) -> Subscription:
        """Return itself."""

    def __exit__(self, *exception: object) -> None:
        """End the subscription."""

    def __aiter__(self) -> Subscription:
        """Return itself."""

    async def __anext__(self) -> Event:
        """Wait for the next event or `GAP`, and return it; the iteration ends when the bus is closed."""


class EventBus(Protocol):
    """Carries events from the engines to those who follow jobs."""

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Publish an event of a job, and return it; may be called from any thread.

        Args:
            job_id: the job.
            kind: `STATUS`, `PROGRESS` or `PREVIEW`.
            data: what happened.
            number: the event's number in the store; it is increased if the job's last event has a larger one.
        """

    def subscribe(self, job_id: str, after: int | None = None) -> Subscription:
        """Subscribe to a job's events; with `after`, those remembered after that number come first."""

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job after that number: all changes of state, and the latest others."""

    def has_subscribers(self, job_id: str) -> bool:
        """Return whether there are subscriptions to a job."""

    def forget(self, job_id: str) -> None:
        """Forget the events of a job."""

    def close(self) -> None:
        """End all subscriptions, also later ones, after the events that they have received."""


class LocalEventBus:
    """An event bus within one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, deque[Event]] = OrderedDict()
        self._queues: dict[str, set[EventQueue]] = {}
        self._closed = False
        self._last = 0

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Publish an event of a job, and return it; may be called from any thread."""
        with self._lock:
            event = Event(self._number(job_id, number), job_id, kind, data)
            if kind != PREVIEW:
                self._remember(event)
            # Under the lock, so that events of several threads arrive in the order of their numbers.
            deliver(self._queues.get(job_id, ()), event)
        return event

    def subscribe(self, job_id: str, after: int | None = None) -> Subscription:
        """Subscribe to a job's events; with `after`, those remembered after that number come first."""
        with self._lock:
            missed = [] if after is None else [e for e in self._remembered.get(job_id, ()) if e.number > after]
            queue = EventQueue(missed, lambda: self._remove(job_id, queue))
            self._queues.setdefault(job_id, set()).add(queue)
            if self._closed:
                queue.close()
        return queue

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job after that number: all changes of state, and the latest others."""
        with self._lock:
            return [event for event in self._remembered.get(job_id, ()) if event.number > after]

    def has_subscribers(self, job_id: str) -> bool:
        """Return whether there are subscriptions to a job."""
        with self._lock:
            return job_id in self._queues

    def forget(self, job_id: str) -> None:
        """Forget the events of a job."""
        with self._lock:
            self._remembered.pop(job_id, None)

    def close(self) -> None:
        """End all subscriptions, also later ones, after the events that they have received."""
        with self._lock:
            self._closed = True
            for queue in [one for queues in self._queues.values() for one in queues]:
                queue.close()

    def _remove(self, job_id: str, queue: EventQueue) -> None:
        with self._lock:
            queues = self._queues.get(job_id, set())
            queues.discard(queue)
            if not queues:
                self._queues.pop(job_id, None)

    def _number(self, job_id: str, number: int | None) -> int:
        """Return the next number: the time in microseconds, and so larger than all numbers from before a restart."""
        remembered = self._remembered.get(job_id)
        last = remembered[-1].number if remembered else 0
        if number is not None:
            return max(number, last + 1)
        self._last = max(time.time_ns() // 1000, last + 1, self._last + 1)
        return self._last

    def _remember(self, event: Event) -> None:
        events = self._remembered.setdefault(event.job_id, deque())
        events.append(event)
        if len(events) > _REMEMBERED:
            _drop_one(events)
        self._remembered.move_to_end(event.job_id)
        while len(self._remembered) > _JOBS_REMEMBERED:
            self._remembered.popitem(last=False)


class EventQueue:
    """The subscription of every bus: events that wait for one reader, in the reader's event loop."""

    def __init__(self, missed: list[Event], on_exit: Callable[[], None]) -> None:
        """Take the first events, and what to call at the end of the subscription; create it in the reader's loop."""
        self._loop = asyncio.get_running_loop()
        self._waiting = deque(missed)
        self._on_exit = on_exit
        self._after = -1
        self._scheduler = scheduler_of(self._loop)
        self._scheduled = asyncio.Event()
        self._closed = False

    def prepend(self, missed: list[Event]) -> None:
        """Put events first, without duplicates; call it in the reader's loop, right after the creation."""
        self._waiting.extendleft(reversed(missed))
        if missed:
            self._after = missed[-1].number

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The reader's event loop."""
        return self._loop

    def close(self) -> None:
        """End the subscription after the events that wait; may be called from any thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    def __enter__(self) -> EventQueue:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._on_exit()

    def __aiter__(self) -> EventQueue:
        return self

    async def __anext__(self) -> Event:
        while self._waiting or not self._closed:
            if self._waiting:
                self._scheduler.schedule(self)
            await self._scheduled.wait()
            self._scheduled.clear()
            if self._waiting:
                return self._waiting.popleft()
        raise StopAsyncIteration

    def run_next(self) -> None:
        """Return the next event, or the end, to the reader."""
        self._scheduled.set()

    def _end(self) -> None:
        self._closed = True
        self._scheduler.schedule(self)

    def put(self, event: Event) -> None:
        """Add an event, in the reader's loop."""
        if event.type in (PREVIEW, GAP):
            # Only the latest one is useful, and previews are large.
            self._waiting = deque(waiting for waiting in self._waiting if waiting.type != event.type)
        elif event.number <= self._after:
            return
        self._waiting.append(event)
        if len(self._waiting) > _MAX_WAITING:
            _drop_one(self._waiting)
        self._scheduler.schedule(self)


def deliver(queues: Iterable[EventQueue], event: Event) -> None:
    """Put an event into queues, from any thread; each event loop is woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[EventQueue]] = {}
    for queue in queues:
        by_loop.setdefault(queue.loop, []).append(queue)
    for loop, own in by_loop.items():
        # The loop may be closed by now.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_put_all, own, event)


def _put_all(queues: Iterable[EventQueue], event: Event) -> None:
    for queue in queues:
        queue.put(event)


def _drop_one(events: deque[Event]) -> None:
    """Drop the oldest event that is neither a change of state nor a gap."""
    for index, event in enumerate(events):
        if event.type not in (STATUS, GAP):
            del events[index]
            return
