"""An event bus over several processes and machines, through a Redis.

Events are remembered in streams, and published in one channel for each job, to which a process subscribes while it
follows the job. Channels do not keep messages, so a subscription receives a `GAP` wherever events may be missing: after
a reconnection, and after some silence. The store has all changes of state.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from redis import Redis

from comfy_worker.gateway.events.bus import GAP, STATUS, Event, EventQueue, Subscription, deliver
from comfy_worker.gateway.events.redis_connection import RedisAway, RedisConnection, connect
from comfy_worker.gateway.events.redis_streams import RedisStreams
from comfy_worker.gateway.events.redis_subscriber import RedisSubscriber

_MAX_PENDING = 10_000
"""How many changes of state are published when Redis is back; older ones are only in the store."""


class RedisEventBus:
    """An event bus of all processes that use the same database of the same Redis.

    No method raises or blocks for long because Redis is away. Changes of state are published when it is back.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of the Redis; it may be away.

        Raises:
            ValueError: it is not the URL of a Redis.
        """
        self._events = RedisStreams(connect(url))
        self._pending: deque[tuple[str, Mapping[str, Any], int]] = deque(maxlen=_MAX_PENDING)
        self._link = RedisConnection(url, self._publish_pending, "only changes of state are published when it is back")
        self._lock = threading.Lock()
        self._queues: dict[str, dict[EventQueue, float]] = {}
        self._reader = RedisSubscriber(url, self._events, self._deliver, self._subscribed_jobs, self._report_gaps)
        self._closed = False

    # ------------------------------------------------------------------------------------------ publishing

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Publish an event of a job for all processes, and return it; may be called from any thread."""
        try:
            return self._link.call(lambda client: self._events.publish(client, job_id, kind, data, number))
        except RedisAway:
            event = Event(number or _now(), job_id, kind, data)
        if kind == STATUS:
            self._pending.append((job_id, data, event.number))
            # The subscriptions of this process read the store at once.
            self._deliver(Event(event.number, job_id, GAP, {}))
        return event

    def _publish_pending(self, client: Redis) -> None:
        while self._pending:
            job_id, data, number = self._pending[0]
            # A Redis that did not reply may have executed the command.
            published = [event for event in self._events.recent(client, job_id, number - 1) if event.type == STATUS]
            if not any(event.data == data for event in published):
                self._events.publish(client, job_id, STATUS, data, number)
            self._pending.popleft()

    # ----------------------------------------------------------------------------------------- subscribing

    def subscribe(self, job_id: str, after: int | None = None) -> Subscription:
        """Subscribe to a job's events; with `after`, those remembered after that number come first."""
        queue = EventQueue([], lambda: self._remove(job_id, queue))
        if self._closed:
            queue.prepend([] if after is None else self.recent(job_id, after))
            queue.close()
            return queue
        self._reader.start()
        with self._lock:
            is_first = job_id not in self._queues
            self._queues.setdefault(job_id, {})[queue] = time.monotonic()
        if is_first:
            self._reader.subscribe(job_id)
        if after is not None:
            # Read after the subscription has begun, so that no event is missed.
            queue.prepend(self.recent(job_id, after))
        if self._closed:
            queue.close()
        return queue

    def _remove(self, job_id: str, queue: EventQueue) -> None:
        with self._lock:
            queues = self._queues.get(job_id, {})
            queues.pop(queue, None)
            was_last = not queues and self._queues.pop(job_id, None) is not None
        if was_last:
            self._reader.unsubscribe(job_id)

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job after that number; none while Redis is away."""
        try:
            return self._link.call(lambda client: self._events.recent(client, job_id, after))
        except RedisAway:
            return []

    def has_subscribers(self, job_id: str) -> bool:
        """Return whether there are subscriptions to a job in any process."""
        with self._lock:
            if job_id in self._queues:
                return True
        try:
            return self._link.call(lambda client: self._events.subscribers(client, job_id)) > 0
        except RedisAway:
            return False

    def forget(self, job_id: str) -> None:
        """Forget the events of a job; while Redis is away, they expire by themselves."""
        try:
            self._link.call(lambda client: self._events.forget(client, job_id))
        except RedisAway:
            return

    def close(self) -> None:
        """End all subscriptions, also later ones, after the events that they have received."""
        if self._closed:
            return
        self._closed = True
        self._reader.stop(self._link)
        with self._lock:
            open_queues = [one for queues in self._queues.values() for one in queues]
        for queue in open_queues:
            queue.close()
        self._link.close()

    # --------------------------------------------------------------------------------- in the reader's thread

    def _subscribed_jobs(self) -> list[str]:
        with self._lock:
            return list(self._queues)

    def _deliver(self, event: Event) -> None:
        now = time.monotonic()
        with self._lock:
            queues = self._queues.get(event.job_id, {})
            for queue in queues:
                queues[queue] = now
            deliver(queues, event)

    def _report_gaps(self, silent_s: float) -> None:
        """Deliver a gap to all queues that have received nothing for so many seconds."""
        now = time.monotonic()
        with self._lock:
            for job_id, queues in self._queues.items():
                silent = [queue for queue, received_at in queues.items() if now - received_at >= silent_s]
                queues.update(dict.fromkeys(silent, now))
                deliver(silent, Event(_now(), job_id, GAP, {}))


def _now() -> int:
    return time.time_ns() // 1000
