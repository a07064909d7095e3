"""The thread that runs the prompts of the queue (`prompt_worker` of ComfyUI's `main.py`)."""

from __future__ import annotations

import threading

from comfy_emulator.execution.executor import PromptExecutor
from comfy_emulator.execution.prompt_queue import PromptQueue
from comfy_emulator.websockets import WebSocketHub


class PromptWorker(threading.Thread):
    """Runs prompts until the queue is closed."""

    def __init__(self, queue: PromptQueue, executor: PromptExecutor, websockets: WebSocketHub) -> None:
        super().__init__(name="prompt-worker", daemon=True)
        self._queue = queue
        self._executor = executor
        self._websockets = websockets

    def run(self) -> None:
        """Run prompts. The last event, `executing` without a node, is sent after the history was written."""
        while (item := self._queue.get(self._executor.free_memory)) is not None:
            result = self._executor.execute(item)
            self._queue.task_done(item, result)
            client_id = self._websockets.client_id
            if client_id is not None:
                self._websockets.send("executing", {"node": None, "prompt_id": item.prompt_id}, client_id)
