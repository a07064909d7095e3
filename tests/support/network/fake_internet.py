"""An internet of a few names, which is all that a fetch under test can reach; everything it tries is written down."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

_real_getaddrinfo = socket.getaddrinfo
_real_connect = socket.socket.connect


@dataclass
class FakeInternet:
    """What stands in for DNS and for routes.

    Attributes:
        names: addresses of each name; any other does not resolve.
        servers: the local port behind each address; any other takes no connection.
        asked: names that were looked up, in order.
        reached: addresses to which a connection was tried.

    It takes nothing from the threads that ran before it was installed: some of earlier tests connect again for a while.
    """

    names: Mapping[str, Sequence[str]]
    servers: Mapping[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeInternet:
        """Put it in the place of the real one."""
        internet = self
        others = set(threading.enumerate()) - {threading.current_thread()}

        def connect(sock: socket.socket, address: Any) -> None:
            if threading.current_thread() in others:
                _real_connect(sock, address)
            else:
                internet._connect(sock, address)

        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", connect, raising=False)
        return self

    def _getaddrinfo(self, host: Any, port: Any, *arguments: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        if _is_numeric(name):
            return _real_getaddrinfo(host, port, *arguments, **more)
        self.asked.append(name)
        if name not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [info for address in self.names[name] for info in _real_getaddrinfo(address, port, *arguments, **more)]

    def _connect(self, sock: socket.socket, address: Any) -> None:
        self.reached.append(str(address[0]))
        port = self.servers.get(str(address[0]))
        if port is None:
            raise ConnectionRefusedError(111, "no such server in this small internet")
        _real_connect(sock, ("127.0.0.1", port))


def _is_numeric(host: str) -> bool:
    """Return whether the system's resolver reads an address in it without asking anyone."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        try:
            socket.inet_aton(host)
        except OSError:
            return False
    return True
