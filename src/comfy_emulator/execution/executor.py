"""Runs prompts, one at a time in a thread, and tells the client how it goes (`PromptExecutor` of 0.8.0)."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from comfy_emulator.error_details import format_value, full_type_name, traceback_lines
from comfy_emulator.execution.caching import CachedResult, OutputCache, cache_keys, fingerprints
from comfy_emulator.execution.context import NodeContext
from comfy_emulator.execution.graph import ExecutionList
from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.list_mapping import merge_outputs, merge_ui, slices
from comfy_emulator.execution.progress import ProgressState
from comfy_emulator.execution.prompt_queue import Outcome, PromptQueue, QueueItem
from comfy_emulator.folder_paths import Folders
from comfy_emulator.graph_utils import is_link
from comfy_emulator.node_api import Interrupted, NodeResult
from comfy_emulator.node_definitions import JsonObject, NodeInterfaces
from comfy_emulator.websockets import EventHub

logger = logging.getLogger(__name__)


class PromptWorker(threading.Thread):
    """The thread that takes prompts from the queue until the queue is closed."""

    def __init__(self, queue: PromptQueue, executor: PromptExecutor, events: EventHub) -> None:
        super().__init__(name="prompt-worker", daemon=True)
        self._queue = queue
        self._executor = executor
        self._events = events

    def run(self) -> None:
        """Run prompts. The history is written after the last event of a prompt but `executing` with no node."""
        while (item := self._queue.take(self._executor.free_memory)) is not None:
            outcome = self._executor.execute(item)
            self._queue.finish(item, outcome)
            client_id = self._events.running_client
            if client_id is not None:
                self._events.send("executing", {"node": None, "prompt_id": item.prompt_id}, client_id)


class PromptExecutor:
    """Runs a prompt's nodes, using results of the prompt before."""

    def __init__(self, interfaces: NodeInterfaces, folders: Folders, events: EventHub, interrupt: Interrupt) -> None:
        self._interfaces = interfaces
        self._folders = folders
        self._events = events
        self._interrupt = interrupt
        self._cache = OutputCache()

    def free_memory(self) -> None:
        """Forget all results."""
        self._cache.clear()

    def execute(self, item: QueueItem) -> Outcome:
        """Run a prompt to its end, good or bad."""
        run = _Run(item, self._interfaces, self._folders, self._events, self._interrupt, self._cache)
        self._events.running_client = item.extra_data.get("client_id")
        try:
            return run.execute()
        finally:
            self._events.running_node = None


@dataclass
class _Run:
    """One prompt on its way."""

    item: QueueItem
    interfaces: NodeInterfaces
    folders: Folders
    events: EventHub
    interrupt: Interrupt
    cache: OutputCache
    messages: list[tuple[str, JsonObject]] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    reports: dict[str, JsonObject] = field(default_factory=dict)
    """What nodes reported to the client (`ui`), with its `meta`, by node id."""

    def __post_init__(self) -> None:
        self.prompt_id = self.item.prompt_id
        self.prompt = self.item.prompt
        self.client_id: str | None = self.item.extra_data.get("client_id")
        self.progress = ProgressState(self.prompt_id)
        self.todo = ExecutionList(self.prompt, self._is_output, lambda node_id: self.cache.get(node_id) is not None)

    def execute(self) -> Outcome:
        self._message("execution_start", {"prompt_id": self.prompt_id})
        fingerprint = fingerprints(self.prompt, self.interfaces, self.folders.input)
        self.cache.start_prompt(cache_keys(self.prompt, self.interfaces, fingerprint))
        cached = [node_id for node_id in self.prompt if self.cache.get(node_id) is not None]
        self._message("execution_cached", {"nodes": cached, "prompt_id": self.prompt_id})
        for output in self.item.outputs:
            self.todo.add(output)
        success = self._run_nodes()
        if success:
            self._message("execution_success", {"prompt_id": self.prompt_id})
        return Outcome(
            success,
            self.messages,
            {node_id: report["output"] for node_id, report in self.reports.items()},
            {node_id: report["meta"] for node_id, report in self.reports.items()},
        )

    def _run_nodes(self) -> bool:
        while (node_id := self.todo.next()) is not None:
            cached = self.cache.get(node_id)
            if cached is not None:
                self._report_cached(node_id, cached)
            elif not self._run_node(node_id):
                return False
            else:
                self.executed.append(node_id)
            self._finish_progress(node_id)
            self.todo.done(node_id)
        return True

    def _report_cached(self, node_id: str, cached: CachedResult) -> None:
        """Report an old result anew; without a client ComfyUI forgets to put it into the history."""
        if self.client_id is None:
            return
        output = cached.ui["output"] if cached.ui else None
        self._send_executed(node_id, output)
        if cached.ui is not None:
            self.reports[node_id] = cached.ui

    def _run_node(self, node_id: str) -> bool:
        """Run a node; False when it failed or was interrupted, which the client has then been told."""
        self.progress.start(node_id)
        self._send_progress()
        inputs = self._inputs(node_id)
        if self.client_id is not None:
            self.events.running_node = node_id
            data = {"node": node_id, "display_node": node_id, "prompt_id": self.prompt_id}
            self.events.send("executing", data, self.client_id)
        try:
            self._keep(node_id, self._call(node_id, inputs))
        except Interrupted:
            self._message("execution_interrupted", self._failure(node_id), broadcast=True)
            return False
        except Exception as error:  # noqa: BLE001 - whatever a node raises is reported to the client
            logger.warning("Node %s failed: %s", node_id, error)
            self._message("execution_error", self._error(node_id, inputs, error))
            return False
        return True

    def _inputs(self, node_id: str) -> dict[str, list[Any]]:
        """Give each input as the list of values for which the node is called in turn."""
        node = self.prompt[node_id]
        known = self.interfaces.inputs(node["class_type"])
        inputs = {}
        for name, value in node["inputs"].items():
            if name in known:
                inputs[name] = self._output(value) if is_link(value) else [value]
        return inputs

    def _output(self, link: list[Any]) -> list[Any]:
        source = self.cache.get(link[0])
        if source is None:
            raise RuntimeError(f"Node {link[0]} was to run before those that it feeds.")
        return source.outputs[int(link[1])]

    def _call(self, node_id: str, inputs: dict[str, list[Any]]) -> list[NodeResult]:
        function = self.interfaces.node(self.prompt[node_id]["class_type"]).function
        context = NodeContext(
            prompt=self.prompt,
            extra_pnginfo=self.item.extra_data.get("extra_pnginfo"),
            node_id=node_id,
            prompt_id=self.prompt_id,
            client_id=self.client_id,
            folders=self.folders,
            state=self.progress,
            events=self.events,
            interrupt=self.interrupt,
        )
        results = []
        for arguments in slices(inputs):
            self.interrupt.check()
            results.append(function(context, **arguments))
        return results

    def _keep(self, node_id: str, results: list[NodeResult]) -> None:
        ui = merge_ui(results)
        if ui:
            meta = {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
            self.reports[node_id] = {"meta": meta, "output": ui}
            if self.client_id is not None:
                self._send_executed(node_id, ui)
        outputs = merge_outputs(results, self.interfaces.output_is_list(self.prompt[node_id]["class_type"]))
        self.cache.set(node_id, CachedResult(outputs, self.reports.get(node_id)))

    def _failure(self, node_id: str) -> JsonObject:
        return {
            "prompt_id": self.prompt_id,
            "node_id": node_id,
            "node_type": self.prompt[node_id]["class_type"],
            "executed": list(self.executed),
        }

    def _error(self, node_id: str, inputs: dict[str, list[Any]], error: Exception) -> JsonObject:
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
        """Give what nodes in the old style get besides their visible inputs; the newer ones name it in lists."""
        values = {
            "PROMPT": self.prompt,
            "EXTRA_PNGINFO": self.item.extra_data.get("extra_pnginfo"),
            "UNIQUE_ID": node_id,
        }
        hidden = self.interfaces.hidden(self.prompt[node_id]["class_type"])
        return {name: [values[kind]] for name, kind in hidden.items() if isinstance(kind, str) and kind in values}

    def _is_output(self, node_id: str) -> bool:
        return self.interfaces.is_output(self.prompt[node_id]["class_type"])

    def _message(self, name: str, data: JsonObject, *, broadcast: bool = False) -> None:
        """Note an event for the history, and send it; without a client only a broadcast goes out, to everybody."""
        stamped = {**data, "timestamp": int(time.time() * 1000)}
        self.messages.append((name, stamped))
        if self.client_id is not None or broadcast:
            self.events.send(name, stamped, self.client_id)

    def _send_executed(self, node_id: str, output: JsonObject | None) -> None:
        data = {"node": node_id, "display_node": node_id, "output": output, "prompt_id": self.prompt_id}
        self.events.send("executed", data, self.client_id)

    def _send_progress(self) -> None:
        self.events.send("progress_state", self.progress.message(), self.client_id)

    def _finish_progress(self, node_id: str) -> None:
        self.progress.finish(node_id)
        self._send_progress()
