"""What happens to jobs, told to whoever listens the moment it happens.

The numbers of a job's events grow, over restarts too, so that a client that comes back can say what it heard last.
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
"""Type of the events that tell of a change of state; no listener misses one."""
PROGRESS = "progress"
PREVIEW = "preview"
GAP = "gap"
"""Type of what a listener hears in place of events that the bus may not have: whoever needs all asks the store."""

_REMEMBERED = 64
"""Events of a job that a listener who comes late can still hear."""
_JOBS_REMEMBERED = 1000
_WAITING = 256
"""Events that a slow listener may be behind; beyond that the oldest that is no change of state is left out."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; its number is when, in microseconds since the epoch."""

    number: int
    job_id: str
    type: str
    data: Mapping[str, Any]

    @property
    def at(self) -> float:
        """When it happened, in seconds since the epoch."""
        return self.number / 1_000_000


def last_progress(events: Iterable[Event]) -> Event | None:
    """Return the last word on how far the present attempt of a job is; its end leaves that standing."""
    told = None
    for event in events:
        if event.type == STATUS and not JobState(event.data["status"]).is_terminal:
            told = None
        elif event.type == PROGRESS:
            told = event
    return told


class Subscription(Protocol):
    """A job's events on their way to one listener, from the moment this was made until it is closed."""

    def __enter__(self) -> Subscription:
        """Listen within a block."""

    def __exit__(self, *exception: object) -> None:
        """Stop listening."""

    def __aiter__(self) -> Subscription:
        """Be the iterator."""

    async def __anext__(self) -> Event:
        """Return the next event, or a `GAP`, when there is one; the iteration ends once the bus is closed."""


class EventBus(Protocol):
    """Carries events from whoever runs jobs to whoever watches them."""

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Tell every listener of a job; may be called from any thread.

        Args:
            job_id: the job.
            kind: `STATUS`, `PROGRESS` or `PREVIEW`.
            data: what happened.
            number: that the store has for this event; it is larger if the job's last event has a larger one.
        """

    def subscribe(self, job_id: str, after: int | None = None) -> Subscription:
        """Listen to a job from now on; with `after`, those remembered after that number come first."""

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job after that number: all changes of state, and the latest others."""

    def has_subscribers(self, job_id: str) -> bool:
        """Return whether anybody listens to a job."""

    def forget(self, job_id: str) -> None:
        """Remember nothing of a job any more."""

    def close(self) -> None:
        """Let all listeners go, those too that come later: they hear what they have been told, and no more."""


class LocalEventBus:
    """An event bus within one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, deque[Event]] = OrderedDict()
        self._listeners: dict[str, set[Listener]] = {}
        self._closed = False
        self._last = 0

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Tell every listener of a job; may be called from any thread."""
        with self._lock:
            event = Event(self._number(job_id, number), job_id, kind, data)
            if kind != PREVIEW:
                self._remember(event)
            # Handed over under the lock: two threads' events reach every listener in the order of their numbers.
            hand_over(self._listeners.get(job_id, ()), event)
        return event

    def subscribe(self, job_id: str, after: int | None = None) -> Subscription:
        """Listen to a job from now on; with `after`, those remembered after that number come first."""
        with self._lock:
            missed = [] if after is None else [e for e in self._remembered.get(job_id, ()) if e.number > after]
            listener = Listener(missed, lambda: self._leave(job_id, listener))
            self._listeners.setdefault(job_id, set()).add(listener)
            if self._closed:
                listener.close()
        return listener

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job after that number: all changes of state, and the latest others."""
        with self._lock:
            return [event for event in self._remembered.get(job_id, ()) if event.number > after]

    def has_subscribers(self, job_id: str) -> bool:
        """Return whether anybody listens to a job."""
        with self._lock:
            return job_id in self._listeners

    def forget(self, job_id: str) -> None:
        """Remember nothing of a job any more."""
        with self._lock:
            self._remembered.pop(job_id, None)

    def close(self) -> None:
        """Let all listeners go, those too that come later: they hear what they have been told, and no more."""
        with self._lock:
            self._closed = True
            for listener in [one for listeners in self._listeners.values() for one in listeners]:
                listener.close()

    def _leave(self, job_id: str, listener: Listener) -> None:
        with self._lock:
            listeners = self._listeners.get(job_id, set())
            listeners.discard(listener)
            if not listeners:
                self._listeners.pop(job_id, None)

    def _number(self, job_id: str, number: int | None) -> int:
        """Return the next number: microseconds, and so larger than any that was given out before a restart."""
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
            _leave_one_out(events)
        self._remembered.move_to_end(event.job_id)
        while len(self._remembered) > _JOBS_REMEMBERED:
            self._remembered.popitem(last=False)


class Listener:
    """Events on their way to one listener, in its own event loop; what every bus is listened to with."""

    def __init__(self, missed: list[Event], leave: Callable[[], None]) -> None:
        """Take what comes first, and what is to be called when nobody listens any more; to be made in the loop."""
        self._loop = asyncio.get_running_loop()
        self._waiting = deque(missed)
        self._leave = leave
        self._after = -1
        self._turns = scheduler_of(self._loop)
        self._turn = asyncio.Event()
        self._closed = False

    def take_first(self, missed: list[Event]) -> None:
        """Have these heard first, and none of them twice; in the listener's loop, right after it was made."""
        self._waiting.extendleft(reversed(missed))
        if missed:
            self._after = missed[-1].number

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it was made in."""
        return self._loop

    def close(self) -> None:
        """Let the listener go once it has heard what is waiting; from any thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._leave()

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Event:
        while self._waiting or not self._closed:
            if self._waiting:
                self._turns.ask(self)
            await self._turn.wait()
            self._turn.clear()
            if self._waiting:
                return self._waiting.popleft()
        raise StopAsyncIteration

    def run_next(self) -> None:
        """Have the next event taken, or the end."""
        self._turn.set()

    def _end(self) -> None:
        self._closed = True
        self._turns.ask(self)

    def take(self, event: Event) -> None:
        """Take an event, in the listener's own loop."""
        if event.type in (PREVIEW, GAP):
            # Only the latest is worth looking at, and previews are large.
            self._waiting = deque(waiting for waiting in self._waiting if waiting.type != event.type)
        elif event.number <= self._after:
            return
        self._waiting.append(event)
        if len(self._waiting) > _WAITING:
            _leave_one_out(self._waiting)
        self._turns.ask(self)


def hand_over(listeners: Iterable[Listener], event: Event) -> None:
    """Give an event to listeners, from any thread; each loop is woken once, however many listeners it has."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Listener]] = {}
    for listener in listeners:
        by_loop.setdefault(listener.loop, []).append(listener)
    for loop, own in by_loop.items():
        # A loop that has ended has nobody left to listen.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_take_all, own, event)


def _take_all(listeners: Iterable[Listener], event: Event) -> None:
    for listener in listeners:
        listener.take(event)


def _leave_one_out(events: deque[Event]) -> None:
    """Leave out the oldest event that is no change of state, and does not stand for one."""
    for place, event in enumerate(events):
        if event.type not in (STATUS, GAP):
            del events[place]
            return
