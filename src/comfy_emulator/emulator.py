"""One emulated ComfyUI without its HTTP server: folders, nodes, queue, executor and WebSockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from comfy_emulator.execution.executor import PromptExecutor
from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.prompt_queue import PromptQueue
from comfy_emulator.execution.prompt_worker import PromptWorker
from comfy_emulator.faults import Faults
from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.json_types import JsonObject
from comfy_emulator.model_files import DEFAULT_MODELS, ModelFiles, Models
from comfy_emulator.node_api import NodeRegistry
from comfy_emulator.node_definitions import NodeDefinitions, load_object_info
from comfy_emulator.nodes import REGISTRY
from comfy_emulator.websockets import WebSocketHub

logger = logging.getLogger(__name__)

DEFAULT_MAX_UPLOAD_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class EmulatorConfig:
    """The settings of an emulator.

    Attributes:
        base_directory: the folder with `input/`, `output/`, `temp/` and `models/`.
        registry: what the nodes do.
        object_info: the definitions of the nodes, as in `/object_info`; None for those in this package.
        models: the model files that it pretends to have, by folder.
        max_upload_bytes: maximum size of a request body; a larger one gets status 413.
        allow_faults: whether faults can be set over HTTP.
        argv: the command line that `/system_stats` shows.
    """

    base_directory: Path
    registry: NodeRegistry = field(default_factory=lambda: REGISTRY)
    object_info: Mapping[str, JsonObject] | None = None
    models: Models = field(default_factory=lambda: DEFAULT_MODELS)
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES
    allow_faults: bool = False
    argv: tuple[str, ...] = ("main.py", "--cpu", "--listen", "127.0.0.1")


class Emulator:
    """The state of one run; a restarted emulator is a new object on the same folders.

    Args:
        config: the settings.
        faults: what goes wrong.
        die: ends the emulator at once.
    """

    def __init__(self, config: EmulatorConfig, faults: Faults, die: Callable[[], None]) -> None:
        self.config = config
        self.faults = faults
        self.die = die
        self.folders = FolderPaths(config.base_directory.resolve())
        self.models = ModelFiles(config.models, self.folders.models)
        object_info = load_object_info() if config.object_info is None else config.object_info
        self.definitions = NodeDefinitions(config.registry, object_info, self.models, self.folders)
        self.interrupt = Interrupt()
        self.websockets = WebSocketHub(faults, self.feature_flags(), self.queue_info, die)
        self.queue = PromptQueue(faults, self.websockets.send_status, self.interrupt.reset)
        self.next_number = 0
        """The queue number of the next prompt without its own."""
        self.closing = asyncio.Event()
        executor = PromptExecutor(self.definitions, self.folders, self.websockets, self.interrupt)
        self._worker = PromptWorker(self.queue, executor, self.websockets)

    def feature_flags(self) -> JsonObject:
        """Return the server's feature flags (`comfy_api/feature_flags.py`)."""
        return {
            "supports_preview_metadata": True,
            "max_upload_size": self.config.max_upload_bytes,
            "extension": {"manager": {"supports_v4": True}},
        }

    def queue_info(self) -> JsonObject:
        """Return the data of `GET /prompt` and of `status` events (`get_queue_info`)."""
        return {"exec_info": {"queue_remaining": self.queue.get_tasks_remaining()}}

    def start(self) -> None:
        """Start running prompts; call it in the event loop."""
        self.folders.create()
        self.websockets.start()
        self._worker.start()

    def close(self) -> None:
        """Stop accepting and running prompts, and release requests that hang; call it in the event loop."""
        self.closing.set()
        self.queue.close()
        self.interrupt.shut_down()

    async def wait_closed(self, timeout_s: float) -> None:
        """Stop sending events, and wait for the running node."""
        await self.websockets.stop()
        await asyncio.to_thread(self._worker.join, timeout_s)
        if self._worker.is_alive():
            logger.warning("The running node did not stop within %s s; its thread is abandoned.", timeout_s)

    async def sleep(self, seconds: float) -> None:
        """Sleep, but at most until the emulator closes."""
        try:
            await asyncio.wait_for(self.closing.wait(), seconds)
        except asyncio.TimeoutError:
            return
