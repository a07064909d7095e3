"""A key sees, cancels and purges its own jobs alone: every route is asked for another's, a new one too."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.callers import ANYONE, acting_as
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.integration.test_routes_need_keys import paths_of
from tests.support.network.ports import closed_port

KEYS = Keys(["alice:a-key", "bob:b-key"], admins=["root:r-key"])
ALICE, BOB, ROOT = ({"Authorization": f"Bearer {key}"} for key in ("a-key", "b-key", "r-key"))
ABSENT = "nobodys-batch-1"
BATCH = "alices-batch"
JOB = f"{BATCH}-1"
FILE = "9/picture.png"
OF_JOBS = ("job_id", "request_id", "prompt_id", "task_id", "execution_id")
NOT_OF_JOBS = ("endpoint_id", "workflow_id", "name", "folder")


@dataclass(frozen=True)
class Running:
    """An application, and what is behind its APIs."""

    client: TestClient
    gateway: Gateway

    def submit(self, key: dict[str, str], **arguments: Any) -> JobRecord:
        """Queue a job with a key, through the service that the APIs use."""
        with acting_as(KEYS.check(key["Authorization"])):
            return asyncio.run(self.gateway.service.submit(EXAMPLE_JOB, **arguments))

    def state(self, job_id: str) -> JobState:
        record = self.gateway.store.get(job_id)
        assert record is not None
        return record.state


@pytest.fixture
def running(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Running]:
    """An application of which nothing runs a job: each waits until it is cancelled."""
    with closed_port() as port:
        loaded = load_gateway_settings(
            comfyui_url=f"http://127.0.0.1:{port}", data_dir=str(tmp_path), wait_for_comfyui=True
        )
        app = create_app(loaded, KEYS)
        gateway: Gateway = app.state.gateway
        # Without its lifespan: the engine does not start.
        yield Running(TestClient(app, base_url="http://127.0.0.1"), gateway)
        gateway.stop()


def filled(path: str, job_id: str) -> str | None:
    """Return a path with the ids of a job, or None for one that is about no job."""
    names = re.findall(r"\{(\w+)(?::path)?\}", path)
    values = {
        **dict.fromkeys(OF_JOBS, job_id),
        "batch_id": job_id.removesuffix("-1"),
        "path": FILE,
        **dict.fromkeys(NOT_OF_JOBS, "x"),
    }
    assert set(names) <= values.keys(), f"{path}: does a new parameter name a job? Say so in this test"
    if not {"batch_id", *OF_JOBS} & set(names):
        return None
    return re.sub(r"\{(\w+)(?::path)?\}", lambda found: values[found[1]], path)


def operations(client: TestClient) -> list[tuple[str, str]]:
    """Return method and path of all that is about a job."""
    description = client.get("/openapi.json", headers=ROOT).json()
    found = [
        (method, path)
        for path, methods in description["paths"].items()
        for method in methods
        if filled(path, JOB) is not None
    ]
    assert len(found) > 20
    return found


def sockets(client: TestClient) -> list[str]:
    """Return the paths of all WebSockets, with `x` for each parameter."""
    found = [path for path, is_websocket in paths_of(client.app.routes) if is_websocket]  # type: ignore[attr-defined]
    assert len(found) >= 3
    return found


def answer(client: TestClient, key: dict[str, str], method: str, path: str, job_id: str) -> tuple[int, str]:
    """Return status and body of an answer, without the id that was asked for."""
    where = filled(path, job_id)
    assert where is not None
    response = client.request(method, where, headers=key)
    return response.status_code, response.text.replace(job_id, "…").replace(job_id.removesuffix("-1"), "…")


def test_another_keys_job_is_not_found_on_any_route(running: Running) -> None:
    client = running.client
    running.submit(ALICE, job_id=JOB, details={"batch_id": BATCH})
    put(running.gateway, JOB)
    routes = operations(client)
    for method, path in routes:
        assert answer(client, BOB, method, path, JOB) == answer(client, BOB, method, path, ABSENT), path
        assert answer(client, BOB, method, path, JOB)[0] == 404, (method, path)
    assert running.state(JOB) is JobState.IN_QUEUE
    # Streams end with the job, so that each of them can be asked for.
    assert client.post(f"/cancel/{JOB}", headers=ALICE).status_code == 200
    for key, is_there in ((BOB, False), (ALICE, True), (ROOT, True)):
        for method, path in routes:
            assert (answer(client, key, method, path, JOB)[0] != 404) is is_there, (method, path)


def test_another_keys_job_is_not_found_on_any_websocket(running: Running) -> None:
    client = running.client
    running.submit(ALICE, job_id="x")
    for path in sockets(client):
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(path, headers=BOB):
            pass
        assert denied.value.status_code == 404
    # They end with the job.
    assert client.post("/cancel/x", headers=ALICE).status_code == 200
    for path in sockets(client):
        for key in (ALICE, ROOT):
            with client.websocket_connect(path, headers=key) as websocket:
                assert websocket.receive_json()


def test_lists_contain_only_the_keys_own_jobs(running: Running) -> None:
    mine = [running.submit(ALICE).id, running.submit(BOB).id, running.submit(ALICE).id]
    shown = {"alice": [mine[0], mine[2]], "bob": [mine[1]], "root": mine}
    for key, name in ((ALICE, "alice"), (BOB, "bob"), (ROOT, "root")):
        tasks = running.client.get("/task", headers=key).json()
        assert sorted(task["task_id"] for task in tasks) == sorted(shown[name])
        queue = running.client.get("/api/queue", headers=key).json()
        # Those of the others count, and are not named.
        assert queue["pending"] == [[str(mine.index(job) + 1), job, {}] for job in shown[name]]
        assert running.client.get("/health", headers=key).json()["jobs"]["inQueue"] == 3


@pytest.mark.parametrize("path", ["/purge-queue", "/v2/local/purge-queue"])
def test_a_purge_cancels_only_the_keys_own_jobs(running: Running, path: str) -> None:
    alices, bobs = running.submit(ALICE).id, running.submit(BOB).id
    assert running.client.post(path, headers=BOB).json()["removed"] == 1
    assert (running.state(alices), running.state(bobs)) == (JobState.IN_QUEUE, JobState.CANCELLED)
    running.submit(BOB)
    assert running.client.post(path, headers=ROOT).json()["removed"] == 2
    assert running.state(alices) is JobState.CANCELLED


def test_the_same_idempotency_or_cache_key_of_two_keys_is_two_jobs(running: Running) -> None:
    ids = set()
    for key in (ALICE, BOB, ALICE, BOB):
        sent = running.client.post("/run", json=EXAMPLE_JOB, headers={**key, "Idempotency-Key": "order-1"})
        ids.add(sent.json()["id"])
    assert len(ids) == 2
    cached = [running.submit(key, cache_key="order-1").id for key in (ALICE, BOB, ALICE, BOB)]
    assert cached[:2] == cached[2:]
    assert len({*ids, *cached}) == 4


def test_another_keys_id_is_only_reported_as_taken(running: Running) -> None:
    request = {"input": {"request_id": "order-1", "workflow_json": EXAMPLE_JOB["input"]["workflow"]}}
    assert running.client.post("/generate", json=request, headers=ALICE).status_code == 202
    refused = running.client.post("/generate", json=request, headers=BOB)
    assert (refused.status_code, refused.json()["code"]) == (409, "duplicate_request")
    assert refused.json()["error"] == "There is a job with the id 'order-1' already"
    assert running.client.get("/result/order-1", headers=BOB).status_code == 404


def put(gateway: Gateway, job_id: str) -> None:
    """Put an output's file where the gateway keeps those of a job."""
    file = gateway.assets._folder / job_id / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"picture")


@pytest.mark.parametrize("root", ["/assets", "/api/v1/images/generated"])
def test_a_file_needs_its_key_or_a_signed_link(running: Running, root: str) -> None:
    client = running.client
    alices, bobs = running.submit(ALICE).id, running.submit(BOB).id
    put(running.gateway, alices)
    put(running.gateway, bobs)
    assert client.get(f"{root}/{alices}/{FILE}", headers=ALICE).content == b"picture"
    assert client.get(f"{root}/{alices}/{FILE}", headers=ROOT).content == b"picture"
    for path in (f"{alices}/{FILE}", f"{bobs}/%2e%2e/{alices}/{FILE}", f"%2e%2e/{alices}/{FILE}"):
        assert client.get(f"{root}/{path}", headers=BOB).status_code == 404


def test_nothing_is_shown_without_a_caller(running: Running) -> None:
    job_id = running.submit(ALICE).id
    with acting_as(None), pytest.raises(RuntimeError, match="without a caller"):
        asyncio.run(running.gateway.service.get(job_id))
    with acting_as(KEYS.check("b-key")), pytest.raises(NotFound):
        asyncio.run(running.gateway.service.get(job_id))
    with acting_as(ANYONE):
        assert asyncio.run(running.gateway.service.get(job_id)).owner == "alice"


def test_a_caller_is_forgotten_with_its_request(running: Running) -> None:
    with acting_as(None):
        assert running.client.get("/task", headers=ROOT).status_code == 200
        with pytest.raises(RuntimeError, match="without a caller"):
            asyncio.run(running.gateway.service.latest())
