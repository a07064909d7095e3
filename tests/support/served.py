"""A gateway as a process of its own, beside an emulated ComfyUI."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.support.processes import Process

KEY = "a-key-for-tests"
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Served:
    """A gateway that answers."""

    url: str
    process: Process

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(f"{self.url}{path}", headers=self.headers, timeout=_TIMEOUT_S, **arguments)

    def post(self, path: str, body: Any = None, **headers: str) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, headers={**self.headers, **headers}, timeout=_TIMEOUT_S)

    def run(self, workflow: Mapping[str, Any], **beside: Any) -> str:
        """Queue a workflow and return its job's id."""
        answer = self.post("/run", {"input": {"workflow": workflow}, **beside})
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def ended(self, job_id: str) -> dict[str, Any]:
        """Return a job's status when it has ended: its events end with it."""
        self.get(f"/events/{job_id}")
        status: dict[str, Any] = self.get(f"/status/{job_id}").json()
        return status


@contextmanager
def served(comfyui_url: str, data: Path, *module: str, **settings: str) -> Iterator[Served]:
    """Run a gateway until the end of the block; `module` is what starts it in place of its own, with arguments."""
    environment = {
        "COMFYUI_URL": comfyui_url,
        "API_PORT": "0",
        "API_KEYS": KEY,
        "DATA_DIR": str(data),
        "PYTHONPATH": "src",
        **settings,
    }
    with Process([sys.executable, "-m", *(module or ("comfy_worker", "serve"))], environment=environment) as process:
        url = process.wait_for_line(r"running on (http://\S+:\d+)").group(1)
        yield Served(url.replace("0.0.0.0", "127.0.0.1"), process)
