"""A load balancer of TCP connections: each goes to the next server, or to the one after it if that one refuses it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from tests.support.network.event_loops import all_tasks_ended, stop_listening
from tests.support.waiting import TIMEOUT_S

_CHUNK = 65536


class LoadBalancer:
    """Passes connections on to servers of this machine; what is said on one it neither reads nor sends twice.

    Attributes:
        url: where it listens.
        refused: how many connections a server refused, so that another got them.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        ports = [urlsplit(url).port or 80 for url in urls]
        self._turns = itertools.cycle([ports[first:] + ports[:first] for first in range(len(ports))])
        self._open: set[asyncio.Task[None]] = set()
        self.url = ""
        self.refused = 0

    async def serve(self, listens: Future[asyncio.Event]) -> None:
        """Serve until the event is set that `listens` gets."""
        end = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        listens.set_result(end)
        await end.wait()
        await stop_listening(server)
        await all_tasks_ended(lambda: [task.cancel() for task in self._open])

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await self._pass_on(reader, writer)
        finally:
            writer.close()
            self._open.discard(task)

    async def _pass_on(self, reader: StreamReader, writer: StreamWriter) -> None:
        server_reader, server_writer = await self._connect()
        ways = [
            asyncio.ensure_future(_pump(reader, server_writer)),
            asyncio.ensure_future(_pump(server_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            server_writer.close()

    async def _connect(self) -> tuple[StreamReader, StreamWriter]:
        for port in next(self._turns):
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                self.refused += 1
        raise ConnectionRefusedError("no server takes connections")


async def _pump(reader: StreamReader, writer: StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK):
        writer.write(chunk)
        await writer.drain()


@contextmanager
def load_balancer(urls: Sequence[str]) -> Iterator[LoadBalancer]:
    """Balance between servers until the end of the block."""
    running, listens, loop = LoadBalancer(urls), Future[asyncio.Event](), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(running.serve(listens)), name="balancer")
    thread.start()
    end = listens.result(TIMEOUT_S)
    try:
        yield running
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(TIMEOUT_S)
        loop.close()
