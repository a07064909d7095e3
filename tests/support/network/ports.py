"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOWEST = 10_000
_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUALLY_GIVEN_OUT = 49_152
"""RFC 6335, section 6."""


@contextmanager
def closed_port() -> Iterator[int]:
    """Hold a port on which nobody listens, until the end of the block."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        yield port


def free_port() -> int:
    """Return a port on which a process can listen later, and again after it was killed.

    None of those that the system gives to outgoing connections: one of these could take it meanwhile.
    """
    chance = random.SystemRandom()  # hypothesis seeds the usual one, in several processes alike
    given_out = int(_GIVEN_OUT.read_text().split()[0]) if _GIVEN_OUT.exists() else _USUALLY_GIVEN_OUT
    while True:
        port = chance.randrange(_LOWEST, given_out if given_out > _LOWEST else _USUALLY_GIVEN_OUT)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
