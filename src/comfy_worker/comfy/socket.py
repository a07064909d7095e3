"""ComfyUI's websocket for one client_id: a hint that may come, be late or be lost."""

from __future__ import annotations

import select
import socket as sockets
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import websocket

from comfy_worker.comfy.protocol import FEATURE_FLAGS

_LONGEST_IDLE_S = 60.0
_REST_OF_FRAME_S = 0.1
"""How long the rest of a frame may take that has begun to arrive while nobody listened."""


class EventSocket:
    """Opened when possible, reopened a few times when lost, then left alone.

    Nothing here raises for a socket that does not work: who listens has the history to ask.

    Attributes:
        client_id: ComfyUI sends the events of a prompt to the socket of the same client_id only.
        was_lost: whether frames may have been missed.
    """

    def __init__(
        self, comfyui_url: str, *, reconnect_attempts: int, reconnect_delay_s: float, connect_timeout_s: float
    ) -> None:
        self.client_id = str(uuid.uuid4())
        scheme, _, rest = comfyui_url.partition("://")
        self._url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/ws?clientId={self.client_id}"
        self._attempts_left = reconnect_attempts
        self._delay_s = reconnect_delay_s
        self._connect_timeout_s = connect_timeout_s
        self._next_attempt = 0.0
        self._socket: websocket.WebSocket | None = None
        self.was_lost = False

    @property
    def is_open(self) -> bool:
        """Whether frames can come."""
        return self._socket is not None

    def open(self) -> bool:
        """Try to connect; return whether it worked."""
        try:
            self._socket = websocket.create_connection(
                self._url,
                timeout=self._connect_timeout_s,
                sockopt=((sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1),),
                http_no_proxy=["*"],
                skip_utf8_validation=True,
            )
            self._socket.send(FEATURE_FLAGS)
        except (OSError, websocket.WebSocketException):
            self._lose()
        return self.is_open

    def renew(self) -> None:
        """Make ready for another prompt: connected if possible, with nothing missed so far."""
        if not self.is_open:
            self.open()
        self.was_lost = not self.is_open

    def reopen(self) -> bool:
        """Try to connect again if that is due; return whether the socket is open."""
        if self._attempts_left > 0 and time.monotonic() >= self._next_attempt:
            self._attempts_left -= 1
            self._next_attempt = time.monotonic() + self._delay_s
            self.open()
        return self.is_open

    def seconds_to_next_attempt(self) -> float | None:
        """Return how long it is until `reopen` does something, None if it never will."""
        return max(0.0, self._next_attempt - time.monotonic()) if self._attempts_left > 0 else None

    def receive(self, timeout_s: float) -> str | bytes | None:
        """Return the next frame, or None if nothing came in time or the socket was lost."""
        if self._socket is None:
            return None
        try:
            self._socket.settimeout(max(timeout_s, 0.001))
            opcode, data = self._socket.recv_data()
        except websocket.WebSocketTimeoutException:
            return None
        except (OSError, websocket.WebSocketException):
            self._lose()
            return None
        if opcode == websocket.ABNF.OPCODE_TEXT:
            return bytes(data).decode("utf-8", errors="replace")
        if opcode == websocket.ABNF.OPCODE_BINARY:
            return bytes(data)
        self._lose()
        return None

    def is_usable(self) -> bool:
        """Return whether an open socket that nobody listened to for a while is still connected.

        What ComfyUI told everybody meanwhile is thrown away; the end of the connection may lie behind it.
        """
        while self._has_unread_frames():
            if self.receive(_REST_OF_FRAME_S) is None:
                return False
        return self.is_open

    def _has_unread_frames(self) -> bool:
        """Return whether something has arrived, be it the end of the connection."""
        connection = None if self._socket is None else self._socket.sock
        return connection is not None and bool(select.select([connection], [], [], 0)[0])

    def abort(self) -> None:
        """Wake up whoever is in `receive`; for another thread."""
        # The thread that listens may lose the socket at this very moment.
        socket = self._socket
        if socket is not None:
            socket.abort()

    def close(self) -> None:
        """Hang up without waiting for ComfyUI to agree."""
        if self._socket is not None:
            self._socket.shutdown()
            self._socket = None

    def _lose(self) -> None:
        """Give the socket up as one that frames may have been missed on."""
        self.was_lost = True
        self.close()


class SocketPool:
    """Keeps one open socket from job to job: connecting costs as much as a small job does.

    A socket serves one job at a time, so that the frames of two jobs cannot meet. One that nobody used for a while is
    closed instead of lent: ComfyUI sends every client its queue's length, and must not wait for one that never reads.
    """

    def __init__(
        self, comfyui_url: str, *, reconnect_attempts: int, reconnect_delay_s: float, connect_timeout_s: float
    ) -> None:
        self._make = partial(
            EventSocket,
            comfyui_url,
            reconnect_attempts=reconnect_attempts,
            reconnect_delay_s=reconnect_delay_s,
            connect_timeout_s=connect_timeout_s,
        )
        self._lock = threading.Lock()
        self._idle: EventSocket | None = None
        self._idle_since = 0.0

    @contextmanager
    def lend(self) -> Iterator[EventSocket]:
        """Yield a socket, tried to be open; take it back if it is as good as new."""
        socket = self._take() or self._open()
        try:
            yield socket
        except BaseException:
            # Frames of this job may still be on their way.
            socket.close()
            raise
        self._put_back(socket)

    def close(self) -> None:
        """Close the kept socket."""
        if socket := self._take():
            socket.close()

    def _take(self) -> EventSocket | None:
        with self._lock:
            socket, self._idle = self._idle, None
        if socket is None:
            return None
        if time.monotonic() - self._idle_since < _LONGEST_IDLE_S and socket.is_usable():
            return socket
        socket.close()
        return None

    def _open(self) -> EventSocket:
        socket = self._make()
        socket.open()
        return socket

    def _put_back(self, socket: EventSocket) -> None:
        with self._lock:
            if socket.is_open and not socket.was_lost and self._idle is None:
                self._idle, self._idle_since = socket, time.monotonic()
                return
        socket.close()
