"""One emulated ComfyUI: its folders, nodes, queue and websockets, put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from comfy_emulator.execution.executor import PromptExecutor, PromptWorker
from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.prompt_queue import PromptQueue
from comfy_emulator.faults import Faults
from comfy_emulator.folder_paths import Folders
from comfy_emulator.model_files import DEFAULT_MODELS, Models
from comfy_emulator.node_api import Registry
from comfy_emulator.node_definitions import JsonObject, NodeInterfaces, load_object_info
from comfy_emulator.websockets import EventHub

logger = logging.getLogger(__name__)

DEFAULT_MAX_UPLOAD_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class EmulatorConfig:
    """What an emulator is made of.

    Attributes:
        base_directory: the folder that holds `input/`, `output/` and `temp/`.
        registry: what the nodes do; None for all nodes of the package.
        object_info: what the nodes look like, in the form of `/object_info`; None for the data of the package.
        models: model files that it claims to have, by folder.
        max_upload_bytes: the longest request body; a longer one is answered 413.
        allow_faults: whether faults can be set over HTTP.
        argv: start arguments that `/system_stats` shows.
    """

    base_directory: Path
    registry: Registry | None = None
    object_info: Mapping[str, JsonObject] | None = None
    models: Models = field(default_factory=lambda: DEFAULT_MODELS)
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES
    allow_faults: bool = False
    argv: tuple[str, ...] = ("main.py", "--cpu", "--listen", "127.0.0.1")


class Emulator:
    """The state of one run: a restarted emulator is a new one on the same folders.

    Args:
        config: what it is made of.
        faults: what goes wrong.
        die: ends it at once.
    """

    def __init__(self, config: EmulatorConfig, faults: Faults, die: Callable[[], None]) -> None:
        self.config = config
        self.faults = faults
        self.die = die
        self.folders = Folders(config.base_directory.resolve())
        self.interfaces = NodeInterfaces(
            config.registry if config.registry is not None else _all_nodes(),
            config.object_info if config.object_info is not None else load_object_info(),
            config.models,
            self.folders,
        )
        self.interrupt = Interrupt()
        self.events = EventHub(faults, self.features(), self.queue_info, die)
        self.queue = PromptQueue(faults, self.events.send_status, self.interrupt.reset)
        self.submissions = 0
        self.closing = asyncio.Event()
        self._worker = PromptWorker(
            self.queue, PromptExecutor(self.interfaces, self.folders, self.events, self.interrupt), self.events
        )

    def features(self) -> JsonObject:
        """Give what `/features` and the websocket say that the server can do."""
        return {
            "supports_preview_metadata": True,
            "max_upload_size": self.config.max_upload_bytes,
            "extension": {"manager": {"supports_v4": True}},
        }

    def queue_info(self) -> JsonObject:
        """Give what `GET /prompt` and `status` say."""
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def start(self) -> None:
        """Begin to work; call in the event loop."""
        self.folders.prepare()
        self.events.start()
        self._worker.start()

    def halt(self) -> None:
        """Stop taking and running prompts, and let go whoever waits for an answer; call in the event loop."""
        self.closing.set()
        self.queue.close()
        self.interrupt.shut_down()

    async def stop(self, patience_s: float) -> None:
        """Send nothing more, and give the running node `patience_s` to notice that it is to stop."""
        await self.events.stop()
        await asyncio.to_thread(self._worker.join, patience_s)
        if self._worker.is_alive():
            logger.warning("The running node did not stop within %s s and is left behind.", patience_s)

    async def pause(self, seconds: float | None) -> None:
        """Wait for `seconds`, or for ever; in either case no longer than the emulator runs."""
        try:
            await asyncio.wait_for(self.closing.wait(), seconds)
        except asyncio.TimeoutError:
            return


def _all_nodes() -> Registry:
    """Load the nodes of the package only where they are wanted: they bring NumPy, Pillow and PyAV."""
    from comfy_emulator.nodes import REGISTRY

    return REGISTRY


EMULATOR: web.AppKey[Emulator] = web.AppKey("emulator", Emulator)


def emulator_of(request: web.Request) -> Emulator:
    """Give the emulator that a request is for."""
    return request.app[EMULATOR]


def cut(request: web.Request) -> web.Response:
    """Drop the connection of a request; the answer given is never sent."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
