"""A small TCP proxy in front of a ComfyUI: websockets can be cut, silenced or refused while HTTP goes on."""

from __future__ import annotations

import asyncio
import threading
from asyncio import StreamReader, StreamWriter
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum

from tests.support.network.event_loops import all_tasks_ended, stop_listening
from tests.support.waiting import TIMEOUT_S

_CHUNK = 65536
_END_OF_HEAD = b"\r\n\r\n"
_LOOK_S = 0.005


class Websockets(Enum):
    """What becomes of websockets."""

    PASSED = "passed"
    SILENCED = "silenced"
    """They open and stay open, and nothing that ComfyUI says arrives."""
    REFUSED = "refused"
    """New ones are cut before they are open; open ones are left alone."""


class Proxy:
    """Passes connections on to a port of this machine, from `start` to `stop`, as often as wanted.

    Attributes:
        websockets: what becomes of them from now on.
        port: where it listens; the same after a stop.
        refused: how many websockets were refused.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self.websockets = Websockets.PASSED
        self.port = 0
        self.refused = 0
        self._target = (target_host, target_port)
        self._may_pass = threading.Event()
        self._may_pass.set()
        self._open: set[StreamWriter] = set()
        self._open_websockets: set[StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address to reach it at, without a closing slash."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to listen."""
        listens: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(listens)), daemon=True)
        self._thread.start()
        self.port = listens.result(TIMEOUT_S)

    def stop(self) -> None:
        """Refuse new connections and cut all open ones, as a machine does on which a process was killed."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(TIMEOUT_S)
            self._loop = self._thread = None

    def cut_websockets(self) -> None:
        """Cut the open websockets without a word."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: _abort(self._open_websockets))

    def hold_websockets(self) -> None:
        """Keep what ComfyUI says on websockets back, as a slow connection does."""
        self._may_pass.clear()

    def release_websockets(self) -> None:
        """Let all of that through."""
        self._may_pass.set()

    def say(self, text: str) -> None:
        """Put a short text between what ComfyUI says on the open websockets."""
        frame = bytes([0x81, len(text)]) + text.encode("ascii")
        if self._loop is not None:
            for writer in list(self._open_websockets):
                self._loop.call_soon_threadsafe(writer.write, frame)

    async def _run(self, listens: Future[int]) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        listens.set_result(server.sockets[0].getsockname()[1])
        await self._stopping.wait()
        await stop_listening(server)
        await all_tasks_ended(lambda: [task.cancel() for task in self._tasks])

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._open.add(writer)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._pass_on(reader, writer)
        finally:
            _abort({writer})
            self._open.discard(writer)
            self._open_websockets.discard(writer)

    async def _pass_on(self, reader: StreamReader, writer: StreamWriter) -> None:
        head = await reader.readuntil(_END_OF_HEAD)
        is_websocket = head.startswith(b"GET /ws")
        if is_websocket and self.websockets is Websockets.REFUSED:
            self.refused += 1
            return
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        try:
            upstream_writer.write(head)
            if is_websocket:
                self._open_websockets.add(writer)
                writer.write(await upstream_reader.readuntil(_END_OF_HEAD))
            ways = [
                asyncio.create_task(self._pump(reader, upstream_writer, is_events=False)),
                asyncio.create_task(self._pump(upstream_reader, writer, is_events=is_websocket)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            _abort({upstream_writer})

    async def _pump(self, reader: StreamReader, writer: StreamWriter, *, is_events: bool) -> None:
        while chunk := await reader.read(_CHUNK):
            while is_events and not self._may_pass.is_set():
                await asyncio.sleep(_LOOK_S)
            if not (is_events and self.websockets is Websockets.SILENCED):
                writer.write(chunk)
                await writer.drain()


def _abort(writers: set[StreamWriter]) -> None:
    for writer in list(writers):
        writer.transport.abort()
