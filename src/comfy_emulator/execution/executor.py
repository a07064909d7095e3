"""Runs the nodes of a prompt and sends events to its client (`PromptExecutor` of ComfyUI's `execution.py`)."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from comfy_emulator.error_details import format_value, full_type_name, traceback_lines
from comfy_emulator.execution.caching import CacheEntry, OutputCache, cache_keys, fingerprints
from comfy_emulator.execution.context import ExecutionContext
from comfy_emulator.execution.graph import ExecutionList
from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.list_mapping import merge_outputs, merge_ui, slice_inputs
from comfy_emulator.execution.progress import ProgressRegistry
from comfy_emulator.execution.prompt_queue import PromptResult, QueueItem
from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.graph_utils import is_link
from comfy_emulator.json_types import JsonObject
from comfy_emulator.node_api import InterruptProcessingException, NodeResult
from comfy_emulator.node_definitions import NodeDefinitions
from comfy_emulator.websockets import WebSocketHub

logger = logging.getLogger(__name__)


class PromptExecutor:
    """Runs prompts one at a time, and reuses results of the previous prompt.

    Args:
        definitions: the nodes.
        folders: where they read and write files.
        websockets: the clients.
        interrupt: set to interrupt the running prompt.
    """

    def __init__(
        self, definitions: NodeDefinitions, folders: FolderPaths, websockets: WebSocketHub, interrupt: Interrupt
    ) -> None:
        self._definitions = definitions
        self._folders = folders
        self._websockets = websockets
        self._interrupt = interrupt
        self._cache = OutputCache()

    def free_memory(self) -> None:
        """Clear the cache."""
        self._cache.clear()

    def execute(self, item: QueueItem) -> PromptResult:
        """Run a prompt until it succeeds, fails or is interrupted."""
        run = _PromptRun(item, self._definitions, self._folders, self._websockets, self._interrupt, self._cache)
        self._websockets.client_id = item.extra_data.get("client_id")
        try:
            return run.execute()
        finally:
            self._websockets.last_node_id = None


@dataclass
class _PromptRun:
    """The state of one running prompt."""

    item: QueueItem
    definitions: NodeDefinitions
    folders: FolderPaths
    websockets: WebSocketHub
    interrupt: Interrupt
    cache: OutputCache
    status_messages: list[tuple[str, JsonObject]] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    ui_outputs: dict[str, JsonObject] = field(default_factory=dict)
    """`ui` of the nodes and its `meta`, by node id."""

    def __post_init__(self) -> None:
        self.prompt_id = self.item.prompt_id
        self.prompt = self.item.prompt
        self.client_id: str | None = self.item.extra_data.get("client_id")
        self.progress = ProgressRegistry(self.prompt_id)
        self.execution_list = ExecutionList(
            self.prompt, self._is_output, lambda node_id: self.cache.get(node_id) is not None
        )

    def execute(self) -> PromptResult:
        self._add_message("execution_start", {"prompt_id": self.prompt_id})
        fingerprint = fingerprints(self.prompt, self.definitions, self.folders)
        self.cache.set_prompt(cache_keys(self.prompt, self.definitions, fingerprint))
        cached = [node_id for node_id in self.prompt if self.cache.get(node_id) is not None]
        self._add_message("execution_cached", {"nodes": cached, "prompt_id": self.prompt_id})
        for output in self.item.outputs:
            self.execution_list.add_node(output)
        success = self._run_nodes()
        if success:
            self._add_message("execution_success", {"prompt_id": self.prompt_id})
        return PromptResult(
            success,
            self.status_messages,
            {node_id: ui["output"] for node_id, ui in self.ui_outputs.items()},
            {node_id: ui["meta"] for node_id, ui in self.ui_outputs.items()},
        )

    def _run_nodes(self) -> bool:
        while (node_id := self.execution_list.pick_node()) is not None:
            cached = self.cache.get(node_id)
            if cached is not None:
                self._send_cached_ui(node_id, cached)
            elif not self._run_node(node_id):
                return False
            else:
                self.executed.append(node_id)
            self.progress.finish(node_id)
            self._send_progress()
            self.execution_list.complete_node(node_id)
        return True

    def _send_cached_ui(self, node_id: str, cached: CacheEntry) -> None:
        """Send a cached `ui` again; without a client, ComfyUI 0.8 does not add it to the history either."""
        if self.client_id is None:
            return
        self._send_executed(node_id, cached.ui["output"] if cached.ui else None)
        if cached.ui is not None:
            self.ui_outputs[node_id] = cached.ui

    def _run_node(self, node_id: str) -> bool:
        """Run a node; return False if it failed or was interrupted, after the client was notified."""
        self.progress.start(node_id)
        self._send_progress()
        inputs = self._input_data(node_id)
        if self.client_id is not None:
            self.websockets.last_node_id = node_id
            data = {"node": node_id, "display_node": node_id, "prompt_id": self.prompt_id}
            self.websockets.send("executing", data, self.client_id)
        try:
            self._store(node_id, self._call(node_id, inputs))
        except InterruptProcessingException:
            self._add_message("execution_interrupted", self._failure(node_id), broadcast=True)
            return False
        except Exception as error:  # noqa: BLE001 - a node's code may raise anything
            logger.warning("Node %s failed: %s", node_id, error)
            self._add_message("execution_error", self._error(node_id, inputs, error))
            return False
        return True

    def _input_data(self, node_id: str) -> dict[str, list[Any]]:
        """Return each input as a list; the node is called once per item (`get_input_data`)."""
        node = self.prompt[node_id]
        defined = self.definitions.inputs(node["class_type"])
        return {
            name: self._output(value) if is_link(value) else [value]
            for name, value in node["inputs"].items()
            if name in defined
        }

    def _output(self, link: list[Any]) -> list[Any]:
        source = self.cache.get(link[0])
        if source is None:
            raise RuntimeError(f"Node {link[0]} has no result yet.")
        return source.outputs[int(link[1])]

    def _call(self, node_id: str, inputs: dict[str, list[Any]]) -> list[NodeResult]:
        function = self.definitions.node(self.prompt[node_id]["class_type"]).function
        context = ExecutionContext(
            prompt=self.prompt,
            extra_pnginfo=self.item.extra_data.get("extra_pnginfo"),
            node_id=node_id,
            prompt_id=self.prompt_id,
            client_id=self.client_id,
            folders=self.folders,
            registry=self.progress,
            websockets=self.websockets,
            interrupt=self.interrupt,
        )
        results = []
        for arguments in slice_inputs(inputs):
            self.interrupt.check()
            results.append(function(context, **arguments))
        return results

    def _store(self, node_id: str, results: list[NodeResult]) -> None:
        """Send the `ui` of a node that has run, and cache its result."""
        ui = merge_ui(results)
        if ui:
            meta = {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
            self.ui_outputs[node_id] = {"meta": meta, "output": ui}
            if self.client_id is not None:
                self._send_executed(node_id, ui)
        outputs = merge_outputs(results, self.definitions.output_is_list(self.prompt[node_id]["class_type"]))
        self.cache.set(node_id, CacheEntry(outputs, self.ui_outputs.get(node_id)))

    def _failure(self, node_id: str) -> JsonObject:
        return {
            "prompt_id": self.prompt_id,
            "node_id": node_id,
            "node_type": self.prompt[node_id]["class_type"],
            "executed": list(self.executed),
        }

    def _error(self, node_id: str, inputs: dict[str, list[Any]], error: Exception) -> JsonObject:
        """Return the data of `execution_error` (`handle_execution_error`)."""
        return {
            **self._failure(node_id),
            "exception_message": f"{error}\n",
            "exception_type": full_type_name(type(error)),
            "traceback": traceback_lines(error.__traceback__),
            "current_inputs": {
                name: [format_value(value) for value in values]
                for name, values in {**inputs, **self._hidden_inputs(node_id)}.items()
            },
            "current_outputs": list(self.prompt),
        }

    def _hidden_inputs(self, node_id: str) -> dict[str, list[Any]]:
        """Return the hidden inputs of a node in the old style; V3 nodes name theirs in lists and get none."""
        values = {
            "PROMPT": self.prompt,
            "EXTRA_PNGINFO": self.item.extra_data.get("extra_pnginfo"),
            "UNIQUE_ID": node_id,
        }
        hidden = self.definitions.hidden_inputs(self.prompt[node_id]["class_type"])
        return {name: [values[kind]] for name, kind in hidden.items() if isinstance(kind, str) and kind in values}

    def _is_output(self, node_id: str) -> bool:
        return self.definitions.is_output_node(self.prompt[node_id]["class_type"])

    def _add_message(self, name: str, data: JsonObject, *, broadcast: bool = False) -> None:
        """Add an event to the history and send it; a broadcast without a client goes to all (`add_message`)."""
        data = {**data, "timestamp": int(time.time() * 1000)}
        self.status_messages.append((name, data))
        if self.client_id is not None or broadcast:
            self.websockets.send(name, data, self.client_id)

    def _send_executed(self, node_id: str, output: JsonObject | None) -> None:
        data = {"node": node_id, "display_node": node_id, "output": output, "prompt_id": self.prompt_id}
        self.websockets.send("executed", data, self.client_id)

    def _send_progress(self) -> None:
        self.websockets.send("progress_state", self.progress.message(), self.client_id)
