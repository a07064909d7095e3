"""Limits of the HTTP server's connections: their number, and how long one may be open without a request.

The limits are independent of keys, which a client has not sent yet when it connects. Idle connections are closed first,
so that a client with many of them does not keep others out.
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
"""How long a request's head may take: from the start of a connection, or from its first byte on an open one."""
STALLED_S = 60.0
"""A connection is closed if its client reads nothing of a response for this long."""
LARGEST_HEAD = 131_072
"""Largest size of a request's head, in bytes."""
_RESERVED_FILES = 256
"""Open files for the database, Redis, ComfyUI and the outputs; half of the limit if that is less."""
_MAX_PIPELINED = 100
"""Requests that a connection may send before their responses."""
_DEFAULT_MAX = 10_000
"""Connections of a process unless MAX_CONNECTIONS is set: each needs some memory."""
_FULL, _HEAD_TOO_SLOW, _HEAD_TOO_LARGE = (
    b"503 Service Unavailable",
    b"408 Request Timeout",
    b"431 Request Header Fields Too Large",
)


def connection_limits(settings: GatewaySettings) -> tuple[int, int]:
    """Return the limits of this process's connections: in all, and from one address.

    Raises:
        InvalidInput: the limit of open files is too low for MAX_CONNECTIONS.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = files - min(files // 2, _RESERVED_FILES)
    most = settings.max_connections or min(available, _DEFAULT_MAX)
    if most > available:
        raise InvalidInput(
            f"MAX_CONNECTIONS is {most}, but the limit of {files} open files allows only {available} connections",
            hint="Raise the limit (ulimit -n), or lower MAX_CONNECTIONS",
        )
    return most, min(most, settings.max_connections_per_address or max(1, most // 2))


class Connection:
    """A connection, from its acceptance until it is closed.

    Attributes:
        network: its client's `network_of`.
        is_websocket: whether it was upgraded to a WebSocket.
    """

    def __init__(self, protocol: Any, transport: asyncio.Transport, network: str) -> None:
        """Take the protocol with which uvicorn serves it."""
        self.network = network
        self.is_websocket = False
        self._protocol = protocol
        self._transport = transport
        self._has_request = False
        self._head_since: float | None = time.monotonic()
        self._head_bytes = 0
        self._unsent = 0
        self._moved_at = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether there is no request and no response in progress: closing it loses nothing."""
        return self._waits_for_head and not self._transport.get_write_buffer_size()

    @property
    def is_new(self) -> bool:
        """Whether it has had no request yet."""
        return not self._has_request

    @property
    def _waits_for_head(self) -> bool:
        cycle = self._protocol.cycle
        return not self.is_websocket and (cycle is None or cycle.response_complete)

    @property
    def _is_stream(self) -> bool:
        return self.is_websocket or is_stream(self._protocol.cycle.scope)

    def note_bytes(self, count: int) -> None:
        """Count bytes that were received."""
        if not self._waits_for_head:
            self._has_request, self._head_since, self._head_bytes = True, None, 0
            assign(self._transport, Group.STREAMS if self._is_stream else None)
            return
        self._head_since = self._head_since or time.monotonic()
        self._head_bytes += count
        if self._head_bytes > LARGEST_HEAD:
            self.reject(_HEAD_TOO_LARGE)

    def end_if_stuck(self, now: float) -> None:
        """Close it if its request's head, or the client's reading of the response, takes too long."""
        unsent = self._transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        if now - self._moved_at > STALLED_S:
            self.abort()
        elif self._waits_for_head and self._head_since is not None and now - self._head_since > HEAD_S:
            if self._head_bytes:
                self.reject(_HEAD_TOO_SLOW)
            else:
                self.abort()

    def reject(self, status: bytes) -> None:
        """Respond with a status without a body, and close it."""
        if not self._transport.is_closing():
            head = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
            self._transport.write(head % status)
            self._transport.close()

    def abort(self) -> None:
        """Close it at once, without sending the rest."""
        self._transport.abort()


class Connections:
    """All connections of a server."""

    def __init__(self, most: int, most_per_address: int, proxies: Iterable[str] = ()) -> None:
        """Take the limits.

        Args:
            most: the largest number of connections.
            most_per_address: the largest number from one address that is not a proxy's.
            proxies: addresses and networks of proxies; `*` for any.
        """
        self._most = most
        self._most_per_address = most_per_address
        given = list(proxies)
        self._all_are_proxies = "*" in given
        self._proxies = [ipaddress.ip_network(one, strict=False) for one in given if one != "*"]
        self._by_network: dict[str, dict[asyncio.BaseTransport, Connection]] = {}
        self._by_transport: dict[asyncio.BaseTransport, Connection] = {}
        self._closed_idle = 0
        self._rejected = 0

    def __len__(self) -> int:
        """Return the number of connections."""
        return len(self._by_transport)

    @classmethod
    def of(cls, settings: GatewaySettings) -> Connections:
        """Return the connections of a server; raise `InvalidInput` if the limit of open files is too low."""
        return cls(*connection_limits(settings), settings.proxies)

    def add(self, protocol: Any, transport: asyncio.Transport) -> Connection:
        """Add a new connection; reject it if there are too many and none of them is idle."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        connection = Connection(protocol, transport, network_of(address))
        own = self._by_network.get(connection.network, {})
        if len(own) >= self._most_per_address and not self._is_proxy(address):
            is_accepted = self._close_idle([own])
        else:
            is_accepted = len(self) < self._most or self._close_idle(self._largest_first())
        # A rejected connection counts until it is closed.
        self._by_network.setdefault(connection.network, {})[transport] = connection
        self._by_transport[transport] = connection
        if not is_accepted:
            self._rejected += 1
            connection.reject(_FULL)
        return connection

    def remove(self, transport: asyncio.BaseTransport) -> None:
        """Remove a connection."""
        connection = self._by_transport.pop(transport, None)
        if connection is not None:
            own = self._by_network.get(connection.network, {})
            own.pop(transport, None)
            if not own:
                self._by_network.pop(connection.network, None)

    def sweep(self) -> None:
        """Close connections that take too long, and log how many were closed or rejected; call it every second."""
        now = time.monotonic()
        for connection in list(self._by_transport.values()):
            connection.end_if_stuck(now)
        if self._closed_idle or self._rejected:
            log.warning(
                "%d connections are open: closed %d idle ones and rejected %d new ones",
                len(self), self._closed_idle, self._rejected,
            )  # fmt: skip
            self._closed_idle = self._rejected = 0

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
        """Close the oldest idle connection, preferably one without a request; return whether there was one."""
        for connections in candidates:
            idle = _first_idle(connections)
            if idle is not None:
                # It is closed in a moment, and must not be found again until then.
                self.remove(idle[0])
                idle[1].abort()
                self._closed_idle += 1
                return True
        return False


def _first_idle(
    connections: dict[asyncio.BaseTransport, Connection],
) -> tuple[asyncio.BaseTransport, Connection] | None:
    reusable = None
    for transport, connection in connections.items():
        if connection.is_idle:
            if connection.is_new:
                return transport, connection
            reusable = reusable or (transport, connection)
    return reusable


class LimitedState(ServerState):
    """The state that uvicorn's protocols share, with the connections.

    Attributes:
        limiter: the server's connections.
    """

    def __init__(self, limiter: Connections) -> None:
        super().__init__()
        self.limiter = limiter


class _LimitedHttp(asyncio.Protocol):
    """A mixin for one of uvicorn's HTTP protocols."""

    server_state: LimitedState
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assign(transport, Group.NEW)
        self._connection = self.server_state.limiter.add(self, self.transport)

    def data_received(self, data: bytes) -> None:
        # Ignore what arrives after the server has closed it.
        if not self.transport.is_closing():
            super().data_received(data)
            self._connection.note_bytes(len(data))
            # With httptools, uvicorn keeps any number of pipelined requests.
            if len(getattr(self, "pipeline", ())) > _MAX_PIPELINED:
                self._connection.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        assign(self.transport, None)
        self.server_state.limiter.remove(self.transport)
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, *event: Any) -> None:
        self._connection.is_websocket = True
        super().handle_websocket_upgrade(*event)  # type: ignore[misc]


class _LimitedWebSocket(asyncio.Protocol):
    """A mixin for one of uvicorn's WebSocket protocols."""

    transport: asyncio.Transport
    handshake_complete: bool

    def __init__(self, config: Any, server_state: LimitedState, *others: Any, **named: Any) -> None:
        super().__init__(config, server_state, *others, **named)  # type: ignore[call-arg]
        self._limiter = server_state.limiter

    def connection_lost(self, exc: Exception | None) -> None:
        assign(self.transport, None)
        self._limiter.remove(self.transport)
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        await super().send(message)  # type: ignore[misc]
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            # A denial response is complete; uvicorn would log an error about a missing handshake.
            self.handshake_complete = True


def http_protocol() -> type[asyncio.Protocol]:
    """Return the HTTP protocol that uvicorn would choose, with limited connections; needs a `LimitedState`."""
    return type("LimitedHttpProtocol", (_LimitedHttp, AutoHTTPProtocol), {})


def websocket_protocol() -> type[asyncio.Protocol]:
    """Return the WebSocket protocol that uvicorn would choose, with limited connections; needs a `LimitedState`."""
    assert isinstance(AutoWebSocketsProtocol, type), "the gateway's extra installs websockets"  # noqa: S101
    return type("LimitedWebSocketProtocol", (_LimitedWebSocket, AutoWebSocketsProtocol), {})
