"""The ComfyUI that acceptance tests run against: the emulator as a process, or a real one named by COMFYUI_URL."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import websocket

from tests.support.processes.process import Process, start_python
from tests.support.waiting import TIMEOUT_S


@dataclass(frozen=True)
class ComfyUI:
    """A running ComfyUI.

    Attributes:
        url: without a closing slash.
        process: the emulator; None for a ComfyUI that was there before.
    """

    url: str
    process: Process | None = None

    @property
    def is_emulator(self) -> bool:
        """Whether faults can be set, and it may be ended."""
        return self.process is not None

    @property
    def address(self) -> str:
        """Its `host:port`."""
        return urlsplit(self.url).netloc

    def queue(self) -> list[str]:
        """Return the ids of the prompts that run or wait, in this order."""
        queue = self._get("/queue")
        return [item[1] for part in ("queue_running", "queue_pending") for item in queue[part]]

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """Return the entry of a prompt that has ended."""
        entry: Mapping[str, Any] | None = self._get(f"/history/{prompt_id}").get(prompt_id)
        return entry

    def wait_until_running(self) -> str:
        """Return the id of the prompt that runs, as soon as one does."""
        url = f"{self.url.replace('http', 'ws', 1)}/ws?clientId=watcher"
        with closing(websocket.create_connection(url, timeout=TIMEOUT_S)) as watcher:
            while not (running := self._get("/queue")["queue_running"]):
                # Every change of the queue is broadcast.
                watcher.recv()
            prompt_id: str = running[0][1]
            return prompt_id

    @contextmanager
    def faults(self, **faults: Any) -> Iterator[None]:
        """Let things go wrong inside the block; without faults it is any ComfyUI's."""
        if not faults:
            yield
            return
        self._set_faults(faults)
        try:
            yield
        finally:
            requests.delete(f"{self.url}/_emulator/faults", timeout=TIMEOUT_S).raise_for_status()

    def _set_faults(self, faults: Mapping[str, Any]) -> None:
        requests.post(f"{self.url}/_emulator/faults", json=faults, timeout=TIMEOUT_S).raise_for_status()

    def _get(self, path: str) -> Any:
        response = requests.get(f"{self.url}{path}", timeout=TIMEOUT_S)
        response.raise_for_status()
        return json.loads(response.content)


@contextmanager
def comfyui() -> Iterator[ComfyUI]:
    """Run the emulator until the end of the block, or use what COMFYUI_URL names."""
    if url := os.environ.get("COMFYUI_URL"):
        yield ComfyUI(url.rstrip("/"))
        return
    with emulator() as running:
        yield running


@contextmanager
def emulator() -> Iterator[ComfyUI]:
    """Run the emulator until the end of the block."""
    with start_python("-m", "comfy_emulator", "--port", "0", "--allow-faults") as process:
        url = process.wait_for_line(r"at (http://\S+\d)").group(1)
        yield ComfyUI(url, process)
