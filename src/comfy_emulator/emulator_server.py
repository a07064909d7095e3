"""An emulator in a thread of this process, for tests."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from comfy_emulator.emulator import DEFAULT_MAX_UPLOAD_BYTES, Emulator, EmulatorConfig
from comfy_emulator.faults import Faults
from comfy_emulator.json_types import JsonObject
from comfy_emulator.model_files import DEFAULT_MODELS, Models
from comfy_emulator.node_api import NodeRegistry
from comfy_emulator.nodes import REGISTRY
from comfy_emulator.server.http_server import HttpServer

_TIMEOUT_S = 30
"""How long a start, or a question to the event loop, may take."""

T = TypeVar("T")


class EmulatorServer:
    """An emulator with its own event loop in a thread.

    `kill` and `start` simulate a ComfyUI that dies and is started again: port, files and `faults` stay; queue, history
    and cache are lost.

    Attributes:
        faults: what goes wrong; its fields may be set at any time.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        base_directory: Path | None = None,
        registry: NodeRegistry = REGISTRY,
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
        """The port, which a restart keeps."""
        if self._port == 0:
            raise RuntimeError("The emulator has no port before its start.")
        return self._port

    @property
    def url(self) -> str:
        """The base URL without a trailing slash."""
        return f"http://{self._host}:{self.port}"

    @property
    def base_directory(self) -> Path:
        """The folder with `input/`, `output/` and `temp/`; `stop` removes it if it is temporary."""
        if self._base_directory is not None:
            return self._base_directory
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="comfyui-emulator-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)

    @property
    def running(self) -> bool:
        """Whether it accepts connections, faults aside."""
        return self._thread is not None and self._thread.is_serving()

    @property
    def clients(self) -> set[str]:
        """The ids of the clients with a WebSocket."""
        return self._thread.evaluate(lambda emulator: emulator.websockets.clients(), set()) if self._thread else set()

    @property
    def running_node(self) -> str | None:
        """The running node of a prompt with a `client_id`."""
        return self._thread.evaluate(lambda emulator: emulator.websockets.last_node_id, None) if self._thread else None

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        if self.running:
            raise RuntimeError("The emulator is already running.")
        self._join()
        config = self._make_config(base_directory=self.base_directory)
        self._thread = _ServerThread(config, self.faults, self._host, self._port)
        self._thread.start()
        try:
            self._port = self._thread.ready.result(timeout=_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """Drop all connections and refuse new ones, like a process that dies."""
        if self._thread is not None:
            self._thread.stop_soon()
        self._join()

    def restart(self) -> None:
        """Kill and start it."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Kill it, and remove a temporary folder."""
        self.kill()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def drop_websockets(self) -> None:
        """Drop all WebSockets now, without a close frame."""
        if self._thread is not None:
            self._thread.call_soon(lambda emulator: emulator.websockets.abort_all())

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class _ServerThread(threading.Thread):
    """The thread and event loop of an `EmulatorServer` from one start to the next stop."""

    def __init__(self, config: EmulatorConfig, faults: Faults, host: str, port: int) -> None:
        super().__init__(name="comfyui-emulator", daemon=True)
        self._config = config
        self._faults = faults
        self._host = host
        self._port = port
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_requested: asyncio.Event | None = None
        self._server: HttpServer | None = None
        self.ready: Future[int] = Future()
        """Gets the port when connections are accepted."""

    def is_serving(self) -> bool:
        """Return whether it accepts connections."""
        return self.is_alive() and self.ready.done() and self._loop is not None

    def run(self) -> None:
        asyncio.run(self._serve())

    def stop_soon(self) -> None:
        """Stop the server; call it from any thread."""
        self.call_soon(lambda _: self._die())

    def call_soon(self, action: Callable[[Emulator], None]) -> None:
        """Run a function in the event loop, if it still runs."""
        with self._lock:
            if self._loop is not None and self._server is not None:
                self._loop.call_soon_threadsafe(action, self._server.emulator)

    def evaluate(self, function: Callable[[Emulator], T], default: T) -> T:
        """Return the result of a function in the event loop, or `default` if it no longer runs."""
        result: Future[T] = Future()
        with self._lock:
            if self._loop is None or self._server is None:
                return default
            emulator = self._server.emulator
            self._loop.call_soon_threadsafe(lambda: result.set_result(function(emulator)))
        return result.result(timeout=_TIMEOUT_S)

    async def _serve(self) -> None:
        self._stop_requested = asyncio.Event()
        try:
            server = HttpServer(Emulator(self._config, self._faults, self._die), self._host, self._port)
            await server.start()
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits for the start
            self.ready.set_exception(error)
            return
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.ready.set_result(server.port)
        await self._stop_requested.wait()
        with self._lock:
            self._loop = None
        await server.stop()

    def _die(self) -> None:
        """Drop everything at once, then stop; call it in the event loop."""
        if self._server is not None and self._stop_requested is not None:
            self._server.abort()
            self._stop_requested.set()
