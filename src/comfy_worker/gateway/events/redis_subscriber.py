"""The connection with which a process subscribes to channels of a Redis, in a thread of its own."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from redis import ConnectionError as RedisConnectionError
from redis import Redis, RedisError
from redis.client import PubSub

from comfy_worker.gateway.events.bus import Event
from comfy_worker.gateway.events.redis_connection import TIMEOUT_S, RedisAway, RedisConnection, connect
from comfy_worker.gateway.events.redis_streams import RedisStreams

_POLL_S = 1.0
_RETRY_S = 0.25
_PING_AFTER_S = 5.0
"""After so many seconds of silence the server gets a ping."""
_LOST_S = 10.0
_GAP_AFTER_S = 15.0
"""After so many seconds of silence: a process may have been killed before it published a change."""


class RedisSubscriber:
    """Receives the events in the channels of jobs; reconnects as long as it runs."""

    def __init__(
        self,
        url: str,
        events: RedisStreams,
        deliver: Callable[[Event], None],
        jobs: Callable[[], Iterable[str]],
        report_gaps: Callable[[float], None],
    ) -> None:
        """Connect at the first subscription.

        Args:
            url: of the Redis.
            events: decodes messages.
            deliver: takes each event.
            jobs: returns the jobs to subscribe to.
            report_gaps: delivers a gap to those who have received nothing for so many seconds.
        """
        self._client: Redis = connect(url)
        self._events = events
        self._deliver = deliver
        self._jobs = jobs
        self._report_gaps = report_gaps
        self._own_channel = f"comfy:reader:{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._channels: PubSub | None = None
        self._tried = threading.Event()
        self._stopping = threading.Event()
        self._is_hanging = False
        self._confirmed: dict[tuple[str, bytes], threading.Event] = {}

    # ------------------------------------------------------------------------------ from any other thread

    def start(self) -> None:
        """Begin, if it has not begun; wait a moment for the first connection."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="redis-events", daemon=True)
                self._thread.start()
        self._tried.wait(TIMEOUT_S)

    def subscribe(self, job_id: str) -> None:
        """Subscribe to a job's channel; when this returns, events are received, unless the connection is lost."""
        self._change("subscribe", job_id)

    def unsubscribe(self, job_id: str) -> None:
        """Unsubscribe from a job's channel."""
        self._change("unsubscribe", job_id)

    def _change(self, what: str, job_id: str) -> None:
        channel = self._events.channel(job_id)
        with self._changing:
            # Checked again under the lock, because it may have changed meanwhile.
            if (job_id in self._jobs()) is not (what == "subscribe"):
                return
            confirmed = self._confirmed[what, channel.encode()] = threading.Event()
            try:
                if self._channels is None:
                    return  # when it connects, it subscribes to all channels that are needed then
                getattr(self._channels, what)(channel)
                # Only the first subscription waits for a server that hangs.
                if not self._is_hanging and not confirmed.wait(TIMEOUT_S):
                    self._is_hanging = True
            except RedisError:
                return  # the thread reconnects
            finally:
                self._confirmed.pop((what, channel.encode()), None)

    def stop(self, link: RedisConnection) -> None:
        """End after the events that were published so far; wait a moment for that."""
        if self._thread is None:
            self._stopping.set()
            return
        try:
            # This message arrives after all events.
            link.call(lambda client: client.publish(self._own_channel, "stop"))
        except RedisAway:
            self._stopping.set()
        self._thread.join(TIMEOUT_S)
        self._stopping.set()

    # ----------------------------------------------------------------------------------------- its thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._connect()
                self._read()
            except (RedisError, OSError):
                self._tried.set()
                self._stopping.wait(_RETRY_S)
            finally:
                self._disconnect()
        self._client.close()

    def _connect(self) -> None:
        channels: PubSub = self._client.pubsub()  # type: ignore[no-untyped-call]
        try:
            channels.subscribe(self._own_channel)
        finally:
            # From now on `_change` subscribes; earlier subscriptions follow below.
            self._channels = channels
        wanted = [self._events.channel(job_id) for job_id in self._jobs()]
        if wanted:
            channels.subscribe(*wanted)

    def _read(self) -> None:
        channels = self._channels
        assert channels is not None, "it was connected"  # noqa: S101
        received_at, has_pinged = time.monotonic(), False
        self._report_gaps(0.0)
        self._tried.set()
        while True:
            message = channels.get_message(timeout=_POLL_S)
            now = time.monotonic()
            if message is not None:
                received_at, has_pinged = now, False
                if self._is_hanging:
                    self._is_hanging = False
                    self._report_gaps(0.0)
                if self._handle(message):
                    self._stopping.set()
                    return
            elif self._stopping.is_set() or now - received_at > _LOST_S:
                raise RedisConnectionError
            elif now - received_at > _PING_AFTER_S and not has_pinged:
                channels.ping()
                has_pinged = True
            self._report_gaps(_GAP_AFTER_S)

    def _handle(self, message: dict[str, Any]) -> bool:
        """Handle a message; return whether it is the last one."""
        kind, channel = message["type"], message["channel"]
        if kind in ("subscribe", "unsubscribe"):
            confirmed = self._confirmed.get((kind, channel))
            if confirmed is not None:
                confirmed.set()
        elif kind == "message" and channel == self._own_channel.encode():
            return True
        elif kind == "message":
            self._deliver(self._events.received(channel, message["data"]))
        return False

    def _disconnect(self) -> None:
        channels, self._channels = self._channels, None
        for confirmed in list(self._confirmed.values()):
            confirmed.set()  # no confirmation will come
        if channels is not None:
            channels.close()
