"""A line to PostgreSQL that can break between a commit and its answer."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

_CHUNK = 65536


class LostAnswers:
    """Forwards everything to a server, except the responses that it should lose; a context manager."""

    def __init__(self, url: str) -> None:
        """Stand before the server of a database URL."""
        self._parts = urlsplit(url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._passing: int | None = None
        self._sockets: list[socket.socket] = [self._listening]
        self._threads = [threading.Thread(target=self._accept)]
        self.lost = threading.Event()

    @property
    def url(self) -> str:
        """The database, by this line."""
        port = self._listening.getsockname()[1]
        return self._parts._replace(netloc=f"{self._parts.username}@127.0.0.1:{port}").geturl()

    def lose(self, after: int = 0) -> None:
        """Let one commit happen whose answer never comes; so many others are answered before."""
        with self._lock:
            self._passing = after
            self.lost.clear()

    def __enter__(self) -> LostAnswers:
        self._threads[0].start()
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            _close(*self._sockets)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _address = self._listening.accept()
                server = socket.create_connection((self._parts.hostname or "", self._parts.port or 0))
                with self._lock:
                    self._sockets += [client, server]
                    for relay in (self._ask, self._answer):
                        self._threads.append(threading.Thread(target=relay, args=(client, server)))
                        self._threads[-1].start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        """Pass on what a client asks."""
        with suppress(OSError):
            while data := client.recv(_CHUNK):
                if b"COMMIT" in data and self._is_to_be_lost():
                    # The client receives nothing any more, and the server's answer is read to its end.
                    client.shutdown(socket.SHUT_RDWR)
                    server.sendall(data)
                    self.lost.set()
                    continue
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    @staticmethod
    def _answer(client: socket.socket, server: socket.socket) -> None:
        """Pass on what the server answers."""
        with suppress(OSError):
            while data := server.recv(_CHUNK):
                client.sendall(data)
        _close(client)

    def _is_to_be_lost(self) -> bool:
        with self._lock:
            if self._passing is None:
                return False
            self._passing -= 1
            if self._passing >= 0:
                return False
            self._passing = None
            return True


def _close(*sockets: socket.socket) -> None:
    for one in sockets:
        # Threads blocked in it wake up.
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
