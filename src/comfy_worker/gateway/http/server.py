"""The HTTP server, which stops gracefully on a signal, and at once for clients that only wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import ChangeReload

from comfy_worker.gateway.http.connections import (
    LARGEST_HEAD,
    Connections,
    LimitedState,
    http_protocol,
    websocket_protocol,
)
from comfy_worker.gateway.http.memory_tuning import return_large_blocks
from comfy_worker.gateway.http.ping import PingOnly
from comfy_worker.gateway.http.request_bodies import closing
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.signals import END_SIGNALS

log = logging.getLogger(__name__)

_DRAIN_S = 5
"""How long a stop waits for responses to be made, and then to be read, such as files over a slow connection."""
_IDLE_S = 0.5
"""How long a stop waits after the last response for further requests on open connections."""
_POLL_S = 0.05
_ACCEPTED_AT_ONCE = 16
"""New connections that are accepted before they are counted; asyncio accepts as many as the backlog has."""
_BACKLOG = 2048
"""New connections that may wait to be accepted."""
_NORMAL_CLOSURE, _SERVICE_RESTART = 1000, 1012
"""Close codes of WebSockets (RFC 6455, section 7.4.1, and IANA's registry)."""


class DrainingApp:
    """An application that closes the connection after each response, once it is draining.

    Clients then send their next request on a new connection, which leads to another gateway. On a WebSocket, they get a
    close code that says so.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app
        self._is_draining = False
        self._active = 0
        self._idle_since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, a WebSocket, or the server's lifespan."""

        async def send_last(message: Message) -> None:
            await send(_as_last(message) if self._is_draining else message)

        is_request = scope["type"] == "http"
        self._active += is_request
        try:
            await self._app(scope, receive, send_last)
        finally:
            self._active -= is_request
            self._idle_since = time.monotonic()

    def start_draining(self) -> None:
        """Close the connection after each response from now on."""
        self._is_draining = True
        self._idle_since = time.monotonic()

    async def wait_until_idle(self) -> None:
        """Return when there has been no request for a moment, or after a timeout."""
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
            if not self._active and time.monotonic() >= self._idle_since + _IDLE_S:
                return


def _as_last(message: Message) -> Message:
    if message["type"] == "http.response.start":
        return closing(message)
    if message["type"] == "websocket.close" and message.get("code", _NORMAL_CLOSURE) == _NORMAL_CLOSURE:
        return {**message, "code": _SERVICE_RESTART}
    return message


def _ignore(_url: str) -> None:
    pass


def _config(app: ASGIApp, settings: GatewaySettings, port: int | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.api_host,
        port=port or 0,
        # uvloop would accept all waiting connections at once, however many there are and however long it takes.
        loop="comfy_worker.gateway.http.fair_event_loop:FairEventLoop",
        http=http_protocol(),
        ws=websocket_protocol(),
        h11_max_incomplete_event_size=LARGEST_HEAD,
        forwarded_allow_ips=settings.proxies,
        backlog=_ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )


class Server(uvicorn.Server):
    """uvicorn's server, with limits of its connections, and exit code 0 on SIGTERM and SIGINT.

    Attributes:
        connections: the open connections.
    """

    def __init__(self, app: FastAPI, settings: GatewaySettings, announce: Callable[[str], None] = _ignore) -> None:
        """Take the application that `create_app` made.

        Args:
            app: the application.
            settings: where to listen, and the limits of connections.
            announce: called with the URL when the server listens.

        Raises:
            InvalidInput: the limit of open files is too low for MAX_CONNECTIONS.
        """
        self._draining_app = DrainingApp(app)
        self.connections = Connections.of(settings)
        self._health = (
            _config(PingOnly(self._draining_app), settings, settings.port_health)
            if settings.port_health not in (None, settings.api_port)
            else None
        )
        super().__init__(_config(self._draining_app, settings, settings.api_port))
        self.server_state = LimitedState(self.connections)
        self._gateway = app.state.gateway
        self._announce = announce
        return_large_blocks()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop on either signal; unlike uvicorn, do not raise the signal again afterwards."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.should_exit = True

        for number in END_SIGNALS:
            signal.signal(number, stop)
        try:
            yield
        finally:
            # A repeated signal must not kill the process while it stops.
            for number in END_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log where; uvicorn does not log sockets that it is given."""
        await super().startup(sockets)
        if not self.started:
            return
        if self._health is not None:
            # Several processes share this port, like the API's.
            await self._listen_for_pings(self._health, is_shared=sockets is not None)
        for server in self.servers:
            _raise_backlog(server)
        for one in sockets or []:
            log.info("running on %s", _url_of(one))
        self._announce(_url_of((sockets or list(self.servers[0].sockets))[0]))

    async def _listen_for_pings(self, config: uvicorn.Config, *, is_shared: bool) -> None:
        """Listen on PORT_HEALTH too, or exit as uvicorn does if that is impossible."""
        config.load()
        try:
            server = await asyncio.get_running_loop().create_server(
                lambda: self._make_protocol(config),
                host=config.host,
                port=config.port,
                backlog=_ACCEPTED_AT_ONCE,
                reuse_port=is_shared or None,
            )
        except OSError as error:
            log.critical("cannot listen on %s:%d: %s", config.host, config.port, (error.strerror or "").lower())
            await super().shutdown(None)
            sys.exit(STARTUP_FAILURE)
        self.servers.append(server)
        log.info("answering /ping on http://%s:%d", config.host, config.port)

    async def on_tick(self, counter: int) -> bool:
        """Check the connections once a second; uvicorn calls this ten times a second."""
        if counter % 10 == 0:
            self.connections.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, end streams, and stop when all other requests have been handled.

        A load balancer that finds the port closed goes to another gateway.
        """
        self._draining_app.start_draining()
        self._gateway.end_streams()
        await self._accept_last_connections()
        await self._draining_app.wait_until_idle()
        await super().shutdown(sockets)

    async def _accept_last_connections(self) -> None:
        """Close the port, and accept the connections that are waiting, which the system would otherwise reset."""
        numbers = [one.fileno() for server in self.servers for one in server.sockets]
        listening = [socket.socket(fileno=os.dup(number)) for number in numbers]
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in [connection for one in listening for connection in _accept_all(one)]:
            connection.setblocking(False)
            await loop.connect_accepted_socket(lambda: self._make_protocol(self.config), connection)

    def _make_protocol(self, config: uvicorn.Config) -> asyncio.Protocol:
        """Return the protocol of a connection, made as uvicorn makes it."""
        return config.http_protocol_class(
            config=config,  # type: ignore[call-arg]
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def _raise_backlog(server: asyncio.base_events.Server) -> None:
    """Let more new connections wait than are accepted at once."""
    for listening in server.sockets:
        with socket.socket(fileno=os.dup(listening.fileno())) as same:
            same.listen(_BACKLOG)


def _url_of(listening: socket.socket | TransportSocket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _accept_all(listening: socket.socket) -> list[socket.socket]:
    """Accept the waiting connections, and close the listening socket."""
    accepted = []
    with listening, contextlib.suppress(BlockingIOError):
        listening.setblocking(False)
        while True:
            accepted.append(listening.accept()[0])
    return accepted


def serve_reloading(serve: Callable[[list[socket.socket] | None], None], host: str, port: int, folder: Path) -> None:
    """Run `serve` in a process until a signal, and restart the process when a Python file in a folder changes.

    `serve` gets the sockets, which stay open, as `sockets`.
    """
    # It logs every changed file, byte code included.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    # The supervisor only reads the address and the folder; `serve` chooses the application.
    config = uvicorn.Config(
        "comfy_worker", host=host, port=port, log_config=None, reload=True, reload_dirs=[str(folder)]
    )
    ChangeReload(config, target=serve, sockets=[config.bind_socket()]).run()
