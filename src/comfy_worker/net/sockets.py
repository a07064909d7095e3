"""Hooks into urllib3's connections: botocore, requests and this package all connect through them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

from urllib3 import HTTPConnectionPool
from urllib3.exceptions import NewConnectionError

from comfy_worker.net.public_addresses import is_public

_Pool = TypeVar("_Pool", bound=HTTPConnectionPool)


def hooked_pool(pool_class: type[_Pool], on_connect: Callable[[socket.socket], None]) -> type[_Pool]:
    """Return a class of urllib3 connection pools that call `on_connect` with each new socket, before TLS.

    If `on_connect` raises `OSError`, the connection fails.
    """
    connection_class: Any = pool_class.ConnectionCls

    class HookedConnection(connection_class):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            connected: socket.socket = super()._new_conn()
            try:
                on_connect(connected)
            except OSError as error:
                connected.close()
                raise NewConnectionError(self, str(error)) from error
            return connected

    class HookedPool(pool_class):  # type: ignore[misc, valid-type]
        ConnectionCls = HookedConnection

    return HookedPool


def check_public_peer(connected: socket.socket) -> None:
    """Refuse a connection to an address that is not public.

    Raises:
        OSError: the address is not public.
    """
    if not is_public(str(connected.getpeername()[0])):
        raise OSError("the host has no public address")
