"""A gateway as a process of its own, beside a ComfyUI.

GATEWAY_TEST_DATABASE=postgresql gives each gateway that a test does not give a database one in a real PostgreSQL.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import requests

from tests.support.databases.postgres import Postgres, postgres
from tests.support.processes.process import Process, start_python
from tests.support.waiting import TIMEOUT_S, wait_until

KEY = "a-key-for-tests"
DATABASES = ("sqlite", "postgresql")


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway that answers."""

    url: str
    process: Process

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(f"{self.url}{path}", headers=self.headers, timeout=TIMEOUT_S, **arguments)

    def post(self, path: str, body: Any = None, **headers: str) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, headers={**self.headers, **headers}, timeout=TIMEOUT_S)

    def run(self, workflow: Mapping[str, Any], **beside: Any) -> str:
        """Queue a workflow and return its job's id."""
        answer = self.post("/run", {"input": {"workflow": workflow}, **beside})
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def wait_until_one_runs(self) -> str:
        """Return the id of the only job that ComfyUI runs, once the gateway knows that it does."""

        def running() -> list[str]:
            return [job_id for _number, job_id, _ in self.get("/api/queue").json()["running"]]

        wait_until(lambda: len(running()) == 1)
        return running()[0]

    def ended(self, job_id: str) -> dict[str, Any]:
        """Return a job's status when it has ended: its events end with it."""
        self.get(f"/events/{job_id}")
        status: dict[str, Any] = self.get(f"/status/{job_id}").json()
        return status


def database_url(kind: str, data: Path) -> str:
    """Return the DATABASE_URL of a gateway: the same one for every gateway over the same folder, empty for SQLite."""
    assert kind in DATABASES, f"GATEWAY_TEST_DATABASE must be one of {', '.join(DATABASES)}"
    return "" if kind == "sqlite" else _database_of(data)


@cache
def _database_of(data: Path) -> str:
    return _server().new_database()


@cache
def _server() -> Postgres:
    """Start the one PostgreSQL of this test run, which ends with it."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(postgres())


@contextmanager
def gateway_process(comfyui_url: str, data: Path, *module: str, **settings: str) -> Iterator[GatewayProcess]:
    """Run a gateway until the end of the block; `module` is what starts it in place of its own, with arguments."""
    environment = {
        "COMFYUI_URL": comfyui_url,
        "API_PORT": "0",
        "API_KEYS": KEY,
        "DATA_DIR": str(data),
        "DATABASE_URL": database_url(os.environ.get("GATEWAY_TEST_DATABASE", "sqlite"), data),
        "PYTHONPATH": "src",
        **settings,
    }
    with start_python("-m", *(module or ("comfy_worker", "serve")), environment=environment) as process:
        url = process.wait_for_line(r"running on (http://\S+:\d+)").group(1)
        yield GatewayProcess(url.replace("0.0.0.0", "127.0.0.1"), process)
