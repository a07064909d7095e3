"""A web server with files for the worker to fetch: a well-behaved one, and one that answers as configured."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from tests.support.network.event_loops import stop_listening
from tests.support.waiting import TIMEOUT_S

_CHUNK = 16 * 1024


@dataclass(frozen=True)
class ServedFile:
    """What stands at a path.

    Attributes:
        content: the body.
        headers: besides those that every answer has.
        status: of the answer.
        has_etag: whether it can be asked for on the condition that it changed.
        bytes_per_s: how fast a connection gets it; 0 for at once.
        failures: how many requests are answered 503 before.
    """

    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    has_etag: bool = True
    bytes_per_s: float = 0
    failures: int = 0


@dataclass(frozen=True)
class RawAnswer:
    """Bytes that are sent as they are.

    Attributes:
        head: everything once.
        repeated: what is sent again and again after it; nothing if empty.
        pause_s: between two of these.
        closes: whether the connection is closed at the end, or left open in silence.
    """

    head: bytes
    repeated: bytes = b""
    pause_s: float = 0.0
    closes: bool = True


class FileServer:
    """A server in a thread of its own.

    Attributes:
        requests: how often each path was asked for.
        bodies: how often each path's content was sent.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self._certificate = certificate
        self.requests: Counter[str] = Counter()
        self.bodies: Counter[str] = Counter()
        self.headers: dict[str, Mapping[str, str]] = {}
        self.at_work = threading.Semaphore(0)
        self._answers: dict[str, ServedFile | RawAnswer] = {}
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.port = 0

    def __enter__(self) -> FileServer:
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    @property
    def url(self) -> str:
        """Without a closing slash."""
        return f"http://127.0.0.1:{self.port}"

    def put(self, path: str, answer: ServedFile | RawAnswer | bytes) -> str:
        """Let something stand at a path; return its URL."""
        self._answers[path] = ServedFile(answer) if isinstance(answer, bytes) else answer
        return f"{self.url}{path}"

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        context = None
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate)
        assert runner.server is not None
        server = await asyncio.get_running_loop().create_server(runner.server, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._ended.wait()
        await stop_listening(server)
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.requests[path] += 1
        self.headers[path] = dict(request.headers)
        self.at_work.release()
        answer = self._answers.get(path)
        if answer is None:
            return web.Response(status=404)
        if isinstance(answer, RawAnswer):
            return await self._send_raw(request, answer)
        return await self._send_file(request, path, answer)

    async def _send_file(self, request: web.Request, path: str, file: ServedFile) -> web.StreamResponse:
        if self.requests[path] <= file.failures:
            return web.Response(status=503)
        etag = f'"{hashlib.sha256(file.content).hexdigest()}"'
        headers = {**({"ETag": etag} if file.has_etag else {}), **file.headers}
        if file.has_etag and request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers=headers)
        if request.headers.get("If-Modified-Since") == file.headers.get("Last-Modified", "never"):
            return web.Response(status=304, headers=headers)
        self.bodies[path] += 1
        response = web.StreamResponse(status=file.status, headers=headers)
        response.content_length = len(file.content)
        await response.prepare(request)
        began = self._loop.time()
        for start in range(0, len(file.content), _CHUNK):
            if file.bytes_per_s:
                await asyncio.sleep(began + start / file.bytes_per_s - self._loop.time())
            await response.write(file.content[start : start + _CHUNK])
        await response.write_eof()
        return response

    async def _send_raw(self, request: web.Request, answer: RawAnswer) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.write(answer.head)
        while answer.repeated and not transport.is_closing():
            transport.write(answer.repeated)
            # A transport that is full is not written to for ever.
            while not transport.is_closing() and transport.get_write_buffer_size() > _CHUNK:
                await asyncio.sleep(0.001)
            await asyncio.sleep(answer.pause_s)
        if answer.closes:
            transport.close()
        while not transport.is_closing():
            await asyncio.sleep(0.01)
        return web.Response()


@contextmanager
def file_server(certificate: Path | None = None) -> Iterator[FileServer]:
    """Run a server until the end of the block; with a certificate (and its key, in PEM) it speaks TLS."""
    with FileServer(certificate) as server:
        yield server
