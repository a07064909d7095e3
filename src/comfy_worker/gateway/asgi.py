"""The gateway in a server that somebody else starts, such as `uvicorn main:app`."""

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

_EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing listens on it: it stands for an address that is not known


@dataclass(frozen=True)
class Listener:
    """How the server was started.

    Attributes:
        host: the address that it listens on; all of the machine's where that is not known.
        workers: how many processes of it there are.
    """

    host: str = _EVERYWHERE
    workers: int = 1


def listener() -> Listener:
    """Return how this process's server was started, as far as the command `uvicorn` tells it."""
    program = Path(sys.argv[0])
    if "uvicorn" not in (program.name, program.parent.name):
        return Listener()
    options = uvicorn_command.make_context("uvicorn", sys.argv[1:]).params
    is_hosts = options["uds"] is None and options["fd"] is None
    # A reloader has one process, whatever it is told; WEB_CONCURRENCY counts too.
    workers = (
        1 if options["reload"] else uvicorn.Config("main:app", workers=options["workers"], log_config=None).workers
    )
    return Listener(options["host"] if is_hosts else _EVERYWHERE, workers)


class Application(DrainingApp):
    """The gateway, which lets all go that wait for a job as soon as a signal tells its server to end."""

    def __init__(self, app: FastAPI) -> None:
        """Take the application, which has to have `state.let_go`."""
        super().__init__(app)
        self._let_go = app.state.let_go
        # The gateway's own log has a line for each request, without the signatures that are in URLs.
        access = logging.getLogger("uvicorn.access")
        access.handlers.clear()
        access.propagate = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, one WebSocket, or the server's start and end."""
        is_server = scope["type"] == "lifespan" and threading.current_thread() is threading.main_thread()
        with self._hearing_signals() if is_server else nullcontext():
            await super().__call__(scope, receive, send)

    @contextmanager
    def _hearing_signals(self) -> Generator[None, None, None]:
        """Hear the signals that the server hears, which goes on to end as it does."""
        loop = asyncio.get_running_loop()
        handlers = {number: signal.getsignal(number) for number in END_SIGNALS}

        def end(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._end)
            handler = handlers[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)

        for number in END_SIGNALS:
            signal.signal(number, end)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        self.begin_to_end()
        self._let_go()
