"""The statuses that each API declares, where they do not take a ComfyUI: too large, too often, too many, a bug."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.http.limits import RUN_LIMIT
from comfy_worker.gateway.settings import load_gateway_settings
from tests.support.gateway.in_process import running_gateway
from tests.support.network.ports import closed_port

KEY = {"Authorization": "Bearer key"}
Make = Callable[..., TestClient]
GRAPH = EXAMPLE_JOB["input"]["workflow"]
TASK = {"task_type": "comfyui", "params": {"workflow": GRAPH}}
EXECUTE = "/api/v1/comfyui/workflows/solid-color/execute"


@pytest.fixture
def make(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Return a maker of clients of an application that has no ComfyUI."""
    with ExitStack() as stack, closed_port() as port:

        def make(**settings: Any) -> TestClient:
            url = f"http://127.0.0.1:{port}"
            loaded = load_gateway_settings(comfyui_url=url, data_dir=str(tmp_path), wait_for_comfyui=True, **settings)
            app = create_app(loaded, Keys(("key",)))
            client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
            stack.enter_context(client)
            return client

        yield make


def sentence(answer: Any) -> str:
    body = answer.json()
    said: str = body["errors"][0]["message"] if "errors" in body else body["error"]
    return said


@pytest.mark.parametrize("path", ["/run", "/generate", "/task", "/api/workflow/submit", EXECUTE])
def test_every_api_rejects_oversized_requests(make: Make, path: str) -> None:
    answer = make().post(path, headers={**KEY, "Content-Length": str(RUN_LIMIT + 1)}, content=b"{}")
    assert answer.status_code == 413
    assert f"more than {RUN_LIMIT} bytes" in sentence(answer)


@pytest.mark.parametrize("path", ["/run", "/generate", "/task", "/api/workflow/submit", EXECUTE])
def test_every_api_reports_a_rate_limited_key(make: Make, path: str) -> None:
    client = make(rate_limit_run="1/day")
    assert client.post(path, headers=KEY, content=b"{").status_code == 400
    answer = client.post(path, headers=KEY, content=b"{")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert "with this key" in sentence(answer)


@pytest.mark.parametrize(
    ("path", "body"), [("/run", EXAMPLE_JOB), ("/task", TASK), (EXECUTE, {"inputs": None, "version": ""})]
)
def test_every_api_reports_a_full_queue(make: Make, path: str, body: Any) -> None:
    client = make(max_queue_size=1)
    answers = [client.post(path, headers=KEY, json=body) for _ in range(4)]
    assert [answer.status_code for answer in (answers[0], answers[-1])] == [200, 503]
    assert answers[-1].headers["retry-after"]


@pytest.mark.parametrize(
    "path", ["/run/broken", "/task/x/broken", "/api/broken", "/api/workflow/broken", "/api/v1/broken"]
)
def test_every_api_reports_a_bug_in_one_sentence(make: Make, path: str) -> None:
    client = make()
    app = client.app
    assert isinstance(app, FastAPI)

    async def broken() -> None:
        raise RuntimeError("words that stay in the log")

    app.add_api_route(path, broken)
    answer = client.get(path, headers=KEY)
    assert (answer.status_code, sentence(answer)) == (500, "The gateway failed because of a bug of its own")
    assert "words" not in answer.text


def test_the_catalog_serves_image_ranges(make: Make, tmp_path: Path) -> None:
    client = make()
    job_id = client.post("/run", json=EXAMPLE_JOB, headers=KEY).json()["id"]
    folder = tmp_path / "assets" / job_id
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"0123456789")
    url = f"/api/v1/images/generated/{job_id}/a.png"
    part = client.get(url, headers={**KEY, "Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    assert client.get(url, headers={**KEY, "Range": "bytes=50-60"}).status_code == 416
    head = client.head(url, headers=KEY)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "10", b"")


def test_a_sync_prefix_in_a_callers_id_does_not_make_the_job_synchronous(tmp_path: Path) -> None:
    async def submitted() -> list[bool]:
        named = await running.service.submit(EXAMPLE_JOB, job_id="sync-mine")
        waited = await running.service.submit(EXAMPLE_JOB, sync=True, details={"batch_id": "x"})
        assert waited.id.startswith("sync-")
        return [(await running.service.get(record.id)).is_sync for record in (named, waited)]

    with closed_port() as port, running_gateway(tmp_path, f"http://127.0.0.1:{port}") as running:
        assert asyncio.run(submitted()) == [False, True]
