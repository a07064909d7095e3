"""The connections of the HTTP server: how many there may be, and for how long one may be open without asking anything.

The rules ask for no key, because whoever opens a connection has not shown one yet. The server closes idle connections
first, so that a client with many of them keeps nobody else out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import time
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol
from uvicorn.server import ServerState

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.http.fair_event_loop import Group, assign
from comfy_worker.gateway.http.hosts import network_of
from comfy_worker.gateway.http.stream_limits import is_stream
from comfy_worker.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

HEAD_S = 10.0
"""How long a request's head may take, from the acceptance of its connection; on a kept one, from its own first byte."""
STALLED_S = 60.0
"""After that a connection is cut whose client takes nothing of its answer."""
LARGEST_HEAD = 131_072
"""Bytes that a request's head may have."""
_KEPT_FREE = 256
"""Open files that the database, Redis, ComfyUI and the outputs need; half of the limit where that is less."""
_MOST_WAITING = 100
"""Requests that a connection may have sent without waiting for their answers."""
_MOST = 10_000
"""Connections that a process has at most where nothing else is set: each takes some memory."""
_FULL, _HEAD_TOO_SLOW, _HEAD_TOO_LARGE = (
    b"503 Service Unavailable",
    b"408 Request Timeout",
    b"431 Request Header Fields Too Large",
)


def connection_limits(settings: GatewaySettings) -> tuple[int, int]:
    """Return how many connections this process may have in all, and from one address.

    Raises:
        InvalidInput: the limit of open files is too low for what is set.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = files - min(files // 2, _KEPT_FREE)
    most = settings.max_connections or min(room, _MOST)
    if most > room:
        raise InvalidInput(
            f"MAX_CONNECTIONS is {most}, but the limit of {files} open files leaves room for {room} connections",
            hint="Raise the limit (ulimit -n), or lower MAX_CONNECTIONS",
        )
    return most, min(most, settings.max_connections_per_address or max(1, most // 2))


class Connection:
    """One connection, from its acceptance until it is closed.

    Attributes:
        network: its client, as `network_of` names it.
        is_websocket: whether it has become a WebSocket.
    """

    def __init__(self, protocol: Any, transport: asyncio.Transport, network: str) -> None:
        """Take the protocol that uvicorn serves it with."""
        self.network = network
        self.is_websocket = False
        self._protocol = protocol
        self._transport = transport
        self._has_asked = False
        self._head_since: float | None = time.monotonic()
        self._head_bytes = 0
        self._unsent = 0
        self._moved_at = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, and no answer either: closing it loses nothing."""
        return self._waits_for_head and not self._transport.get_write_buffer_size()

    @property
    def is_new(self) -> bool:
        """Whether it has not asked for anything yet."""
        return not self._has_asked

    @property
    def _waits_for_head(self) -> bool:
        cycle = self._protocol.cycle
        return not self.is_websocket and (cycle is None or cycle.response_complete)

    @property
    def _is_stream(self) -> bool:
        return self.is_websocket or is_stream(self._protocol.cycle.scope)

    def note_bytes(self, count: int) -> None:
        """Take note of bytes that have been read."""
        if not self._waits_for_head:
            self._has_asked, self._head_since, self._head_bytes = True, None, 0
            assign(self._transport, Group.STREAMS if self._is_stream else None)
            return
        self._head_since = self._head_since or time.monotonic()
        self._head_bytes += count
        if self._head_bytes > LARGEST_HEAD:
            self.refuse(_HEAD_TOO_LARGE)

    def end_if_stuck(self, now: float) -> None:
        """Close it if its request's head, or the client's reading of the answer, takes too long."""
        unsent = self._transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        if now - self._moved_at > STALLED_S:
            self.cut()
        elif self._waits_for_head and self._head_since is not None and now - self._head_since > HEAD_S:
            if self._head_bytes:
                self.refuse(_HEAD_TOO_SLOW)
            else:
                self.cut()

    def refuse(self, status: bytes) -> None:
        """Answer with a status alone, and close it."""
        if not self._transport.is_closing():
            head = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
            self._transport.write(head % status)
            self._transport.close()

    def cut(self) -> None:
        """Close it at once, whatever has not been sent."""
        self._transport.abort()


class Connections:
    """All connections of a server."""

    def __init__(self, most: int, most_per_address: int, proxies: Iterable[str] = ()) -> None:
        """Take the limits.

        Args:
            most: connections in all.
            most_per_address: connections of one address, unless it is a proxy's.
            proxies: addresses and networks through which many clients come; `*` for any.
        """
        self._most = most
        self._most_per_address = most_per_address
        given = list(proxies)
        self._all_are_proxies = "*" in given
        self._proxies = [ipaddress.ip_network(one, strict=False) for one in given if one != "*"]
        self._by_network: dict[str, dict[asyncio.BaseTransport, Connection]] = {}
        self._by_transport: dict[asyncio.BaseTransport, Connection] = {}
        self._closed_idle = 0
        self._refused = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._by_transport)

    @classmethod
    def of(cls, settings: GatewaySettings) -> Connections:
        """Return those of a server with these settings; raise `InvalidInput` if it may not open so many files."""
        return cls(*connection_limits(settings), settings.proxies)

    def add(self, protocol: Any, transport: asyncio.Transport) -> Connection:
        """Count a new connection; it is refused if there are too many and none of them is idle."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        connection = Connection(protocol, transport, network_of(address))
        own = self._by_network.get(connection.network, {})
        if len(own) >= self._most_per_address and not self._is_proxy(address):
            has_room = self._close_idle([own])
        else:
            has_room = len(self) < self._most or self._close_idle(self._largest_first())
        # A refused one is counted too until it is closed.
        self._by_network.setdefault(connection.network, {})[transport] = connection
        self._by_transport[transport] = connection
        if not has_room:
            self._refused += 1
            connection.refuse(_FULL)
        return connection

    def remove(self, transport: asyncio.BaseTransport) -> None:
        """Count a connection no more."""
        connection = self._by_transport.pop(transport, None)
        if connection is not None:
            own = self._by_network.get(connection.network, {})
            own.pop(transport, None)
            if not own:
                self._by_network.pop(connection.network, None)

    def sweep(self) -> None:
        """End what takes too long, and write to the log what was closed for want of room; to be called every second."""
        now = time.monotonic()
        for connection in list(self._by_transport.values()):
            connection.end_if_stuck(now)
        if self._closed_idle or self._refused:
            log.warning(
                "%d connections are open: closed %d idle ones and refused %d new ones",
                len(self), self._closed_idle, self._refused,
            )  # fmt: skip
            self._closed_idle = self._refused = 0

    def _is_proxy(self, address: str) -> bool:
        if self._all_are_proxies:
            return True
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(found in network for network in self._proxies)

    def _largest_first(self) -> Iterable[dict[asyncio.BaseTransport, Connection]]:
        return sorted(self._by_network.values(), key=len, reverse=True)

    def _close_idle(self, candidates: Iterable[dict[asyncio.BaseTransport, Connection]]) -> bool:
        """Close the oldest idle connection, rather one that has asked for nothing; return whether there was one."""
        for connections in candidates:
            idle = _first_idle(connections)
            if idle is not None:
                # Its file is closed in a moment; until then it is not to be found again.
                self.remove(idle[0])
                idle[1].cut()
                self._closed_idle += 1
                return True
        return False


def _first_idle(
    connections: dict[asyncio.BaseTransport, Connection],
) -> tuple[asyncio.BaseTransport, Connection] | None:
    kept = None
    for transport, connection in connections.items():
        if connection.is_idle:
            if connection.is_new:
                return transport, connection
            kept = kept or (transport, connection)
    return kept


class WatchedState(ServerState):
    """What uvicorn's protocols share, with the connections.

    Attributes:
        watched: the server's connections.
    """

    def __init__(self, watched: Connections) -> None:
        """Take the connections."""
        super().__init__()
        self.watched = watched


class _WatchedHttp(asyncio.Protocol):
    """To be put in front of one of uvicorn's HTTP protocols."""

    server_state: WatchedState
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assign(transport, Group.NEW)
        self._connection = self.server_state.watched.add(self, self.transport)

    def data_received(self, data: bytes) -> None:
        # What comes after the server has closed it belongs to nobody.
        if not self.transport.is_closing():
            super().data_received(data)
            self._connection.note_bytes(len(data))
            # With httptools, uvicorn reads on while requests wait, and would keep any number of them.
            if len(getattr(self, "pipeline", ())) > _MOST_WAITING:
                self._connection.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        assign(self.transport, None)
        self.server_state.watched.remove(self.transport)
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, *event: Any) -> None:
        self._connection.is_websocket = True
        super().handle_websocket_upgrade(*event)  # type: ignore[misc]


class _WatchedWebSocket(asyncio.Protocol):
    """To be put in front of one of uvicorn's WebSocket protocols."""

    transport: asyncio.Transport
    handshake_complete: bool

    def __init__(self, config: Any, server_state: WatchedState, *others: Any, **named: Any) -> None:
        super().__init__(config, server_state, *others, **named)  # type: ignore[call-arg]
        self._watched = server_state.watched

    def connection_lost(self, exc: Exception | None) -> None:
        assign(self.transport, None)
        self._watched.remove(self.transport)
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        await super().send(message)  # type: ignore[misc]
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            # A refusal is a complete answer: uvicorn would write an error about a missing handshake to the log.
            self.handshake_complete = True


def http_protocol() -> type[asyncio.Protocol]:
    """Return the HTTP protocol that uvicorn would choose, with its connections watched; needs a `WatchedState`."""
    return type("WatchedHttpProtocol", (_WatchedHttp, AutoHTTPProtocol), {})


def websocket_protocol() -> type[asyncio.Protocol]:
    """Return the WebSocket protocol that uvicorn would choose, with its connections watched; needs a `WatchedState`."""
    assert isinstance(AutoWebSocketsProtocol, type), "the gateway's extra installs websockets"  # noqa: S101
    return type("WatchedWebSocketProtocol", (_WatchedWebSocket, AutoWebSocketsProtocol), {})
