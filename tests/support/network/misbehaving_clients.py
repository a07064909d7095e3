"""Clients that misbehave, on the loopback: many idle connections, half a request, an upload without an end."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from tests.support.waiting import TIMEOUT_S

_PART = b"x" * 65_536


@contextmanager
def few_files(limit: int) -> Iterator[None]:
    """Let processes that are started within the block open that many files at most."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect(url: str, source: str = "127.0.0.1", said: bytes = b"") -> socket.socket:
    """Return a connection to a server from an address of the loopback, on which something has been said."""
    address = urlsplit(url)
    connection = socket.create_connection(
        (address.hostname, address.port or 80), timeout=TIMEOUT_S, source_address=(source, 0)
    )
    connection.sendall(said)
    return connection


@contextmanager
def idle_connections(url: str, count: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """Hold connections on which nothing is said until the end of the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(url, source)) for _ in range(count)]


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection; what it said before is thrown away."""
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def upload(url: str, head: bytes, most: int) -> tuple[bytes, int]:
    """Send a request whose body goes on until the server hangs up; return its answer, and how many bytes were sent."""
    with connect(url, said=head) as connection:
        # What the system takes while the server is slow to hang up is not what the server reads.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(_PART))
        sent = 0
        try:
            while sent < most:
                connection.sendall(_PART)
                sent += len(_PART)
        except (ConnectionError, TimeoutError):
            pass
        try:
            return connection.recv(65_536), sent
        except ConnectionError:
            return b"", sent


@contextmanager
def endless_uploads(url: str, head: bytes, source: str = "127.0.0.1") -> Iterator[None]:
    """Upload without an end, again and again as often as the server hangs up, until the end of the block."""
    ending = threading.Event()

    def attack() -> None:
        while not ending.is_set():
            try:
                with connect(url, source, head) as connection:
                    while not ending.is_set():
                        connection.sendall(_PART)
            except OSError:
                continue

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(TIMEOUT_S)
