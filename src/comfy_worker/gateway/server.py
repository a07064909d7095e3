"""The HTTP server, and its end: a signal ends it in good order, and at once for all who only wait."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import ChangeReload

from comfy_worker.gateway.memory import give_large_blocks_back

_ANSWERS_END_S = 5
"""How long a stop waits for answers that are being made or taken, such as files on a slow line."""


class Server(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 on SIGTERM and SIGINT."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        """Take the application, which has to have `state.let_go`, and where to listen."""
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_ANSWERS_END_S,
            )
        )
        self._let_go = app.state.let_go
        give_large_blocks_back()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """End on either signal; unlike uvicorn's own, it is not raised again afterwards to kill the process."""

        # No method of this object: sse-starlette would find the server by it and break its streams off, where they
        # end properly by themselves.
        def stop(_number: int, _frame: FrameType | None) -> None:
            self.should_exit = True

        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            signal.signal(number, stop)
        try:
            yield
        finally:
            # Whoever says it again while the process ends has been heard.
            for number in signals:
                signal.signal(number, signal.SIG_IGN)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, let those go that wait, and end when the others have their answers."""
        self._let_go()
        await super().shutdown(sockets)


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
