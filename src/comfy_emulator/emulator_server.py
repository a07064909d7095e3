"""Runs an emulator: in this process beside a test, or as the whole of a process."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from aiohttp import web

from comfy_emulator.emulator import DEFAULT_MAX_UPLOAD_BYTES, Emulator, EmulatorConfig
from comfy_emulator.faults import Faults
from comfy_emulator.model_files import DEFAULT_MODELS, Models
from comfy_emulator.node_api import Registry
from comfy_emulator.node_definitions import JsonObject
from comfy_emulator.server.app import create_app

_PATIENCE_S = 0.3
"""How long a stop waits for the running node, and for handlers that are still at work."""
_START_TIMEOUT_S = 30


Answer = TypeVar("Answer")


class Service:
    """An emulator that listens on a port, within a running event loop."""

    def __init__(self, emulator: Emulator, host: str, port: int) -> None:
        self.emulator = emulator
        self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port: int = self._listener.getsockname()[1]
        self._runner = web.AppRunner(create_app(emulator), access_log=None, shutdown_timeout=_PATIENCE_S)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to answer."""
        await self._runner.setup()
        self.emulator.start()
        factory = self._runner.server
        if factory is None:
            raise RuntimeError("The web application was not set up.")
        self._server = await asyncio.get_running_loop().create_server(factory, sock=self._listener)

    def cut(self) -> None:
        """Refuse new connections, and drop the open ones without a word, as a process that dies does."""
        if self._listener.fileno() >= 0:
            # Not by closing the server: asyncio leaves a connection open then that it has just accepted.
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        self.emulator.halt()
        for connection in self._runner.server.connections if self._runner.server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()

    async def stop(self) -> None:
        """Cut everything, then wait briefly for what is still at work."""
        self.cut()
        await self.emulator.stop(_PATIENCE_S)
        await self._runner.cleanup()


class EmulatorServer:
    """An emulator in a thread of this process, for tests.

    `kill` and `start` on the same object simulate a ComfyUI that dies and comes back: the port and the files stay,
    queue, history and cache are lost. `faults` stay as they are set.

    Attributes:
        faults: what is to go wrong; set its fields at any time.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        base_directory: Path | None = None,
        registry: Registry | None = None,
        object_info: Mapping[str, JsonObject] | None = None,
        models: Models = DEFAULT_MODELS,
        max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES,
        allow_faults: bool = False,
    ) -> None:
        self.faults = Faults()
        self._host = host
        self._port = port
        self._base_directory = base_directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._make_config = partial(
            EmulatorConfig,
            registry=registry,
            object_info=object_info,
            models=models,
            max_upload_bytes=max_upload_bytes,
            allow_faults=allow_faults,
        )
        self._thread: _ServerThread | None = None

    def __enter__(self) -> EmulatorServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port; the same after a restart."""
        if self._port == 0:
            raise RuntimeError("The emulator has no port before it was started.")
        return self._port

    @property
    def url(self) -> str:
        """The address to reach it at, without a closing slash."""
        return f"http://{self._host}:{self.port}"

    @property
    def base_directory(self) -> Path:
        """The folder that holds `input/`, `output/` and `temp/`; a temporary one is gone after `stop`."""
        if self._base_directory is not None:
            return self._base_directory
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="comfyui-emulator-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)

    @property
    def running(self) -> bool:
        """Whether it answers, faults aside."""
        return self._thread is not None and self._thread.is_serving()

    @property
    def clients(self) -> set[str]:
        """The client ids whose websocket ComfyUI knows to be open."""
        return self._thread.ask(lambda emulator: emulator.events.clients(), set()) if self._thread else set()

    @property
    def running_node(self) -> str | None:
        """The node that runs now, for a prompt with a `client_id`."""
        return self._thread.ask(lambda emulator: emulator.events.running_node, None) if self._thread else None

    def start(self) -> None:
        """Begin to answer; returns when it does."""
        if self.running:
            raise RuntimeError("The emulator runs already.")
        self._join()
        config = self._make_config(base_directory=self.base_directory)
        self._thread = _ServerThread(config, self.faults, self._host, self._port)
        self._thread.start()
        try:
            self._port = self._thread.ready.result(timeout=_START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """Drop all connections at once and refuse new ones, as a process that dies; may be started again."""
        if self._thread is not None:
            self._thread.request_stop()
        self._join()

    def restart(self) -> None:
        """Die and come back on the same port: queue, history and cache are lost, files are not."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End, and remove the folder if it was a temporary one."""
        self.kill()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def drop_websockets(self) -> None:
        """Cut all open websockets now, without a close frame."""
        if self._thread is not None:
            self._thread.call(lambda emulator: emulator.events.cut_all())

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class _ServerThread(threading.Thread):
    """The thread with the event loop of an `EmulatorServer`, from one start to the next stop."""

    def __init__(self, config: EmulatorConfig, faults: Faults, host: str, port: int) -> None:
        super().__init__(name="comfyui-emulator", daemon=True)
        self._config = config
        self._faults = faults
        self._host = host
        self._first_port = port
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_requested: asyncio.Event | None = None
        self._service: Service | None = None
        self.ready: Future[int] = Future()
        """The port, once it answers."""

    def is_serving(self) -> bool:
        """Tell whether it answers."""
        return self.is_alive() and self.ready.done() and self._loop is not None

    def run(self) -> None:
        asyncio.run(self._serve())

    def request_stop(self) -> None:
        """Let it end; from any thread."""
        self.call(lambda _: self._die())

    def call(self, action: Callable[[Emulator], None]) -> None:
        """Do something in the event loop, if there still is one."""
        with self._lock:
            if self._loop is not None and self._service is not None:
                self._loop.call_soon_threadsafe(action, self._service.emulator)

    def ask(self, question: Callable[[Emulator], Answer], otherwise: Answer) -> Answer:
        """Look something up in the event loop, if there still is one."""
        answer: Future[Answer] = Future()
        with self._lock:
            if self._loop is None or self._service is None:
                return otherwise
            emulator = self._service.emulator
            self._loop.call_soon_threadsafe(lambda: answer.set_result(question(emulator)))
        return answer.result(timeout=_START_TIMEOUT_S)

    async def _serve(self) -> None:
        self._stop_requested = asyncio.Event()
        try:
            service = Service(Emulator(self._config, self._faults, self._die), self._host, self._first_port)
            await service.start()
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that waits for the start
            self.ready.set_exception(error)
            return
        self._service = service
        self._loop = asyncio.get_running_loop()
        self.ready.set_result(service.port)
        await self._stop_requested.wait()
        with self._lock:
            self._loop = None
        await service.stop()

    def _die(self) -> None:
        """Cut everything at once; the rest of the stop follows. Called in the event loop."""
        if self._service is not None and self._stop_requested is not None:
            self._service.cut()
            self._stop_requested.set()
