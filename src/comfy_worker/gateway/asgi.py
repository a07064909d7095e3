"""The gateway in a server that is started from outside, such as `uvicorn main:app`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.main import main as uvicorn_command

from comfy_worker.gateway.http.server import DrainingApp
from comfy_worker.signals import END_SIGNALS

_UNKNOWN_HOST = "0.0.0.0"  # noqa: S104 - nothing is bound to it


@dataclass(frozen=True)
class ServerOptions:
    """How the server was started.

    Attributes:
        host: the address that it listens on; `0.0.0.0` if unknown, so that keys are required.
        workers: the number of its processes.
    """

    host: str = _UNKNOWN_HOST
    workers: int = 1


def server_options() -> ServerOptions:
    """Return how this process's server was started, as far as the arguments of `uvicorn` say."""
    program = Path(sys.argv[0])
    if "uvicorn" not in (program.name, program.parent.name):
        return ServerOptions()
    options = uvicorn_command.make_context("uvicorn", sys.argv[1:]).params
    has_host = options["uds"] is None and options["fd"] is None
    # With --reload there is one process; the default of --workers is WEB_CONCURRENCY.
    workers = (
        1 if options["reload"] else uvicorn.Config("main:app", workers=options["workers"], log_config=None).workers
    )
    return ServerOptions(options["host"] if has_host else _UNKNOWN_HOST, workers)


class Application(DrainingApp):
    """The gateway, which ends its streams as soon as a signal stops the server."""

    def __init__(self, app: FastAPI) -> None:
        """Take the application that `create_app` made."""
        super().__init__(app)
        self._gateway = app.state.gateway
        # The gateway logs requests itself, without the signatures in their URLs.
        access = logging.getLogger("uvicorn.access")
        access.handlers.clear()
        access.propagate = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, one WebSocket, or the server's start and end."""
        is_server = scope["type"] == "lifespan" and threading.current_thread() is threading.main_thread()
        with self._handling_signals() if is_server else nullcontext():
            await super().__call__(scope, receive, send)

    @contextmanager
    def _handling_signals(self) -> Generator[None, None, None]:
        """Handle the signals that stop the server, and pass them on to its own handlers."""
        loop = asyncio.get_running_loop()
        handlers = {number: signal.getsignal(number) for number in END_SIGNALS}

        def handle(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._stop)
            handler = handlers[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)

        for number in END_SIGNALS:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        self.start_draining()
        self._gateway.end_streams()
