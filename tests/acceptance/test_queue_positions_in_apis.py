"""Five jobs sent at once: one runs and four wait, in every API, with positions 1 to 4."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S, wait_until

WAITING = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    comfyui: ComfyUI
    with running_comfyui() as comfyui, gateway_process(comfyui.url, tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture
def jobs(gateway: GatewayProcess) -> Iterator[list[str]]:
    """Return five jobs of which one runs, the next one in front; they are cancelled afterwards."""
    body = {"input": {"workflow": work(20.0, steps=100)}}
    sent = [gateway.post("/run", body).json()["id"] for _ in range(5)]

    def stages() -> list[str]:
        outputs = [gateway.get(f"/status/{job_id}").json().get("output", {}) for job_id in sent]
        return sorted(output.get("stage", "") for output in outputs)

    # One is in ComfyUI's own queue, behind the one that runs, the others are staged; none overtakes another any more.
    wait_until(lambda: stages() == ["queued", "running", *["staging"] * 3])
    yield in_queue(gateway)
    gateway.post("/purge-queue")
    for job_id in sent:
        gateway.post(f"/cancel/{job_id}")


def in_queue(gateway: GatewayProcess) -> list[str]:
    queue = gateway.get("/api/queue").json()
    return [prompt_id for part in ("running", "pending") for _number, prompt_id, _ in queue[part]]


def status(gateway: GatewayProcess, job_id: str) -> tuple[str, Any]:
    answer = gateway.get(f"/status/{job_id}").json()
    return answer["status"], answer["output"].get("queue_position")


def workflow_status(gateway: GatewayProcess, job_id: str) -> tuple[str, Any]:
    answer = gateway.get(f"/api/workflow/status/{job_id}").json()
    return answer["status"], answer.get("queue_position")


def task(gateway: GatewayProcess, job_id: str) -> tuple[str, Any]:
    answer = gateway.get(f"/task/{job_id}").json()
    return answer["status"], answer.get("queue_position")


def events(gateway: GatewayProcess, job_id: str) -> tuple[str, Any]:
    with gateway.get(f"/events/{job_id}", stream=True) as stream:
        data = next(line for line in stream.iter_lines() if line.startswith(b"data: "))
    standing = json.loads(data.removeprefix(b"data: "))
    return standing["status"], standing.get("queue_position")


def execution(gateway: GatewayProcess, job_id: str) -> tuple[str, Any]:
    answer = gateway.get(f"/api/v1/comfyui/executions/{job_id}").json()["data"]["execution"]
    return answer["status"], answer.get("queue_position")


@pytest.mark.parametrize(
    ("ask", "runs", "waits"),
    [
        (status, "IN_PROGRESS", "IN_QUEUE"),
        (events, "IN_PROGRESS", "IN_QUEUE"),
        (workflow_status, "running", "pending"),
        (task, "processing", "pending"),
        (execution, "running", "pending"),
    ],
)
def test_one_runs_and_four_wait(
    gateway: GatewayProcess,
    jobs: list[str],
    ask: Callable[[GatewayProcess, str], tuple[str, Any]],
    runs: str,
    waits: str,
) -> None:
    reported = [ask(gateway, job_id) for job_id in jobs]
    assert [state for state, _ in reported] == [runs, *[waits] * 4]
    assert [position for _, position in reported[1:]] == WAITING


def test_the_counts_agree(gateway: GatewayProcess, jobs: list[str]) -> None:
    queue = gateway.get("/api/queue").json()
    assert (len(queue["running"]), len(queue["pending"])) == (1, 4)
    health = gateway.get("/health").json()
    assert (health["jobs"]["inProgress"], health["jobs"]["inQueue"]) == (1, 4)
    sizes = gateway.get("/queue-info").json()
    # One is in ComfyUI's own queue behind the one that runs.
    given = sizes["generation_queue_size"]
    assert sizes["preprocess_queue_size"] + given == 5
    assert sizes["postprocess_queue_size"] == 0
    figures = gateway.get("/metrics").text
    assert 'comfy_jobs{state="IN_PROGRESS"} 1.0' in figures
    assert "comfy_queue_depth 4.0" in figures
    assert [gateway.get(f"/result/{job_id}").json()["status"] for job_id in jobs] == ["generating", *["queued"] * 4]


def test_a_stream_reports_its_jobs_position(gateway: GatewayProcess, jobs: list[str]) -> None:
    body = {"input": {"workflow_json": work(0.1)}}
    url = f"{gateway.url}/generate/stream"
    with requests.post(url, json=body, headers=gateway.headers, stream=True, timeout=TIMEOUT_S) as stream:
        data = next(line for line in stream.iter_lines() if line.startswith(b"data: "))
        event = json.loads(data.removeprefix(b"data: "))
        assert (event["status"], event["message"]) == ("queued", "The request waits behind 4 others")
        assert event["queue_position"]["position"] == 5
        assert event["queue_position"]["queue_size"] >= 5
        gateway.post(f"/cancel/{event['request_id']}")


def test_a_purge_removes_every_job_that_does_not_run(gateway: GatewayProcess, jobs: list[str]) -> None:
    assert gateway.post("/purge-queue").json()["removed"] == 4
    assert in_queue(gateway) == jobs[:1]
    assert [gateway.get(f"/status/{job_id}").json()["status"] for job_id in jobs[1:]] == ["CANCELLED"] * 4
    gateway.post(f"/cancel/{jobs[0]}")
    # Nothing is left in front of it.
    assert gateway.ended(gateway.run(work(0.1)))["status"] == "COMPLETED"
