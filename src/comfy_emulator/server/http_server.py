"""Serves an emulator on a port, within a running event loop."""

from __future__ import annotations

import asyncio
import socket

from aiohttp import web

from comfy_emulator.emulator import Emulator
from comfy_emulator.server.app import create_app

_STOP_TIMEOUT_S = 0.3
"""How long `stop` waits for the running node and for open requests."""


class HttpServer:
    """The HTTP server of one emulator.

    Attributes:
        port: the port, chosen by the system if 0 was given.
    """

    def __init__(self, emulator: Emulator, host: str, port: int) -> None:
        self.emulator = emulator
        self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port: int = self._listener.getsockname()[1]
        self._runner = web.AppRunner(create_app(emulator), access_log=None, shutdown_timeout=_STOP_TIMEOUT_S)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Start the emulator and accept connections."""
        await self._runner.setup()
        self.emulator.start()
        factory = self._runner.server
        if factory is None:
            raise RuntimeError("The web application was not set up.")
        self._server = await asyncio.get_running_loop().create_server(factory, sock=self._listener)

    def abort(self) -> None:
        """Refuse new connections and drop the open ones, like a process that dies."""
        if self._listener.fileno() >= 0:
            # `Server.close` would leave a connection open that asyncio has just accepted.
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        self.emulator.close()
        for connection in self._runner.server.connections if self._runner.server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()

    async def stop(self) -> None:
        """Drop everything, then wait briefly for what is still running."""
        self.abort()
        await self.emulator.wait_closed(_STOP_TIMEOUT_S)
        await self._runner.cleanup()
