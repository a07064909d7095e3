"""The queue of prompts and the history of finished ones (`PromptQueue` of ComfyUI's `execution.py`)."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_emulator.faults import Faults
from comfy_emulator.json_types import JsonObject

MAXIMUM_HISTORY_SIZE = 10_000


@dataclass(frozen=True)
class QueueItem:
    """An accepted prompt; the lowest `number` runs first."""

    number: float
    prompt_id: str
    prompt: JsonObject
    extra_data: JsonObject
    outputs: list[str]

    def as_json(self) -> list[Any]:
        """Return the tuple of `/queue` and of the history's `prompt`."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]


@dataclass(frozen=True)
class PromptResult:
    """How a prompt ended: `ExecutionStatus` and `history_result` of ComfyUI."""

    success: bool
    messages: list[tuple[str, JsonObject]]
    outputs: JsonObject
    meta: JsonObject

    def history_entry(self, item: QueueItem) -> JsonObject:
        """Return the entry of `/history`."""
        return {
            "prompt": item.as_json(),
            "outputs": self.outputs,
            "status": {
                "status_str": "success" if self.success else "error",
                "completed": self.success,
                "messages": [list(message) for message in self.messages],
            },
            "meta": self.meta,
        }


@dataclass(frozen=True)
class _HistoryEntry:
    value: JsonObject
    visible_at: float


class PromptQueue:
    """The queue and the history.

    Args:
        faults: what goes wrong with submissions and the history.
        on_update: called when the length of the queue may have changed.
        on_start: called when a prompt starts, before clients can see it running.
    """

    def __init__(self, faults: Faults, on_update: Callable[[], None], on_start: Callable[[], None]) -> None:
        self._faults = faults
        self._on_update = on_update
        self._on_start = on_start
        self._pending: list[tuple[float, str, int, QueueItem]] = []
        self._running: QueueItem | None = None
        self._history: dict[str, _HistoryEntry] = {}
        self._free_memory = False
        self._closed = False
        self._arrivals = itertools.count()
        self._changed = threading.Condition(threading.RLock())

    def put(self, item: QueueItem) -> None:
        """Add a prompt; among equal numbers, ids decide, as in ComfyUI's heap of tuples."""
        with self._changed:
            heapq.heappush(self._pending, (item.number, item.prompt_id, next(self._arrivals), item))
            self._on_update()
            if self._faults.count_down("delete_pending"):
                self.delete_queue_item(item.prompt_id)
            self._changed.notify()

    def get(self, free_memory: Callable[[], None]) -> QueueItem | None:
        """Wait for the next prompt and start it; return None when the queue is closed.

        Calls `free_memory` first if `request_free_memory` was called (the flags in `prompt_worker` of `main.py`).
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._pending or self._free_memory)
                if self._closed:
                    return None
                if self._free_memory:
                    self._free_memory = False
                    free_memory()
                if self._pending:
                    break
            self._running = heapq.heappop(self._pending)[-1]
            self._on_start()
            self._on_update()
            return self._running

    def task_done(self, item: QueueItem, result: PromptResult) -> None:
        """Move the running prompt to the history."""
        with self._changed:
            self._running = None
            if len(self._history) > MAXIMUM_HISTORY_SIZE:
                del self._history[next(iter(self._history))]
            if not self._faults.history_lost:
                visible_at = time.monotonic() + self._faults.history_delay_s
                self._history[item.prompt_id] = _HistoryEntry(result.history_entry(item), visible_at)
            self._on_update()

    def close(self) -> None:
        """Let `get` return None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get_tasks_remaining(self) -> int:
        """Return the number of pending and running prompts."""
        with self._changed:
            return len(self._pending) + (self._running is not None)

    def get_current_queue(self) -> tuple[list[QueueItem], list[QueueItem]]:
        """Return the running and the pending prompts, the latter in the order of the heap."""
        with self._changed:
            running = [] if self._running is None else [self._running]
            return running, [entry[-1] for entry in self._pending]

    def is_running(self, prompt_id: str) -> bool:
        """Return whether this prompt is running."""
        with self._changed:
            return self._running is not None and self._running.prompt_id == prompt_id

    def wipe_queue(self) -> None:
        """Remove all pending prompts."""
        with self._changed:
            self._pending = []
            self._on_update()

    def delete_queue_item(self, prompt_id: str) -> None:
        """Remove a pending prompt; a running or unknown one is ignored."""
        with self._changed:
            index = next((i for i, entry in enumerate(self._pending) if entry[1] == prompt_id), None)
            if index is None:
                return
            if len(self._pending) == 1:
                self.wipe_queue()  # sends `status` too, so that ComfyUI sends it twice here
            else:
                del self._pending[index]
                heapq.heapify(self._pending)
            self._on_update()

    def get_history(self, max_items: int | None = None, offset: int = -1) -> JsonObject:
        """Return the history, oldest first; without `offset`, its last `max_items`."""
        entries = self._visible()
        if offset < 0 and max_items is not None:
            offset = len(entries) - max_items
        chosen = list(entries.items())[max(offset, 0) :]
        if max_items is not None:
            # ComfyUI checks the limit after it has added an entry, so that 0 and less return one.
            chosen = chosen[: max(max_items, 1)]
        return dict(chosen)

    def get_history_of(self, prompt_id: str) -> JsonObject:
        """Return the history of one prompt, `{}` if it has none."""
        entries = self._visible()
        return {prompt_id: entries[prompt_id]} if prompt_id in entries else {}

    def _visible(self) -> JsonObject:
        now = time.monotonic()
        with self._changed:
            return {key: entry.value for key, entry in self._history.items() if entry.visible_at <= now}

    def wipe_history(self) -> None:
        """Remove all finished prompts."""
        with self._changed:
            self._history = {}

    def delete_history_item(self, prompt_id: str) -> None:
        """Remove a finished prompt."""
        with self._changed:
            self._history.pop(prompt_id, None)

    def request_free_memory(self) -> None:
        """Have the cache cleared before the next prompt."""
        with self._changed:
            self._free_memory = True
            self._changed.notify()
