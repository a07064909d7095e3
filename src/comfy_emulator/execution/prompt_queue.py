"""Prompts that wait, the one that runs, and the history of those that ran."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_emulator.faults import Faults
from comfy_emulator.node_definitions import JsonObject

MAXIMUM_HISTORY_SIZE = 10_000


@dataclass(frozen=True)
class QueueItem:
    """A submission that was taken; `number` gives its place, the lowest runs first."""

    number: float
    prompt_id: str
    prompt: JsonObject
    extra_data: JsonObject
    outputs: list[str]

    def as_json(self) -> list[Any]:
        """Give the five-part form of `/queue` and of the history's `prompt`."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]


@dataclass(frozen=True)
class Outcome:
    """How a prompt ended."""

    success: bool
    messages: list[tuple[str, JsonObject]]
    outputs: JsonObject
    meta: JsonObject

    def history_entry(self, item: QueueItem) -> JsonObject:
        """Give the entry of `/history`."""
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
class _Entry:
    value: JsonObject
    visible_at: float


class PromptQueue:
    """The queue and the history.

    Args:
        faults: what goes wrong with submissions and the history.
        updated: called when the number of prompts may have changed.
        starting: called when a prompt begins to run, before anyone can see it running.
    """

    def __init__(self, faults: Faults, updated: Callable[[], None], starting: Callable[[], None]) -> None:
        self._faults = faults
        self._updated = updated
        self._starting = starting
        self._waiting: list[tuple[float, str, int, QueueItem]] = []
        self._running: QueueItem | None = None
        self._history: dict[str, _Entry] = {}
        self._free_memory = False
        self._closed = False
        self._arrivals = itertools.count()
        self._changed = threading.Condition(threading.RLock())

    def put(self, item: QueueItem) -> None:
        """Queue a prompt; a prompt with the same number goes by its id, as in ComfyUI."""
        with self._changed:
            heapq.heappush(self._waiting, (item.number, item.prompt_id, next(self._arrivals), item))
            self._updated()
            if self._faults.takes_submission():
                self.delete(item.prompt_id)
            self._changed.notify()

    def take(self, free_memory: Callable[[], None]) -> QueueItem | None:
        """Wait for the next prompt to run; None when the queue is closed.

        `free_memory` is called when `/free` asked for it meanwhile.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._free_memory)
                if self._closed:
                    return None
                if self._free_memory:
                    self._free_memory = False
                    free_memory()
                if self._waiting:
                    break
            self._running = heapq.heappop(self._waiting)[-1]
            self._starting()
            self._updated()
            return self._running

    def finish(self, item: QueueItem, outcome: Outcome) -> None:
        """Write the history of the prompt that ran."""
        with self._changed:
            self._running = None
            if len(self._history) > MAXIMUM_HISTORY_SIZE:
                del self._history[next(iter(self._history))]
            if not self._faults.history_lost:
                visible_at = time.monotonic() + self._faults.history_delay_s
                self._history[item.prompt_id] = _Entry(outcome.history_entry(item), visible_at)
            self._updated()

    def close(self) -> None:
        """Let `take` end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def remaining(self) -> int:
        """Count the prompts that wait or run."""
        with self._changed:
            return len(self._waiting) + (self._running is not None)

    def current(self) -> tuple[list[QueueItem], list[QueueItem]]:
        """Give the running and the waiting prompts, the latter in the order of the heap, as `/queue` does."""
        with self._changed:
            running = [] if self._running is None else [self._running]
            return running, [entry[-1] for entry in self._waiting]

    def runs(self, prompt_id: str) -> bool:
        """Tell whether this prompt runs now."""
        with self._changed:
            return self._running is not None and self._running.prompt_id == prompt_id

    def wipe_queue(self) -> None:
        """Drop all waiting prompts."""
        with self._changed:
            self._waiting = []
            self._updated()

    def delete(self, prompt_id: str) -> None:
        """Drop a waiting prompt; one that runs or is unknown is left alone."""
        with self._changed:
            place = next((i for i, entry in enumerate(self._waiting) if entry[1] == prompt_id), None)
            if place is None:
                return
            if len(self._waiting) == 1:
                self.wipe_queue()  # which is told of, and then told of again
            else:
                del self._waiting[place]
                heapq.heapify(self._waiting)
            self._updated()

    def history(self, max_items: int | None = None, offset: int = -1) -> JsonObject:
        """Give the history, oldest first; without `offset` the last `max_items` of it."""
        entries = self._visible()
        if offset < 0 and max_items is not None:
            offset = len(entries) - max_items
        chosen = list(entries.items())[max(offset, 0) :]
        if max_items is not None:
            # ComfyUI looks at the limit after it has put an entry in: with an offset, 0 and less still give one.
            chosen = chosen[: max(max_items, 1)]
        return dict(chosen)

    def history_of(self, prompt_id: str) -> JsonObject:
        """Give the history of one prompt, `{}` while there is none."""
        entries = self._visible()
        return {prompt_id: entries[prompt_id]} if prompt_id in entries else {}

    def _visible(self) -> JsonObject:
        now = time.monotonic()
        with self._changed:
            return {key: entry.value for key, entry in self._history.items() if entry.visible_at <= now}

    def wipe_history(self) -> None:
        """Forget all prompts that ran."""
        with self._changed:
            self._history = {}

    def delete_history(self, prompt_id: str) -> None:
        """Forget a prompt that ran."""
        with self._changed:
            self._history.pop(prompt_id, None)

    def free_memory(self) -> None:
        """Ask for the cache to be cleared before the next prompt."""
        with self._changed:
            self._free_memory = True
            self._changed.notify()
