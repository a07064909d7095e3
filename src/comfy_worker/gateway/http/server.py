"""The HTTP server, and its end: a signal ends it in good order, and at once for all who only wait."""

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
    WatchedState,
    http_protocol,
    websocket_protocol,
)
from comfy_worker.gateway.http.memory_tuning import give_large_blocks_back
from comfy_worker.gateway.http.ping import PingOnly
from comfy_worker.gateway.http.request_bodies import closing
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.signals import END_SIGNALS

log = logging.getLogger(__name__)

_ANSWERS_END_S = 5
"""How long a stop waits for answers that are being made, and then for those being taken: files on a slow line, say."""
_LAST_REQUESTS_S = 0.5
"""How long a stop waits after the last answer for requests that are on their way on connections that are kept."""
_LOOK_S = 0.05
_ACCEPTED_AT_ONCE = 16
"""New connections that are accepted before those accepted are counted; asyncio takes as many as the backlog has."""
_WAITING = 2048
"""New connections that may wait for their acceptance."""
_NORMAL, _SERVICE_RESTART = 1000, 1012
"""Codes with which a WebSocket is closed: that all is told, and that the server ends."""


class DrainingApp:
    """An application whose every answer ends its connection, once that has begun to end.

    A client reads so in the answer, and sends its next request on another connection: to another gateway. One that
    listens on a WebSocket reads it in the code that closes it.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Take the application."""
        self._app = app
        self._is_ending = False
        self._under_way = 0
        self._quiet_since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, one WebSocket, or whatever else the server asks for."""

        async def send_last(message: Message) -> None:
            await send(_as_last(message) if self._is_ending else message)

        is_request = scope["type"] == "http"
        self._under_way += is_request
        try:
            await self._app(scope, receive, send_last)
        finally:
            self._under_way -= is_request
            self._quiet_since = time.monotonic()

    def begin_to_end(self) -> None:
        """Let every answer end its connection from now on."""
        self._is_ending = True
        self._quiet_since = time.monotonic()

    async def until_quiet(self) -> None:
        """Return when no request has been under way for a moment, or when that does not come about in time."""
        deadline = time.monotonic() + _ANSWERS_END_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
            if not self._under_way and time.monotonic() >= self._quiet_since + _LAST_REQUESTS_S:
                return


def _as_last(message: Message) -> Message:
    if message["type"] == "http.response.start":
        return closing(message)
    if message["type"] == "websocket.close" and message.get("code", _NORMAL) == _NORMAL:
        return {**message, "code": _SERVICE_RESTART}
    return message


def _tell_nobody(_url: str) -> None:
    pass


def _config(app: ASGIApp, settings: GatewaySettings, port: int | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.api_host,
        port=port or 0,
        # uvloop would accept all that wait at once, however many files that opens and however long it takes.
        loop="comfy_worker.gateway.http.fair_event_loop:FairEventLoop",
        http=http_protocol(),
        ws=websocket_protocol(),
        h11_max_incomplete_event_size=LARGEST_HEAD,
        forwarded_allow_ips=settings.proxies,
        backlog=_ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_ANSWERS_END_S,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which watches its connections and ends with exit code 0 on SIGTERM and SIGINT.

    Attributes:
        connections: those that are open.
    """

    def __init__(self, app: FastAPI, settings: GatewaySettings, announce: Callable[[str], None] = _tell_nobody) -> None:
        """Take the application, which has to have `state.let_go`, and the settings that say where to listen.

        `announce` is told of the URL when it listens.

        Raises:
            InvalidInput: the limit of open files is too low for the connections that are set.
        """
        self._ending = DrainingApp(app)
        self.connections = Connections.of(settings)
        self._health = (
            _config(PingOnly(self._ending), settings, settings.port_health)
            if settings.port_health not in (None, settings.api_port)
            else None
        )
        super().__init__(_config(self._ending, settings, settings.api_port))
        self.server_state = WatchedState(self.connections)
        self._let_go = app.state.let_go
        self._announce = announce
        give_large_blocks_back()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """End on either signal; unlike uvicorn's own, it is not raised again afterwards to kill the process."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.should_exit = True

        for number in END_SIGNALS:
            signal.signal(number, stop)
        try:
            yield
        finally:
            # Whoever says it again while the process ends has been heard.
            for number in END_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where; of sockets that it is given uvicorn says nothing."""
        await super().startup(sockets)
        if not self.started:
            return
        if self._health is not None:
            # Several processes share it, as they share the API's port.
            await self._listen_for_pings(self._health, is_shared=sockets is not None)
        for server in self.servers:
            _let_more_wait(server)
        for one in sockets or []:
            log.info("running on %s", _url_of(one))
        self._announce(_url_of((sockets or list(self.servers[0].sockets))[0]))

    async def _listen_for_pings(self, config: uvicorn.Config, *, is_shared: bool) -> None:
        """Listen on the port of PORT_HEALTH too, or end the process as uvicorn does if that cannot be."""
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
            log.critical("%s:%d cannot be listened at: %s", config.host, config.port, (error.strerror or "").lower())
            await super().shutdown(None)
            sys.exit(STARTUP_FAILURE)
        self.servers.append(server)
        log.info("answering /ping on http://%s:%d", config.host, config.port)

    async def on_tick(self, counter: int) -> bool:
        """Look after the connections once a second; this is called ten times as often."""
        if counter % 10 == 0:
            self.connections.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, let those go that wait, and end when the others have their answers.

        A load balancer that finds the port closed goes to another gateway. What it has sent here already is answered.
        """
        self._ending.begin_to_end()
        self._let_go()
        await self._take_last_connections()
        await self._ending.until_quiet()
        await super().shutdown(sockets)

    async def _take_last_connections(self) -> None:
        """Close the port, and take those who have reached it already: the system would cut their connections."""
        numbers = [one.fileno() for server in self.servers for one in server.sockets]
        listening = [socket.socket(fileno=os.dup(number)) for number in numbers]
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in [connection for one in listening for connection in _all_that_wait(one)]:
            connection.setblocking(False)
            await loop.connect_accepted_socket(lambda: self._make_protocol(self.config), connection)

    def _make_protocol(self, config: uvicorn.Config) -> asyncio.Protocol:
        """Return what serves a connection, made as uvicorn makes it."""
        return config.http_protocol_class(
            config=config,  # type: ignore[call-arg]
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def _let_more_wait(server: asyncio.base_events.Server) -> None:
    """Let the system hold more new connections than are accepted at once."""
    for listening in server.sockets:
        with socket.socket(fileno=os.dup(listening.fileno())) as same:
            same.listen(_WAITING)


def _url_of(listening: socket.socket | TransportSocket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _all_that_wait(listening: socket.socket) -> list[socket.socket]:
    """Return the connections that nobody has taken yet, and listen no more."""
    taken = []
    with listening, contextlib.suppress(BlockingIOError):
        listening.setblocking(False)
        while True:
            taken.append(listening.accept()[0])
    return taken


def serve_reloading(serve: Callable[[list[socket.socket] | None], None], host: str, port: int, folder: Path) -> None:
    """Let a process serve, and another one in its place whenever a Python file below a folder changes, until a signal.

    `serve` runs in these processes, one at a time, and gets the sockets that stay open over all of them as `sockets`.
    """
    # It tells of every file, Python's own byte code too.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    # The supervisor reads the address and the folder only; what is served is `serve`'s.
    config = uvicorn.Config(
        "comfy_worker", host=host, port=port, log_config=None, reload=True, reload_dirs=[str(folder)]
    )
    ChangeReload(config, target=serve, sockets=[config.bind_socket()]).run()
