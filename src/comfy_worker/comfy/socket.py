"""ComfyUI's websocket for one client_id."""

from __future__ import annotations

import select
import socket as sockets
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import websocket

from comfy_worker.comfy.protocol import FEATURE_FLAGS
from comfy_worker.settings import Settings

_CONNECT_TIMEOUT_S = 5.0
_MAX_IDLE_S = 60.0
_REST_OF_FRAME_S = 0.1
"""How long to wait for the rest of a frame that began to arrive while the socket was idle."""


class EventSocket:
    """Reconnects a few times when lost, then stays closed.

    No method raises if the connection fails: the history has the outcome.

    Attributes:
        client_id: ComfyUI sends the events of a prompt only to the socket with the prompt's client_id.
        was_lost: whether frames may have been missed.
    """

    def __init__(self, settings: Settings) -> None:
        self.client_id = str(uuid.uuid4())
        scheme, _, rest = settings.comfyui_url.partition("://")
        self._url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/ws?clientId={self.client_id}"
        self._attempts_left = settings.websocket_reconnect_attempts
        self._delay_s = settings.websocket_reconnect_delay_s
        self._connect_timeout_s = min(_CONNECT_TIMEOUT_S, settings.comfyui_request_timeout_s)
        self._next_attempt = 0.0
        self._socket: websocket.WebSocket | None = None
        self.was_lost = False

    @property
    def is_open(self) -> bool:
        """Whether the socket is connected."""
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
        """Prepare for another prompt: connect if necessary and possible."""
        if not self.is_open:
            self.open()
        self.was_lost = not self.is_open

    def reopen(self) -> bool:
        """Reconnect if an attempt is due; return whether the socket is open."""
        if self._attempts_left > 0 and time.monotonic() >= self._next_attempt:
            self._attempts_left -= 1
            self._next_attempt = time.monotonic() + self._delay_s
            self.open()
        return self.is_open

    def seconds_to_next_attempt(self) -> float | None:
        """Return the seconds until `reopen` makes an attempt, None if none is left."""
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
        """Return whether an idle socket is still connected; discard the frames that came meanwhile."""
        while self._has_unread_frames():
            if self.receive(_REST_OF_FRAME_S) is None:
                return False
        return self.is_open

    def _has_unread_frames(self) -> bool:
        """Return whether data, or the end of the connection, can be read."""
        connection = None if self._socket is None else self._socket.sock
        return connection is not None and bool(select.select([connection], [], [], 0)[0])

    def abort(self) -> None:
        """Make a `receive` in another thread return."""
        # The other thread may close the socket at the same time.
        socket = self._socket
        if socket is not None:
            socket.abort()

    def close(self) -> None:
        """Close the connection without a closing handshake."""
        if self._socket is not None:
            self._socket.shutdown()
            self._socket = None

    def _lose(self) -> None:
        self.was_lost = True
        self.close()


class SocketPool:
    """Keeps one open socket from job to job: connecting costs as much as a small job does.

    A socket serves one job at a time, so that the frames of two jobs cannot mix. A socket that was idle for a minute is
    closed: ComfyUI sends its queue's length to every client, and must not block on one that never reads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._idle: EventSocket | None = None
        self._idle_since = 0.0

    @contextmanager
    def lend(self) -> Iterator[EventSocket]:
        """Yield a socket, connected if possible; keep it afterwards if it missed nothing."""
        socket = self._take()
        if socket is None:
            socket = EventSocket(self._settings)
            socket.open()
        try:
            yield socket
        except BaseException:
            # Frames of this job may still arrive.
            socket.close()
            raise
        self._put_back(socket)

    def close(self) -> None:
        """Close the idle socket."""
        if socket := self._take():
            socket.close()

    def _take(self) -> EventSocket | None:
        with self._lock:
            socket, self._idle = self._idle, None
        if socket is None:
            return None
        if time.monotonic() - self._idle_since < _MAX_IDLE_S and socket.is_usable():
            return socket
        socket.close()
        return None

    def _put_back(self, socket: EventSocket) -> None:
        with self._lock:
            if socket.is_open and not socket.was_lost and self._idle is None:
                self._idle, self._idle_since = socket, time.monotonic()
                return
        socket.close()
