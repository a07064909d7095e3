"""The network between processes: TCP connections that can be cut, held up, or robbed of their answers."""

from __future__ import annotations

import asyncio
import socket
import threading
from asyncio import StreamReader, StreamWriter
from enum import Enum
from types import TracebackType

from tests.support.network.event_loops import all_tasks_ended, stop_listening
from tests.support.waiting import TIMEOUT_S

_CHUNK = 65536


class LinkState(Enum):
    """What becomes of what is sent over a link."""

    FAIR = "fair"
    """It arrives."""
    SILENT = "silent"
    """It arrives when this is over, as TCP sends again what got lost; connections open, and nobody answers on them."""
    ANSWERLESS = "answerless"
    """What is asked arrives, the answers never do; when this is over, all connections are cut."""
    CUT = "cut"
    """Connections are cut, new ones are refused."""


class Link:
    """One process's way to one port of this machine.

    Attributes:
        port: where the process finds the other; it stays the same.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int) -> None:
        """Take the loop that runs the link, and the port to lead to."""
        self._loop = loop
        self._target = target
        self._weather = LinkState.FAIR
        self._may_pass = asyncio.Event()
        self._may_pass.set()
        self._server: asyncio.Server | None = None
        self._open: set[StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # Bound and never listened on: the port is ours while connections to it are refused.
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._kept.bind(("127.0.0.1", 0))
        self.port: int = self._kept.getsockname()[1]

    def turn(self, weather: LinkState) -> None:
        """Let something else become of what is sent; return when it does."""
        asyncio.run_coroutine_threadsafe(self._turn(weather), self._loop).result(TIMEOUT_S)

    async def _turn(self, weather: LinkState) -> None:
        was, self._weather = self._weather, weather
        if weather is LinkState.SILENT:
            self._may_pass.clear()
        else:
            self._may_pass.set()
        if weather is LinkState.CUT:
            await self._refuse()
        elif self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_port=True)
        if LinkState.CUT in (weather, was) or was is LinkState.ANSWERLESS:
            self._cut()

    async def _refuse(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await stop_listening(server)

    def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def close(self) -> None:
        """Refuse everything, for good; what is open ends with `end`."""
        await self._turn(LinkState.CUT)
        self._kept.close()

    def end(self) -> None:
        """End all connections that have begun."""
        for task in list(self._tasks):
            task.cancel()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        try:
            await self._may_pass.wait()
            if self._weather is LinkState.CUT:
                return
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._open.add(other_writer)
            try:
                await self._pass_on(reader, writer, other_reader, other_writer)
            finally:
                other_writer.transport.abort()
                self._open.discard(other_writer)
        except (OSError, asyncio.CancelledError):
            return  # who asked finds the connection cut
        finally:
            writer.transport.abort()
            self._open.discard(writer)
            self._tasks.discard(task)

    async def _pass_on(
        self, reader: StreamReader, writer: StreamWriter, other_reader: StreamReader, other_writer: StreamWriter
    ) -> None:
        ways = [
            asyncio.create_task(self._pump(reader, other_writer, are_answers=False)),
            asyncio.create_task(self._pump(other_reader, writer, are_answers=True)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(self, reader: StreamReader, writer: StreamWriter, *, are_answers: bool) -> None:
        while chunk := await reader.read(_CHUNK):
            await self._may_pass.wait()
            if not (are_answers and self._weather is LinkState.ANSWERLESS):
                writer.write(chunk)
                await writer.drain()
        # The end of a connection is held up like all that is said on it.
        await self._may_pass.wait()


class Network:
    """Carries links in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._links: list[Link] = []

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    def link(self, target: int) -> Link:
        """Return a new way to a port of this machine."""
        link = Link(self._loop, target)
        link.turn(LinkState.FAIR)
        self._links.append(link)
        return link

    async def _close(self) -> None:
        for link in self._links:
            await link.close()

        def cut() -> None:
            for link in self._links:
                link.end()

        await all_tasks_ended(cut)
