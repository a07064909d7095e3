"""ComfyUI's websocket for one client_id: a hint that may come, be late or be lost."""

from __future__ import annotations

import socket as sockets
import time
from urllib.parse import quote

import websocket

from comfy_worker.comfy.protocol import FEATURE_FLAGS

_CONNECT_TIMEOUT_S = 5.0


class EventSocket:
    """Opened when possible, reopened a few times when lost, then left alone.

    Nothing here raises for a socket that does not work: who listens has the history to ask.

    Attributes:
        was_lost: whether frames may have been missed.
    """

    def __init__(self, comfyui_url: str, client_id: str, *, reconnect_attempts: int, reconnect_delay_s: float) -> None:
        scheme, _, rest = comfyui_url.partition("://")
        self._url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/ws?clientId={quote(client_id)}"
        self._attempts_left = reconnect_attempts
        self._delay_s = reconnect_delay_s
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
                timeout=_CONNECT_TIMEOUT_S,
                sockopt=((sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1),),
                http_no_proxy=["*"],
                skip_utf8_validation=True,
            )
            self._socket.send(FEATURE_FLAGS)
        except (OSError, websocket.WebSocketException):
            self._lose()
        return self.is_open

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

    def abort(self) -> None:
        """Wake up whoever is in `receive`; for another thread."""
        if self._socket is not None:
            self._socket.abort()

    def close(self) -> None:
        """Hang up without waiting for ComfyUI to agree."""
        if self._socket is not None:
            self._socket.shutdown()
            self._socket = None

    def _lose(self) -> None:
        self.was_lost = True
        self.close()
