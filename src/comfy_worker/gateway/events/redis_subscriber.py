"""The one connection with which a process listens to the channels of a Redis, in a thread of its own."""

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
from comfy_worker.gateway.events.redis_connection import PATIENCE_S, RedisAway, RedisConnection, connect
from comfy_worker.gateway.events.redis_streams import RedisStreams

_LOOK_S = 1.0
_AGAIN_S = 0.25
_SILENCE_S = 5.0
"""After that the server is asked whether it is there."""
_LOST_S = 10.0
_GAP_AFTER_S = 15.0
"""Whoever told of a change may have been killed before it did."""


class RedisSubscriber:
    """Hears what is told in the channels of jobs; connects again for as long as it runs."""

    def __init__(
        self,
        url: str,
        events: RedisStreams,
        hand_over: Callable[[Event], None],
        jobs: Callable[[], Iterable[str]],
        tell_of_gaps: Callable[[float], None],
    ) -> None:
        """Take the parts.

        Args:
            url: of the Redis.
            events: reads what is heard.
            hand_over: takes each event.
            jobs: says which are listened to.
            tell_of_gaps: tells those of a gap that have heard nothing for so many seconds.
        """
        self._client: Redis = connect(url)
        self._events = events
        self._hand_over = hand_over
        self._jobs = jobs
        self._tell_of_gaps = tell_of_gaps
        self._own_channel = f"comfy:reader:{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._channels: PubSub | None = None
        self._tried = threading.Event()
        self._stopping = threading.Event()
        self._is_mute = False
        self._confirmed: dict[tuple[str, bytes], threading.Event] = {}

    # ------------------------------------------------------------------------------ from any other thread

    def start(self) -> None:
        """Begin, if that has not been; wait a moment for the first connection."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="redis-events", daemon=True)
                self._thread.start()
        self._tried.wait(PATIENCE_S)

    def join(self, job_id: str) -> None:
        """Listen to a job's channel; when this returns, what is told is heard, unless the connection is lost."""
        self._change("subscribe", job_id)

    def leave(self, job_id: str) -> None:
        """Listen to a job's channel no more."""
        self._change("unsubscribe", job_id)

    def _change(self, what: str, job_id: str) -> None:
        channel = self._events.channel(job_id)
        with self._changing:
            # Asked again here: one who came may have gone meanwhile, or the other way round.
            if (job_id in self._jobs()) is not (what == "subscribe"):
                return
            confirmed = self._confirmed[what, channel.encode()] = threading.Event()
            try:
                if self._channels is None:
                    return  # when it connects, it listens to all that are wanted then
                getattr(self._channels, what)(channel)
                # Whoever listens is not to wait again and again for a server that hangs.
                if not self._is_mute and not confirmed.wait(PATIENCE_S):
                    self._is_mute = True
            except RedisError:
                return  # the thread finds out too, and connects again
            finally:
                self._confirmed.pop((what, channel.encode()), None)

    def stop(self, link: RedisConnection) -> None:
        """End, when what was told until now has been heard; wait a moment for that."""
        if self._thread is None:
            self._stopping.set()
            return
        try:
            # It comes after all that was told before.
            link.call(lambda client: client.publish(self._own_channel, "stop"))
        except RedisAway:
            self._stopping.set()
        self._thread.join(PATIENCE_S)
        self._stopping.set()

    # ----------------------------------------------------------------------------------------- its thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._connect()
                self._read()
            except (RedisError, OSError):
                self._tried.set()
                self._stopping.wait(_AGAIN_S)
            finally:
                self._disconnect()
        self._client.close()

    def _connect(self) -> None:
        channels: PubSub = self._client.pubsub()  # type: ignore[no-untyped-call]
        try:
            channels.subscribe(self._own_channel)
        finally:
            # From now on others change what is listened to; what is wanted already is not on their minds any more.
            self._channels = channels
        wanted = [self._events.channel(job_id) for job_id in self._jobs()]
        if wanted:
            channels.subscribe(*wanted)

    def _read(self) -> None:
        channels = self._channels
        assert channels is not None, "it was connected"  # noqa: S101
        heard_at, has_asked = time.monotonic(), False
        self._tell_of_gaps(0.0)
        self._tried.set()
        while True:
            message = channels.get_message(timeout=_LOOK_S)
            now = time.monotonic()
            if message is not None:
                heard_at, has_asked = now, False
                if self._is_mute:
                    self._is_mute = False
                    self._tell_of_gaps(0.0)
                if self._take(message):
                    self._stopping.set()
                    return
            elif self._stopping.is_set() or now - heard_at > _LOST_S:
                raise RedisConnectionError
            elif now - heard_at > _SILENCE_S and not has_asked:
                channels.ping()
                has_asked = True
            self._tell_of_gaps(_GAP_AFTER_S)

    def _take(self, message: dict[str, Any]) -> bool:
        """Take a message in; return whether it is the last."""
        kind, channel = message["type"], message["channel"]
        if kind in ("subscribe", "unsubscribe"):
            confirmed = self._confirmed.get((kind, channel))
            if confirmed is not None:
                confirmed.set()
        elif kind == "message" and channel == self._own_channel.encode():
            return True
        elif kind == "message":
            self._hand_over(self._events.received(channel, message["data"]))
        return False

    def _disconnect(self) -> None:
        channels, self._channels = self._channels, None
        for confirmed in list(self._confirmed.values()):
            confirmed.set()  # nobody answers any more
        if channels is not None:
            channels.close()
