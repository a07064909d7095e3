"""A gateway process on a fixed port that a test may kill and start again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

from tests.support.network.ports import free_port
from tests.support.processes.process import Process, start_python
from tests.support.waiting import TIMEOUT_S, wait_until

Body = dict[str, Any]


class RestartableGateway:
    """`python -m comfy_worker serve` on a port that stays the same over kills and starts."""

    def __init__(self, folder: Path, comfyui_url: str, **environment: str) -> None:
        self._port = port = free_port()
        self._environment = {
            "API_PORT": str(port),
            "DATA_DIR": str(folder),
            "COMFYUI_URL": comfyui_url,
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
            "MAX_QUEUE_SIZE": "1000",
            "PYTHONPATH": "src",
            **environment,
        }
        self._process: Process | None = None
        self.logs: list[str] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def process(self) -> Process:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    def launch(self) -> None:
        """Begin to start it; it may be killed before it listens."""
        self._process = start_python("-m", "comfy_worker", "serve", environment=self._environment)

    def start(self) -> None:
        """Start it, and return when it answers."""
        self.launch()
        wait_until(self.is_up)

    def is_up(self) -> bool:
        """Return whether it answers."""
        assert self._process is not None
        assert self._process.is_running, self._process.output
        try:
            return requests.get(f"{self.url}/health", timeout=TIMEOUT_S).ok
        except requests.ConnectionError:
            return False

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self.logs.append(self._process.output)

    def stop(self) -> None:
        """End it by SIGTERM."""
        assert self._process is not None
        self._process.stop(TIMEOUT_S)
        self.logs.append(self._process.output)

    def post(self, path: str, body: Body | None = None, **headers: str) -> Body:
        """Send JSON; return the answer."""
        response = requests.post(f"{self.url}{path}", json=body or {}, headers=headers, timeout=TIMEOUT_S)
        response.raise_for_status()
        answer: Body = response.json()
        return answer

    def status(self, job_id: str) -> Body:
        """Return the answer of /status."""
        response = requests.get(f"{self.url}/status/{job_id}", timeout=TIMEOUT_S)
        response.raise_for_status()
        answer: Body = response.json()
        return answer
