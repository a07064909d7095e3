"""An event bus over several processes and machines, through a Redis.

What is remembered lies in streams; what happens is told in a channel a job, to which a process listens as long as
anybody in it does. Channels forget what nobody hears, so listeners hear a `GAP` wherever something may be missing:
when the connection is back, and after a while of silence. The store has all changes of state.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from redis import Redis

from comfy_worker.gateway.events.bus import GAP, STATUS, Event, Listener, Subscription, hand_over
from comfy_worker.gateway.events.redis_connection import RedisAway, RedisConnection, connect
from comfy_worker.gateway.events.redis_streams import RedisStreams
from comfy_worker.gateway.events.redis_subscriber import RedisSubscriber

_PUT_OFF = 10_000
"""Changes of state that are told when the Redis is back; of more the oldest are left to the store."""


class RedisEventBus:
    """An event bus of all processes that use the same database of the same Redis.

    No method raises or waits for long because the Redis is away. Changes of state are told when it is back.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of the Redis; it may be away.

        Raises:
            ValueError: it is no URL of a Redis.
        """
        self._events = RedisStreams(connect(url))
        self._put_off: deque[tuple[str, Mapping[str, Any], int]] = deque(maxlen=_PUT_OFF)
        self._link = RedisConnection(url, self._tell_put_off, "changes of state are told when it is back, nothing else")
        self._lock = threading.Lock()
        self._listeners: dict[str, dict[Listener, float]] = {}
        self._reader = RedisSubscriber(url, self._events, self._hand_over, self._jobs_listened_to, self._tell_of_gaps)
        self._closed = False

    # ------------------------------------------------------------------------------------------ publishing

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Tell every listener of a job, in whatever process; may be called from any thread."""
        try:
            return self._link.call(lambda client: self._events.publish(client, job_id, kind, data, number))
        except RedisAway:
            event = Event(number or _now(), job_id, kind, data)
        if kind == STATUS:
            self._put_off.append((job_id, data, event.number))
            # Those in this process need not wait until it is back.
            self._hand_over(Event(event.number, job_id, GAP, {}))
        return event

    def _tell_put_off(self, client: Redis) -> None:
        while self._put_off:
            job_id, data, number = self._put_off[0]
            # A Redis that hung may have done what it did not answer.
            told = [event for event in self._events.recent(client, job_id, number - 1) if event.type == STATUS]
            if not any(event.data == data for event in told):
                self._events.publish(client, job_id, STATUS, data, number)
            self._put_off.popleft()

    # ------------------------------------------------------------------------------------------- listening

    def subscribe(self, job_id: str, after: int | None = None) -> Subscription:
        """Listen to a job from now on; with `after`, those remembered after that number come first."""
        listener = Listener([], lambda: self._leave(job_id, listener))
        if self._closed:
            listener.take_first([] if after is None else self.recent(job_id, after))
            listener.close()
            return listener
        self._reader.start()
        with self._lock:
            is_first = job_id not in self._listeners
            self._listeners.setdefault(job_id, {})[listener] = time.monotonic()
        if is_first:
            self._reader.join(job_id)
        if after is not None:
            # Asked while this listens already, so that each is among these, or is heard, or both.
            listener.take_first(self.recent(job_id, after))
        if self._closed:
            listener.close()
        return listener

    def _leave(self, job_id: str, listener: Listener) -> None:
        with self._lock:
            listeners = self._listeners.get(job_id, {})
            listeners.pop(listener, None)
            was_last = not listeners and self._listeners.pop(job_id, None) is not None
        if was_last:
            self._reader.leave(job_id)

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job after that number; none while the Redis is away."""
        try:
            return self._link.call(lambda client: self._events.recent(client, job_id, after))
        except RedisAway:
            return []

    def has_subscribers(self, job_id: str) -> bool:
        """Return whether anybody listens to a job, in whatever process."""
        with self._lock:
            if job_id in self._listeners:
                return True
        try:
            return self._link.call(lambda client: self._events.listeners(client, job_id)) > 0
        except RedisAway:
            return False

    def forget(self, job_id: str) -> None:
        """Remember nothing of a job any more; while the Redis is away, what it remembers expires by itself."""
        try:
            self._link.call(lambda client: self._events.forget(client, job_id))
        except RedisAway:
            return

    def close(self) -> None:
        """Let all listeners go, those too that come later: they hear what they have been told, and no more."""
        self._closed = True
        self._reader.stop(self._link)
        with self._lock:
            listeners = [one for listeners in self._listeners.values() for one in listeners]
        for listener in listeners:
            listener.close()
        self._link.close()

    # --------------------------------------------------------------------------------- in the reader's thread

    def _jobs_listened_to(self) -> list[str]:
        with self._lock:
            return list(self._listeners)

    def _hand_over(self, event: Event) -> None:
        now = time.monotonic()
        with self._lock:
            listeners = self._listeners.get(event.job_id, {})
            for listener in listeners:
                listeners[listener] = now
            hand_over(listeners, event)

    def _tell_of_gaps(self, silent_s: float) -> None:
        """Tell those of a gap that have heard nothing for so long."""
        now = time.monotonic()
        with self._lock:
            for job_id, listeners in self._listeners.items():
                silent = [listener for listener, heard_at in listeners.items() if now - heard_at >= silent_s]
                listeners.update(dict.fromkeys(silent, now))
                hand_over(silent, Event(_now(), job_id, GAP, {}))


def _now() -> int:
    return time.time_ns() // 1000
