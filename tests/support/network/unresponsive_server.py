"""A server that takes every connection and never answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unresponsive_server() -> Iterator[str]:
    """Yield the URL of a server that never answers; at the end of the block its connections are cut off."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        host, port = listener.getsockname()
        # The system takes the connections, and ends those that nobody has accepted with the listener.
        yield f"http://{host}:{port}"
