"""Ends a fetch when its time is over or its job is cancelled."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from comfy_worker.net.errors import FetchError
from comfy_worker.stop import Stop


class FetchDeadline:
    """Shuts down a fetch's connections at its deadline, or when its job is cancelled.

    A socket timeout is not enough: it starts anew with each byte, and a server may send bytes one by one for ever, even
    within its headers.
    """

    def __init__(self, limit_s: float, stop: Stop) -> None:
        self._at = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._stop = stop
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._has_shut_down = False

    @contextmanager
    def enforced(self) -> Iterator[FetchDeadline]:
        """Enforce the deadline for every watched connection inside this block."""
        timer = threading.Timer(self.seconds_left(), self._shut_down)
        timer.daemon = True
        timer.start()
        try:
            with self._stop.calling(self._shut_down):
                yield self
        finally:
            timer.cancel()
            with self._lock:
                for connected in self._sockets:
                    connected.close()
                self._sockets.clear()

    def seconds_left(self) -> float:
        """Return how long the fetch may still take."""
        return max(0.001, self._at - time.monotonic())

    def check(self) -> None:
        """Raise `Cancelled` or `FetchError` if the fetch must end."""
        self._stop.check()
        if self._has_shut_down or time.monotonic() >= self._at:
            raise FetchError(f"it took longer than {self._limit_s:g} seconds")

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the deadline; raises as `check` does."""
        self._stop.wait(min(seconds, self.seconds_left()))
        self.check()

    def watch(self, connected: socket.socket) -> None:
        """Shut down this socket, too, when the fetch must end."""
        # TLS detaches the original socket from its file descriptor.
        duplicate = connected.dup()
        with self._lock:
            self._sockets.append(duplicate)
            if self._has_shut_down:
                _shut_down(duplicate)

    def _shut_down(self) -> None:
        with self._lock:
            self._has_shut_down = True
            for connected in self._sockets:
                _shut_down(connected)


def _shut_down(connected: socket.socket) -> None:
    # The peer may have closed it already.
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
